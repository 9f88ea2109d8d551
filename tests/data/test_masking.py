"""Random numbers and masking against slow definitions in plain Python, and against the laws they should follow."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data.errors import DataError
from potamos.data.mask_vocabulary import MaskingError, MaskVocabulary, maskable_ids
from potamos.data.masking import (
    DEBERTA_NGRAMS,
    SPANBERT_NGRAMS,
    LateMaskedRows,
    MaskRule,
    mask,
    mask_late,
    select,
)
from potamos.data.order import derive_key
from potamos.data.randomness import RowRandom, below, happens, mix64, smallest

GAMMA = 0x9E3779B97F4A7C15
END, MASK, PAD = 0, 1, 2
# Ids 3 to 42 begin a word, 43 to 99 go on one, 100 is a second special id, 101 a hole in the numbering.
PIECES = [b""] * 3 + [b" w%d" % i for i in range(40)] + [b"x%d" % i for i in range(57)] + [b"<s>", b""]
VOCABULARY = MaskVocabulary.of_pieces(PIECES, {END, MASK, PAD, 100}, MASK)


def slow_mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def slow_word(seed: int, purpose: str, epoch: int, stream: str, sample: int, position: int) -> int:
    key = derive_key("row", seed, purpose, epoch, stream)
    row = slow_mix((key + (sample + 1) * GAMMA) % 2**64)
    return slow_mix((row + (position + 1) * GAMMA) % 2**64)


def make_rows(seed: int, n: int, width: int, *, padded: bool = False, mean: int = 30) -> tuple[np.ndarray, ...]:
    """Tokens, document ids, positions of random documents, each closed by END, with a few other special tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 100, (n, width)).astype(np.int32)
    documents, positions = np.zeros((n, width), np.int32), np.zeros((n, width), np.int32)
    for r in range(n):
        place, document = 0, int(rng.integers(1000))
        while place < width:
            size = min(int(rng.integers(1, 2 * mean)), width - place)
            documents[r, place : place + size], positions[r, place : place + size] = document, range(size)
            tokens[r, place + size - 1] = END
            place, document = place + size, document + 1
        if padded:
            cut = int(rng.integers(0, width + 1))
            documents[r, cut:], positions[r, cut:] = -1, 0  # only the ids say that it is padding
    tokens[rng.random((n, width)) < 0.01] = 100
    return tokens, documents, positions


def chi_square(observed: Any, expected: Any) -> tuple[float, float]:
    """The statistic, and a bound it passes with probability about 1e-5 (Wilson and Hilferty's approximation)."""
    observed, expected = np.asarray(observed, float).ravel(), np.asarray(expected, float).ravel()
    freedom = observed.size - 1
    spread = 2 / (9 * freedom)
    return float(((observed - expected) ** 2 / expected).sum()), freedom * (1 - spread + 4.3 * math.sqrt(spread)) ** 3


# Random numbers


