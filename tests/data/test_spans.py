"""Span corruption against one row at a time, against every arrangement counted out, and back to the text."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data.mask_vocabulary import MaskingError
from potamos.data.randomness import RowRandom
from potamos.data.spans import CorruptedRows, SpanRule, corrupt_spans

_SPEC = importlib.util.spec_from_file_location(
    "naive_spans", Path(__file__).parents[2] / "benchmarks" / "naive_spans.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
naive = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(naive)

END = 0
FIRST, COUNT = 100, 300  # ids 1 to 99 are text, 100 to 399 sentinels
MASKABLE = np.zeros(FIRST + COUNT, bool)
MASKABLE[1:FIRST] = True
SENTINELS = np.arange(FIRST, FIRST + COUNT)[::-1]  # T5 counts them down


def make_rows(seed: int, n: int, width: int, mean: int | None = None, padded: bool = False) -> Any:
    """Tokens and document ids; documents of about ``mean`` tokens closed by END, or none that ends."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, FIRST, (n, width)).astype(np.int32)
    documents = np.full((n, width), 5, np.int32)
    for r in range(n):
        place = 0
        while mean is not None and place < width:
            place += int(rng.integers(1, 2 * mean))
            documents[r, place:] += 1
            if rng.random() < 0.8:  # else only the ids tell
                tokens[r, place - 1 : place] = END
        if padded:
            cut = int(rng.integers(0, width + 1))
            documents[r, cut:] = -1  # only the ids say that it is padding
    if mean is not None:
        tokens[rng.random((n, width)) < 0.01] = END  # special tokens inside documents
    return tokens, documents


def corrupt(rule: SpanRule, tokens: Any, documents: Any, seed: int = 0, samples: Any = None) -> CorruptedRows:
    random = RowRandom(seed, "t5", np.arange(len(tokens)) if samples is None else samples)
    return corrupt_spans(rule, tokens, documents, MASKABLE, SENTINELS, random)


rules = st.builds(
    SpanRule,
    density=st.sampled_from([0.02, 0.15, 0.3, 0.5, 0.9]),
    mean_span=st.sampled_from([1.0, 2.5, 3.0, 8.0, 64.0]),
    final_sentinel=st.booleans(),
    end_of_sequence=st.sampled_from([None, 399]),
)