def test_mix_gives_the_published_outputs_of_splitmix64() -> None:
    # The first five outputs for seed 1234567, as given out with the generator's C code (Vigna 2015).
    state = (1234567 + np.arange(1, 6, dtype=np.uint64) * np.uint64(GAMMA)).astype(np.uint64)
    assert mix64(state).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@given(
    st.integers(-(2**70), 2**70), st.integers(0, 3), st.lists(st.integers(0, 2**62), min_size=1, max_size=5), st.data()
)
@settings(max_examples=40, deadline=None)
def test_words_are_a_function_of_seed_purpose_epoch_sample_and_position(
    seed: int, epoch: int, samples: list[int], data: st.DataObject
) -> None:
    random = RowRandom(seed, "mlm", np.array(samples), epoch)
    first, width = data.draw(st.integers(0, 50)), data.draw(st.integers(0, 40))
    words = random.words("select", width, first)
    assert words.dtype == np.uint64
    assert words.shape == (len(samples), width)
    wanted = [[slow_word(seed, "mlm", epoch, "select", s, first + p) for p in range(width)] for s in samples]
    assert words.tolist() == wanted
    # halves are those words' low and high parts, from any first position on
    pairs = random.words("select", (first + width) // 2 + 1)
    every = np.stack([pairs & np.uint64(2**32 - 1), pairs >> np.uint64(32)], axis=-1).reshape(len(samples), -1)
    halves = random.halves("select", width, first)
    assert halves.dtype.itemsize == 4
    assert np.array_equal(halves, every[:, first : first + width])
    # single places, in any order
    rows, places = np.meshgrid(np.arange(len(samples))[::-1], np.arange(7), indexing="ij")
    assert np.array_equal(random.at("select", rows, places), random.words("select", 7)[::-1])
    assert np.array_equal(random.take(slice(1, None)).words("a", 9), random.words("a", 9)[1:])


def test_large_batches_equal_small_ones() -> None:
    random = RowRandom(3, "mlm", np.arange(100, 140))
    whole = random.words("select", 3001)  # hashed in several pieces
    assert np.array_equal(whole[17], RowRandom(3, "mlm", np.array([117])).words("select", 3001)[0])
    assert np.array_equal(whole[:, 1999:], random.words("select", 1002, 1999))


def test_random_numbers_refuse_what_are_no_samples() -> None:
    for bad in (np.array([[1]]), np.array([1.5]), np.array([3, -1])):
        with pytest.raises(DataError, match=r"vector of global sample indices"):
            RowRandom(0, "mlm", bad)


def differing(name: str) -> tuple[RowRandom, RowRandom]:
    rows = np.arange(200)
    base = {"seed": 5, "purpose": "mlm", "samples": rows, "epoch": 0}
    other = {"seed": 6, "purpose": "rtd", "samples": rows + 1, "epoch": 1}
    return RowRandom(**base), RowRandom(**{**base, name: other[name]})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["seed", "purpose", "samples", "epoch", "stream", "position", "row"])
def test_words_that_differ_in_one_thing_are_independent(name: str) -> None:
    width = 256
    if name in ("stream", "position", "row"):
        random = RowRandom(5, "mlm", np.arange(200))
        a = random.words("a", width)
        b = {"stream": random.words("b", width), "position": random.words("a", width, 1), "row": np.roll(a, 1, 0)}[name]
    else:
        a, b = (random.words("a", width) for random in differing(name))
    count = a.size
    assert (a == b).sum() == 0
    # bits: each of 64 is set half the time, and agrees with its partner in the other half the time
    for word in (a, a ^ b):
        bits = np.unpackbits(word.view(np.uint8).reshape(count, 8), axis=1)
        assert (abs(bits.sum(axis=0) - count / 2) < 5 * math.sqrt(count) / 2).all()
    # top bits: all 16 x 16 pairs equally often
    pairs = np.bincount(((a >> np.uint64(60)) * np.uint64(16) + (b >> np.uint64(60))).astype(np.int64).ravel())
    statistic, bound = chi_square(pairs, np.full(256, count / 256))
    assert statistic < bound
    x, y = (w.astype(np.float64).ravel() / 2**64 for w in (a, b))
    assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(count)


def test_a_changed_input_bit_changes_half_of_the_output_bits() -> None:
    samples = np.arange(2000)
    for bit in (0, 1, 5, 20, 40, 62):
        changed = RowRandom(1, "a", samples ^ (1 << bit)).words("s", 4)
        flips = np.unpackbits((RowRandom(1, "a", samples).words("s", 4) ^ changed).view(np.uint8)).mean()
        assert abs(flips - 0.5) < 5 * 0.5 / math.sqrt(2000 * 4 * 64)


def test_words_are_uniform_and_their_gaps_are_geometric() -> None:
    random = RowRandom(9, "gaps", np.arange(64))
    halves = random.halves("s", 4096)
    counts = np.bincount((halves >> np.uint32(24)).ravel(), minlength=256)
    statistic, bound = chi_square(counts, np.full(256, halves.size / 256))
    assert statistic < bound
    assert statistic > 256 * 0.6  # nor more even than chance
    events = np.flatnonzero(happens(halves, 0.1))
    gaps = np.bincount(np.minimum(np.diff(events), 40), minlength=41)[1:]
    law = [0.1 * 0.9 ** (k - 1) for k in range(1, 40)] + [0.9**39]
    statistic, bound = chi_square(gaps, np.array(law) * gaps.sum())
    assert statistic < bound


def test_probabilities_and_ranges_reach_their_ends() -> None:
    halves = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], np.uint32)
    assert happens(halves, 0.0).tolist() == [False] * 5
    assert happens(halves, 1.0).tolist() == [True] * 5
    assert happens(halves, 0.5).tolist() == [True, True, True, False, False]
    assert happens(halves, 2**-32).tolist() == [True, False, False, False, False]
    assert below(halves, 10).tolist() == [0, 0, 4, 5, 9]
    assert below(halves, 1).tolist() == [0] * 5