@given(
    rules,
    st.integers(1, 6),
    st.integers(1, 130),
    st.integers(0, 2**32),
    st.sampled_from([None, 2, 6, 20, 60]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_corruption_equals_one_row_at_a_time(
    rule: SpanRule, n: int, width: int, seed: int, mean: int | None, padded: bool
) -> None:
    compare(rule, make_rows(seed, n, width, mean, padded), seed)


@pytest.mark.parametrize(("density", "mean"), [(0.15, 12), (0.5, 8), (0.5, 20)])
def test_many_spans_in_each_others_way_equal_one_row_at_a_time(density: float, mean: int) -> None:
    compare(SpanRule(density), make_rows(mean, 60, 128, mean), 3)


def compare(rule: SpanRule, made: Any, seed: int) -> None:
    tokens, documents = made
    n, width = tokens.shape
    samples = np.random.default_rng(seed).integers(0, 2**60, n)
    rows = corrupt(rule, tokens, documents, seed, samples)
    lengths = rule.lengths(width)
    assert rows.inputs.shape == (n, lengths[0])
    assert rows.targets.shape == (n, lengths[1])
    for r in range(n):
        random = RowRandom(seed, "t5", samples[r : r + 1])
        wanted = naive.corrupt_row(
            rule, tokens[r], documents[r], MASKABLE, SENTINELS, lambda s, k, random=random: random.words(s, k)[0]
        )
        fills = (0, -1, -1, 0, -1)
        parts = (rows.inputs, rows.input_document_ids, rows.input_columns, rows.targets, rows.target_document_ids)
        for part, want, fill in zip(parts, wanted, fills, strict=False):
            assert part[r].tolist() == want + [fill] * (part.shape[1] - len(want))
        assert rows.crossed[r] == wanted[5]


def restore(inputs: Any, targets: Any) -> list[int]:
    """The row's tokens from its input and target alone."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token >= FIRST:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    return [t for token in inputs for t in (spans[token] if token >= FIRST else [token])]


@pytest.mark.parametrize("width", [5, 64, 512])
@pytest.mark.parametrize("shape", [(0.15, 3.0), (0.5, 3.0), (0.5, 64.0), (0.15, 8.0)])
def test_the_text_comes_back(width: int, shape: tuple[float, float]) -> None:
    rule = SpanRule(*shape)
    for mean in (None, 40):
        tokens, documents = make_rows(width, 30, width, mean)
        rows = corrupt(rule, tokens, documents)
        for r in range(30):
            if rows.crossed[r]:  # the special token between comes behind the span instead
                assert sorted(restore(rows.inputs[r].tolist(), rows.targets[r].tolist())) == sorted(tokens[r].tolist())
                continue
            assert restore(rows.inputs[r].tolist(), rows.targets[r].tolist()) == tokens[r].tolist()
        marks = rows.inputs >= FIRST
        assert (marks.sum(axis=1) == rule.spans(width)).all()
        assert np.array_equal(rows.inputs[marks].reshape(30, -1), np.tile(SENTINELS[: rule.spans(width)], (30, 1)))
        kept = ~marks
        columns = np.take_along_axis(tokens, rows.input_columns, axis=1)
        assert np.array_equal(rows.inputs[kept], columns[kept])
        assert np.array_equal(rows.input_document_ids, np.take_along_axis(documents, rows.input_columns, axis=1))


def test_the_quick_row_of_the_benchmark_writes_the_same() -> None:
    tokens, documents = make_rows(8, 20, 512)
    rows = corrupt(SpanRule(), tokens, documents)
    for r in range(20):
        mark = np.flatnonzero(rows.targets[r] >= FIRST)
        starts, lengths = rows.input_columns[r][rows.inputs[r] >= FIRST], np.diff(np.append(mark, 103)) - 1
        inputs, targets = naive.join_row(tokens[r], starts, lengths, SENTINELS)
        assert np.array_equal(inputs, rows.inputs[r])
        assert np.array_equal(targets, rows.targets[r])
        drawn = naive.draw_row(np.random.default_rng(r), 512, 77, 26)
        inputs, targets = naive.join_row(tokens[r], *drawn, SENTINELS)
        assert (len(inputs), len(targets)) == (461, 103)
        assert restore(inputs.tolist(), targets.tolist()) == tokens[r].tolist()


def test_lengths_are_the_published_ones() -> None:
    assert SpanRule().lengths(512) == (461, 103)
    assert SpanRule().spans(512) == SpanRule().sentinels(512) == 26
    assert SpanRule(final_sentinel=True, end_of_sequence=1).lengths(512) == (462, 105)
    assert SpanRule(final_sentinel=True).sentinels(512) == 27
    # T5 cuts text to 568 tokens, so that inputs of 512 and targets of 114, both with an end, come out.
    assert SpanRule(end_of_sequence=1).lengths(568) == (512, 114)
    tokens, documents = make_rows(0, 2, 512)
    rows = corrupt(SpanRule(final_sentinel=True, end_of_sequence=399), tokens, documents)
    assert rows.targets[0, -2:].tolist() == [SENTINELS[26], 399]
    assert rows.inputs[0, -1] == 399
    assert rows.input_columns[0, -1] == -1
    assert (rows.target_document_ids == 5).all()
    assert (rows.input_document_ids == 5).all()


def chi_square(observed: Any, expected: Any) -> tuple[float, float]:
    """The statistic, and a bound it passes with probability about 1e-5 (Wilson and Hilferty's approximation)."""
    observed, expected = np.asarray(observed, float).ravel(), np.asarray(expected, float).ravel()
    freedom = observed.size - 1
    spread = 2 / (9 * freedom)
    return float(((observed - expected) ** 2 / expected).sum()), freedom * (1 - spread + 4.3 * math.sqrt(spread)) ** 3


def test_every_arrangement_is_equally_likely() -> None:
    width, n = 10, 40_000
    rule = SpanRule(0.5, 2.0)  # 5 hidden tokens in 2 spans
    arrangements = [
        mask
        for mask in itertools.product((0, 1), repeat=width)
        if sum(mask) == 5 and sum(b > a for a, b in itertools.pairwise((0, *mask))) == 2
    ]
    tokens = np.tile(np.arange(1, width + 1, dtype=np.int32), (n, 1))
    rows = corrupt(rule, tokens, np.zeros_like(tokens))
    hidden = np.ones((n, width), int)
    kept = rows.inputs < FIRST
    hidden[np.nonzero(kept)[0], rows.input_columns[kept]] = 0
    counts = Counter(map(tuple, hidden.tolist()))
    assert set(counts) == set(arrangements)
    statistic, bound = chi_square([counts[a] for a in arrangements], [n / len(arrangements)] * len(arrangements))
    assert statistic < bound
    # rows, and visits of one row, are independent: pairs of halves of the arrangements
    index = {a: i * 4 // len(arrangements) for i, a in enumerate(arrangements)}
    quarter = np.array([index[tuple(row)] for row in hidden.tolist()])
    again = corrupt(rule, tokens, np.zeros_like(tokens), 1)
    other = np.ones((n, width), int)
    kept = again.inputs < FIRST
    other[np.nonzero(kept)[0], again.input_columns[kept]] = 0
    quarters = np.array([index[tuple(row)] for row in other.tolist()])
    share = np.bincount(list(index.values()), minlength=4) / len(arrangements)
    for a, b in ((quarter[1:], quarter[:-1]), (quarter, quarters)):
        statistic, bound = chi_square(np.bincount(a * 4 + b, minlength=16), np.outer(share, share) * len(a))
        assert statistic < bound


def test_span_lengths_and_places_follow_their_laws() -> None:
    width, n = 512, 3000
    rule = SpanRule()
    tokens, documents = make_rows(1, n, width)
    rows = corrupt(rule, tokens, documents)
    marks = rows.targets >= FIRST
    edges = np.append(np.flatnonzero(marks), marks.size)
    lengths = np.diff(edges) - 1
    assert lengths.min() == 1
    assert abs(lengths.mean() - 77 / 26) < 1e-12
    # A random composition of 77 into 26 parts has a part of l in C(76 - l, 24) of C(76, 25) cases.
    law = np.array([math.comb(76 - size, 24) / math.comb(76, 25) for size in range(1, 52)])
    assert abs(law.sum() - 1) < 1e-12
    most = 15
    expected = np.append(law[: most - 1], law[most - 1 :].sum()) * len(lengths)
    statistic, bound = chi_square(np.bincount(np.minimum(lengths, most), minlength=most + 1)[1:], expected)
    assert statistic < bound
    hidden = np.ones((n, width), bool)
    kept = rows.inputs < FIRST
    hidden[np.nonzero(kept)[0], rows.input_columns[kept]] = False
    assert (hidden.sum(axis=1) == 77).all()
    # Spans take 26 of 436 places between 435 visible tokens; the row's first and last token are hidden if its outermost
    # place is taken. Inside, every column is hidden alike.
    ends = hidden[:, [0, -1]].mean(axis=0)
    assert (abs(ends - 26 / 436) < 5 * math.sqrt(0.06 * 0.94 / n)).all()
    inside = hidden[:, 24:-24].mean(axis=0)
    assert (abs(inside - inside.mean()) < 5 * math.sqrt(0.15 * 0.85 / n)).all()
    assert abs(inside.mean() - 77 / 512) < 0.003


def test_spans_stay_inside_documents() -> None:
    for shape, mean, rare in (((0.15, 3.0), 60, 0), ((0.15, 3.0), 12, 3), ((0.5, 3.0), 150, 3)):
        tokens, documents = make_rows(3, 64, 512, mean)
        rows = corrupt(SpanRule(*shape), tokens, documents)
        assert rows.crossed.sum() <= rare
        assert rows.crossed.sum() == 0 or mean == 12 or shape[0] == 0.5
        for r in np.flatnonzero(rows.crossed == 0):
            begins = np.flatnonzero(rows.targets[r] >= FIRST)
            for span in np.split(rows.target_document_ids[r], begins[1:]):
                assert (span == span[0]).all()
        assert MASKABLE[rows.targets[rows.targets < FIRST]].all()
        # beside a document's end tokens are hidden two thirds as often as elsewhere (a third if spans never moved)
        hidden = np.ones((64, 512), bool)
        kept = rows.inputs < FIRST
        hidden[np.nonzero(kept)[0], rows.input_columns[kept]] = False
        near = np.zeros((64, 512), bool)
        seam = documents[:, 1:] != documents[:, :-1]
        near[:, 1:] |= seam
        near[:, :-1] |= seam
        near &= MASKABLE[tokens]
        if mean == 60:
            assert 0.55 < hidden[near].mean() / hidden[MASKABLE[tokens]].mean() < 0.95


def test_rows_without_room_keep_their_shape() -> None:
    # one-token documents: no span of three has room, so spans reach over and are counted
    tokens = np.tile(np.array([7, END], np.int32), (3, 64))
    documents = np.tile(np.arange(64, dtype=np.int32).repeat(2), (3, 1))
    rows = corrupt(SpanRule(0.15, 3.0), tokens, documents)
    assert rows.inputs.shape == (3, SpanRule(0.15, 3.0).lengths(128)[0])
    assert (rows.crossed > 0).all()
    assert (rows.input_document_ids >= 0).all()
    assert (rows.inputs == END).sum() == 3 * 64
    # fewer ordinary tokens than are to be hidden; none at all; padding alone; no row
    tokens[:, 10:], documents[1] = END, -1
    tokens[2] = END
    rows = corrupt(SpanRule(0.5, 3.0), tokens, documents)
    assert (rows.targets[:, -1] == 0).all()
    assert (rows.target_document_ids[1:] == -1).all()
    assert np.array_equal(rows.inputs[2, :85], np.full(85, END)[: rows.inputs.shape[1]])
    assert corrupt(SpanRule(), tokens[:0], documents[:0]).inputs.shape == (0, SpanRule().lengths(128)[0])


def test_a_row_is_corrupted_alike_in_every_batch() -> None:
    tokens, documents = make_rows(4, 24, 200, 30, padded=True)
    samples = np.arange(24) * 11
    whole = corrupt(SpanRule(), tokens, documents, 2, samples)
    order = np.random.default_rng(0).permutation(24)
    for world in (1, 3, 8, 24):
        for rank in range(world):
            mine = order[rank::world]
            part = corrupt(SpanRule(), tokens[mine], documents[mine], 2, samples[mine])
            for name in vars(whole):
                assert np.array_equal(getattr(part, name), getattr(whole, name)[mine])
    assert (corrupt(SpanRule(), tokens, documents, 3, samples).inputs != whole.inputs).any(axis=1).sum() > 15


def test_bad_rules_and_sentinels_are_named() -> None:
    for change, message in (
        ({"density": 0.0}, "density 0.0"),
        ({"density": 1.0}, "density 1.0"),
        ({"density": math.nan}, "density nan"),
        ({"mean_span": 0.5}, "mean_span 0.5"),
        ({"mean_span": math.inf}, "mean_span inf"),
    ):
        with pytest.raises(MaskingError, match=message):
            SpanRule(**change)  # type: ignore[arg-type]
    tokens, documents = make_rows(0, 2, 512)
    random = RowRandom(0, "t5", np.arange(2))
    with pytest.raises(MaskingError, match="512 tokens needs 26 sentinels, given are 25"):
        corrupt_spans(SpanRule(), tokens, documents, MASKABLE, SENTINELS[:25], random)
    with pytest.raises(MaskingError, match="different ids that no text holds"):
        corrupt_spans(SpanRule(), tokens, documents, MASKABLE, np.append(SENTINELS[:25], 7), random)
    with pytest.raises(MaskingError, match="different ids"):
        corrupt_spans(SpanRule(), tokens, documents, MASKABLE, np.append(SENTINELS[:25], SENTINELS[3]), random)
    with pytest.raises(MaskingError, match="do not fit"):
        corrupt_spans(SpanRule(), tokens, documents[:1], MASKABLE, SENTINELS, random)