@given(st.integers(0, 6), st.integers(0, 40), st.integers(0, 2**32), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_smallest_is_a_sorted_prefix(n: int, width: int, seed: int, ranked: bool, even: bool) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**64, (n, width), np.uint64)
    words[:, width // 2 :] = words[:, width // 2 : width // 2 + 1]  # a unit of equal words
    rank = rng.integers(0, 4, (n, width)).astype(np.uint8) if ranked else None
    counts = rng.integers(0, width + 1, n) if not even else int(rng.integers(0, width + 1))
    chosen = smallest(words, counts, rank)
    low = 2 + max(width - 1, 0).bit_length()
    for r in range(n):
        order = sorted(range(width), key=lambda c: (rank[r, c] if rank is not None else 0, words[r, c] >> low, c))
        wanted = order[: counts if even else counts[r]]  # type: ignore[index]
        assert np.flatnonzero(chosen[r]).tolist() == sorted(wanted)


# Masking


def slow_units(rule: MaskRule, tokens: Any, documents: Any, sample: int, seed: int) -> list[list[int]]:
    """The units of one row, each a list of columns."""
    width = len(tokens)
    hideable = [VOCABULARY.maskable[t] and d >= 0 for t, d in zip(tokens, documents, strict=True)]
    fresh = [c == 0 or not (hideable[c] and hideable[c - 1]) or documents[c] != documents[c - 1] for c in range(width)]
    units: list[list[int]] = []
    words = 0
    left = 0
    ngram = -1
    for c in range(width):
        if rule.units == "tokens":
            units.append([c])
            continue
        begins = fresh[c] or (3 <= tokens[c] < 43)
        if rule.units == "words":
            begins_unit = begins
        else:
            begins_unit = fresh[c]
            if begins:
                if left == 0:
                    ngram += 1
                    word = slow_word(seed, "mlm", 0, "ngrams", sample, ngram // 2)
                    half = word >> 32 if ngram % 2 else word % 2**32
                    edges = np.cumsum(rule.ngrams)[:-1]
                    left = 1 + sum(half > round(edge * 2**32) - 1 for edge in edges)
                    begins_unit = True
                left -= 1
                words += 1
        if begins_unit:
            units.append([])
        units[-1].append(c)
    return units


def slow_mask(rule: MaskRule, rows: tuple[np.ndarray, ...], samples: list[int], seed: int) -> tuple[Any, Any, Any]:
    """(inputs, labels, which became [MASK]) by loops over units and tokens."""
    inputs, labels = rows[0].copy(), np.full(rows[0].shape, -1)
    gone = np.zeros(rows[0].shape, bool)
    width = rows[0].shape[1]
    low = 2 + (width - 1).bit_length()
    for r, sample in enumerate(samples):
        tokens, documents = rows[0][r], rows[1][r]
        hideable = [bool(VOCABULARY.maskable[t]) and d >= 0 for t, d in zip(tokens, documents, strict=True)]
        units = slow_units(rule, tokens, documents, sample, seed)
        if not rule.exact:
            for unit in units:
                word = slow_word(seed, "mlm", 0, "select", sample, unit[0] // 2)
                half = word >> 32 if unit[0] % 2 else word % 2**32
                for c in unit:
                    if half < round(rule.rate * 2**32) and hideable[c]:
                        labels[r, c] = tokens[c]
                        place = slow_word(seed, "mlm", 0, "replace", sample, c)
                        if place >> 32 < round(rule.replacement[0] * 2**32):
                            inputs[r, c] = MASK
                        elif place >> 32 < round(sum(rule.replacement[:2]) * 2**32):
                            inputs[r, c] = VOCABULARY.ordinary[place % 2**32 * len(VOCABULARY.ordinary) >> 32]
            continue
        valid = sum(d >= 0 for d in documents)
        order = []
        for unit in units:
            word = slow_word(seed, "mlm", 0, "select", sample, unit[0]) >> low
            order += [(0 if hideable[c] else 1 if documents[c] >= 0 else 2, word, c) for c in unit]
        hidden = [c for _, _, c in sorted(order)[: round(rule.rate * valid)]]
        again = sorted((not hideable[c], slow_word(seed, "mlm", 0, "replace", sample, c) >> low, c) for c in hidden)
        masks, changes = (round(share * len(hidden)) for share in (rule.replacement[0], sum(rule.replacement[:2])))
        for place, (_, _, c) in enumerate(again):
            gone[r, c] = place < masks
            if hideable[c]:
                labels[r, c] = tokens[c]
                if place < masks:
                    inputs[r, c] = MASK
                elif place < changes:
                    word = slow_word(seed, "mlm", 0, "replace", sample, c)
                    inputs[r, c] = VOCABULARY.ordinary[word % 2**32 * len(VOCABULARY.ordinary) >> 32]
    return inputs, labels, gone


rules = st.builds(
    MaskRule,
    rate=st.sampled_from([0.0, 0.15, 0.4, 0.5, 0.9, 1.0]),
    units=st.sampled_from(["tokens", "words", "ngrams"]),
    exact=st.booleans(),
    replacement=st.sampled_from([(0.8, 0.1, 0.1), (1.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.5, 0.5, 0.0)]),
    ngrams=st.sampled_from([DEBERTA_NGRAMS, SPANBERT_NGRAMS, (1.0,), (0.0, 1.0)]),
)


@given(rules, st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32), st.booleans(), st.sampled_from([2, 8, 40]))
@settings(max_examples=150, deadline=None)
def test_masking_equals_the_slow_definition(
    rule: MaskRule, n: int, width: int, seed: int, padded: bool, mean: int
) -> None:
    rows = make_rows(seed, n, width, padded=padded, mean=mean)
    samples = np.random.default_rng(seed).integers(0, 2**60, n)
    random = RowRandom(seed, "mlm", samples)
    inputs, labels, gone = slow_mask(rule, rows, samples.tolist(), seed)
    done = mask(rule, rows[0], rows[1], VOCABULARY, random)
    assert (done.tokens.dtype, done.labels.dtype) == (np.int32, np.int32)
    assert np.array_equal(done.labels, labels)
    assert np.array_equal(done.tokens, inputs)
    assert np.array_equal(select(rule, rows[0], rows[1], VOCABULARY, random), labels >= 0)
    if rule.exact:
        late = mask_late(rule, rows[0], rows[1], rows[2], VOCABULARY, random)
        check_late(rule, rows, inputs, labels, gone, late)


def check_late(rule: MaskRule, rows: Any, inputs: Any, labels: Any, gone: Any, late: LateMaskedRows) -> None:
    n, width = inputs.shape
    kept, removed = rule.late_lengths(width)
    assert late.kept_ids.shape == (n, kept)
    assert late.masked_labels.shape == (n, removed)
    for r in range(n):
        columns = sorted([*late.kept_columns[r].tolist(), *late.masked_columns[r].tolist()])
        assert columns == list(range(width))
        assert (np.diff(late.kept_columns[r]) > 0).all()
        assert (np.diff(late.masked_columns[r]) > 0).all()
        real = rows[1][r] >= 0
        assert set(late.masked_columns[r][late.masked_document_ids[r] >= 0].tolist()) == set(
            np.flatnonzero(gone[r]).tolist()
        )
        assert not gone[r, ~real].any()
    pairs = (
        (late.kept_columns, (late.kept_ids, late.kept_positions, late.kept_document_ids, late.kept_labels)),
        (late.masked_columns, (None, late.masked_positions, late.masked_document_ids, late.masked_labels)),
    )
    for columns, parts in pairs:
        for part, whole in zip(parts, (inputs, rows[2], rows[1], labels), strict=True):
            if part is not None:
                assert np.array_equal(part, np.take_along_axis(whole, columns, axis=1))
    ordinary = VOCABULARY.maskable[rows[0]] & (rows[1] >= 0)
    if (ordinary.sum(axis=1) >= np.rint(rule.rate * (rows[1] >= 0).sum(axis=1))).all():
        assert not (late.kept_ids == MASK).any()  # no [MASK] stays, and all that went had been one
        assert ((late.masked_labels >= 0) == (late.masked_document_ids >= 0)).all()


@pytest.mark.parametrize("units", ["tokens", "words", "ngrams"])
@pytest.mark.parametrize("exact", [False, True])
def test_a_row_is_masked_alike_in_every_batch(units: str, exact: bool) -> None:
    rule = MaskRule(0.4, units, exact)
    tokens, documents, _ = make_rows(1, 24, 96, padded=True)
    samples = np.arange(1000, 1024) * 7
    whole = mask(rule, tokens, documents, VOCABULARY, RowRandom(4, "mlm", samples))
    order = np.random.default_rng(0).permutation(24)
    for world in (1, 2, 3, 8, 24):
        for rank in range(world):
            mine = order[rank::world]
            part = mask(rule, tokens[mine], documents[mine], VOCABULARY, RowRandom(4, "mlm", samples[mine]))
            assert np.array_equal(part.tokens, whole.tokens[mine])
            assert np.array_equal(part.labels, whole.labels[mine])
    for other in (RowRandom(5, "mlm", samples), RowRandom(4, "rtd", samples), RowRandom(4, "mlm", samples, 1)):
        assert (mask(rule, tokens, documents, VOCABULARY, other).labels != whole.labels).any(axis=1).sum() > 15


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("units", ["tokens", "words", "ngrams"])
@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_rates_replacements_and_places_follow_their_laws(units: str, exact: bool, rate: float) -> None:
    rule = MaskRule(rate, units, exact)
    n, width = 512, 192
    tokens = np.random.default_rng(2).integers(3, 100, (n, width)).astype(np.int32)
    documents = np.zeros((n, width), np.int32)
    done = mask(rule, tokens, documents, VOCABULARY, RowRandom(8, "mlm", np.arange(n)))
    hidden = done.labels >= 0
    total = hidden.sum()
    mean_unit = 1 if units == "tokens" else 2.4 if units == "words" else 4.6
    if exact:
        assert (hidden.sum(axis=1) == round(rate * width)).all()
    assert abs(total / hidden.size - rate) < 5 * math.sqrt(rate * mean_unit / hidden.size) + 0.5 / width
    # every column alike; neighbors of one unit go together, so columns of n rows are n draws each
    columns = hidden.sum(axis=0)
    assert (abs(columns - n * rate) < 5 * math.sqrt(n * rate * (1 - rate))).all()
    changed = done.tokens[hidden] != done.labels[hidden]
    masks = (done.tokens[hidden] == MASK).mean()
    noise = 5 / math.sqrt(total) / 2 + (0.5 / round(rate * width) if exact else 0)
    assert abs(masks - 0.8) < noise
    # a random token is the true one once in 97
    assert abs(changed.mean() - 0.9 + 0.1 / 97) < noise
    assert (done.tokens[~hidden] == tokens[~hidden]).all()
    swapped = done.tokens[hidden][changed & (done.tokens[hidden] != MASK)]
    counts = np.bincount(swapped, minlength=102)
    assert counts[~VOCABULARY.maskable].sum() == 0
    statistic, bound = chi_square(counts[VOCABULARY.maskable], np.full(97, len(swapped) / 97))
    assert statistic < bound
    # rows and positions are independent: the mask of a row says nothing about the next row's
    x = hidden.astype(float) - hidden.mean()
    assert abs((x[1:] * x[:-1]).mean() / x.var()) < 5 * math.sqrt(mean_unit) / math.sqrt(x.size)
    if units == "tokens":
        lag = (x[:, 1:] * x[:, :-1]).mean() / x.var()
        assert abs(lag + (1 / width if exact else 0)) < 5 / math.sqrt(x.size)


def test_words_go_whole_and_never_over_a_document() -> None:
    tokens, documents, _ = make_rows(3, 64, 128)
    done = mask(MaskRule(0.3, "words"), tokens, documents, VOCABULARY, RowRandom(0, "mlm", np.arange(64)))
    hidden = done.labels >= 0
    assert not hidden[~VOCABULARY.maskable[tokens]].any()
    inner = VOCABULARY.maskable[tokens[:, 1:]] & VOCABULARY.maskable[tokens[:, :-1]] & (tokens[:, 1:] >= 43)
    inner &= documents[:, 1:] == documents[:, :-1]
    assert inner.sum() > 1000
    assert (hidden[:, 1:] == hidden[:, :-1])[inner].all()
    # a document's first token is its own word, though it goes on no word
    seam = (documents[:, 1:] != documents[:, :-1]) & VOCABULARY.maskable[tokens[:, 1:]]
    assert hidden[:, 1:][seam].any()
    assert not hidden[:, :-1][seam].any()


def test_ngrams_have_their_lengths_and_stay_inside_documents() -> None:
    n, width = 1500, 300
    tokens = np.random.default_rng(5).integers(3, 43, (n, width)).astype(np.int32)  # every token a word
    documents = np.zeros((n, width), np.int32)
    documents[:, 150:] = 1  # no end-of-document token between: the ids alone tell
    for shares in (DEBERTA_NGRAMS, SPANBERT_NGRAMS):
        rule = MaskRule(0.01, "ngrams", ngrams=shares)  # so rare that two hardly ever touch
        random = RowRandom(1, "mlm", np.arange(n))
        hidden = select(rule, tokens, documents, VOCABULARY, random)
        runs = Counter()
        for row in hidden:
            edges = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
            for begin, end in zip(edges[::2], edges[1::2], strict=True):
                if begin > 20 and end < 140:
                    runs[int(end - begin)] += 1
        total = sum(runs.values())
        mean = sum((i + 1) * share for i, share in enumerate(shares))
        for size, share in enumerate(shares, start=1):
            slack = 0.02 + 4 * math.sqrt(share * (1 - share) / total)  # what merged neighbors add or take
            assert abs(runs[size] / total - share) < slack
        assert abs(sum(k * c for k, c in runs.items()) / total - mean) < 0.03 * mean + 4 * mean / math.sqrt(total)
        # the two sides of a document's end are hidden independently
        hidden = select(MaskRule(0.3, "ngrams", ngrams=shares), tokens, documents, VOCABULARY, random)
        assert abs((hidden[:, 149] & hidden[:, 150]).mean() - 0.09) < 5 * math.sqrt(0.09 * 0.91 / n)
        assert (hidden[:, 148] & hidden[:, 149]).mean() > 0.13


def test_rows_of_special_tokens_and_padding_alone_come_out_untouched() -> None:
    tokens = np.full((3, 9), END, np.int32)
    documents = np.arange(27, dtype=np.int32).reshape(3, 9)
    tokens[1], documents[1] = 50, -1
    for exact in (False, True):
        for units in ("tokens", "words", "ngrams"):
            rule = MaskRule(0.5, units, exact)
            done = mask(rule, tokens, documents, VOCABULARY, RowRandom(0, "mlm", np.arange(3)))
            assert np.array_equal(done.tokens, tokens)
            assert (done.labels == -1).all()
    late = mask_late(
        MaskRule(0.5, exact=True), tokens, documents, documents, VOCABULARY, RowRandom(0, "", np.arange(3))
    )
    assert late.kept_ids.shape == (3, 6)
    assert (late.masked_labels == -1).all()
    empty = mask(MaskRule(), tokens[:0], documents[:0], VOCABULARY, RowRandom(0, "mlm", np.arange(0)))
    assert empty.tokens.shape == (0, 9)


def test_vocabulary_tells_words_of_byte_level_pieces() -> None:
    pieces = {
        " the": True, "ing": False, "\n": True, ",": True, "7": False, "é": False, "\u0301a": False, "'s": True,
        "東": False, "—": True, "_x": True, "\u00a0": True,
    }  # fmt: skip
    table = MaskVocabulary.of_pieces([b"", b"\xc3", b"\xa9", *(p.encode() for p in pieces)], {0}, 0)
    assert table.starts_word is not None
    assert table.starts_word.tolist() == [False, False, False, *pieces.values()]
    assert table.maskable.tolist() == [False] + [True] * (len(pieces) + 2)


def test_vocabulary_of_a_tokenizer(tokenizer: Any, texts: list[str]) -> None:
    table = MaskVocabulary.of_tokenizer(tokenizer)
    assert table.mask == tokenizer.special("[MASK]")
    assert len(table.maskable) == tokenizer.vocabulary
    assert not table.maskable[sorted(tokenizer.special_ids)].any()
    assert not table.maskable[tokenizer.end_of_document]
    ids = tokenizer.encode(texts[0])
    assert table.starts_word is not None
    begins = np.flatnonzero(table.starts_word[ids] | (np.arange(len(ids)) == 0))
    words = [tokenizer.decode(part) for part in np.split(ids, begins[1:])]
    assert "".join(words) == texts[0]
    assert all(word.strip().isalnum() or not any(c.isalnum() for c in word) or word[0] in " '" for word in words)


def test_bad_rules_and_vocabularies_are_named() -> None:
    for change, message in (
        ({"rate": 1.5}, "rate 1.5"),
        ({"rate": math.nan}, "rate nan"),
        ({"units": "letters"}, "'letters'.*tokens, words, ngrams"),
        ({"replacement": (0.8, 0.1)}, "three shares"),
        ({"replacement": (0.8, 0.3, -0.1)}, "sum to 1"),
        ({"ngrams": (0.5, 0.4)}, "ngrams.*sum to 1"),
        ({"ngrams": ()}, "ngrams"),
    ):
        with pytest.raises(MaskingError, match=message):
            MaskRule(**change)  # type: ignore[arg-type]
    with pytest.raises(MaskingError, match="id 7 of"):
        MaskVocabulary.of_pieces([b" a"] * 9, {0}, 7)
    with pytest.raises(MaskingError, match="all 2 ids"):
        maskable_ids([b" a", b""], {0})
    tokens, documents, positions = make_rows(0, 2, 8)
    random = RowRandom(0, "mlm", np.arange(2))
    with pytest.raises(MaskingError, match="do not fit"):
        mask(MaskRule(), tokens, documents[:, 1:], VOCABULARY, random)
    with pytest.raises(MaskingError, match="1 rows"):
        mask(MaskRule(), tokens, documents, VOCABULARY, random.take(slice(1)))
    with pytest.raises(MaskingError, match="exact: true"):
        mask_late(MaskRule(), tokens, documents, positions, VOCABULARY, random)
    unspaced = MaskVocabulary.of_pieces([b"", b"play", b"ing"], {0}, 0)
    with pytest.raises(MaskingError, match=r"'words'.*begins with a space"):
        select(MaskRule(units="words"), tokens % 3, documents, unspaced, random)
