"""Rows against the stream joined and cut in plain Python."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data.errors import DatasetError, MixtureError, StateMismatchError, TokenizerMismatchError
from potamos.data.loader import Rows, SourceSpec, StageSpec, TokenStream, Windows
from potamos.data.manifest import make_manifest
from potamos.data.state import STATE_VERSION

ONE: dict[str, Any] = {"sequence_length": 8, "seed": 3}


def stage(*paths: Path | SourceSpec, start: int = 0) -> StageSpec:
    return StageSpec(start, tuple(p if isinstance(p, SourceSpec) else SourceSpec(p) for p in paths))


Text = tuple[list[int], list[int], list[int]]


def split(oracle: Text, lengths: list[int], parts: int) -> list[Text]:
    """The text of each part of a dataset: tokens, document numbers, true positions."""
    tokens, documents, true = oracle
    ends = np.cumsum([0, *lengths]).tolist()
    cuts = [ends[part * len(lengths) // parts] for part in range(parts + 1)]
    return [(tokens[a:b], documents[a:b], true[a:b]) for a, b in itertools.pairwise(cuts)]


def cut(texts: list[Text], chunk_tokens: int, length: int) -> list[tuple[list[int], list[int], list[int], list[int]]]:
    """Every row of the stream in order: tokens, documents, positions from the row's start, true positions."""
    rows = []
    for tokens, documents, true in texts:
        for begin in range(0, len(tokens) - 1, chunk_tokens):
            stop = min(begin + chunk_tokens + 1, len(tokens))
            for at in range(begin, stop - length, length):
                positions, place = [], 0
                for i in range(at, at + length + 1):
                    place = 0 if i == at or documents[i] != documents[i - 1] else place + 1
                    positions.append(place)
                end = at + length + 1
                rows.append((tokens[at:end], documents[at:end], positions, true[at:end]))
    return rows


def as_lists(rows: Rows, i: int) -> tuple[list[int], list[int], list[int]]:
    return rows.tokens[i].tolist(), rows.document_ids[i].tolist(), rows.positions[i].tolist()


lengths_strategy = st.lists(st.one_of(st.integers(1, 6), st.integers(1, 60)), min_size=2, max_size=40)


@given(
    lengths_strategy,
    st.integers(4, 50),
    st.integers(1, 3),
    st.integers(1, 17),
    st.sampled_from([300, 70_000]),
    st.integers(1, 4),
)
@settings(max_examples=20, deadline=None)
def test_rows_and_windows_equal_the_plain_cut(
    write_ids: Any,
    plain_stream: Any,
    lengths: list[int],
    chunk_tokens: int,
    shard_chunks: int,
    length: int,
    vocabulary: int,
    parts: int,
) -> None:
    texts = split(plain_stream(lengths, vocabulary), lengths, parts)
    targets = sum(max(0, len(tokens) - 1) for tokens, _, _ in texts)
    if not targets:
        return
    options = {"chunk_tokens": chunk_tokens, "shard_chunks": shard_chunks, "vocabulary": vocabulary, "parts": parts}
    with tempfile.TemporaryDirectory() as folder:
        path = write_ids(Path(folder) / "d", lengths, **options)
        check_windows(Windows(path, sequence_length=length), texts, length)
        expected = cut(texts, chunk_tokens, length)
        if not expected:
            with pytest.raises(DatasetError, match="no row"):
                TokenStream([stage(path)], sequence_length=length, seed=1)
            return
        stream = TokenStream([stage(path)], sequence_length=length, seed=1)
        n = len(expected)
        summary = stream.describe()[0]
        assert summary.samples_per_epoch == n
        assert summary.unread_tokens == targets - n * length
        for epoch in range(2):
            rows = stream.read(epoch * n, n)
            got = sorted(as_lists(rows, i) for i in range(n))
            assert got == sorted(row[:3] for row in expected)
            single = [len(set(row[1])) == 1 for row in expected]
            assert sorted(rows.single_document.tolist()) == sorted(single)


def check_windows(windows: Windows, texts: list[Text], length: int) -> None:
    rows = windows.read(0, len(windows) + 5)
    assert len(rows) == len(windows)
    scored = []
    for i in range(len(rows)):
        row_tokens, ids, positions = as_lists(rows, i)
        kept = ids.index(-1) if -1 in ids else length + 1
        assert kept >= 2, "a window without a target"
        assert set(ids[kept:]) <= {-1}
        assert not any(positions[kept:])
        scored += list(zip(row_tokens[1:kept], ids[1:kept], strict=True))
    assert scored == [pair for text in texts for pair in zip(text[0][1:], text[1][1:], strict=True)]


@given(lengths_strategy, st.integers(1, 4), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_contiguous_rows_continue_where_the_last_ended(
    write_ids: Any, plain_stream: Any, lengths: list[int], rows_per_chunk: int, length: int, slots: int, parts: int
) -> None:
    texts = split(plain_stream(lengths), lengths, parts)
    chunk_tokens = rows_per_chunk * length
    expected = cut(texts, chunk_tokens, length)
    if not any(len(tokens) > 1 for tokens, _, _ in texts):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = write_ids(Path(folder) / "d", lengths, chunk_tokens=chunk_tokens, parts=parts)
        options: dict[str, Any] = {"sequence_length": length, "seed": 1, "order": "contiguous", "slots": slots}
        if len(expected) < slots:
            with pytest.raises(DatasetError, match=r"no row|fewer than slots"):
                TokenStream([stage(path)], **options)
            return
        stream = TokenStream([stage(path)], **options)
        share = len(expected) // slots
        rows = stream.read(0, 2 * share * slots)
        for g in range(len(rows)):
            tokens, documents, _, true = expected[g % slots * share + g // slots % share]
            lap = g // slots // share
            assert as_lists(rows, g) == (tokens, [d + lap * len(lengths) for d in documents], true)
        for g in range(slots, len(rows)):  # a part's end is a document's end
            last, now = (expected[i % slots * share + i // slots % share] for i in (g - slots, g))
            goes_on = last[1][-1] == now[1][0] and last[3][-1] == now[3][0]
            assert (rows.document_ids[g - slots, -1] == rows.document_ids[g, 0]) == (goes_on and g // slots % share > 0)


def contiguous_stream(slots: int, *stages: StageSpec) -> TokenStream:
    return TokenStream(list(stages), **ONE, order="contiguous", slots=slots)


def test_contiguous_ids_are_equal_exactly_where_the_text_goes_on(
    write_ids: Any, plain_stream: Any, tmp_path: Path
) -> None:
    """Over wraps inside one huge document, other datasets, stages of one dataset, and a dataset that comes back."""
    slots, sizes = 2, {"a": [200], "b": [150], "c": [90, 70, 3]}
    paths = {name: write_ids(tmp_path / name, sizes[name], chunk_tokens=64, seed=ord(name)) for name in sizes}
    oracles = {name: plain_stream(sizes[name], seed=ord(name)) for name in sizes}
    shown = [("a", 0), ("b", 32), ("a", 36), ("a", 40), ("c", 64)]
    stream = contiguous_stream(slots, *(stage(paths[name], start=start) for name, start in shown))
    rows = stream.read(0, 120)
    drawn = dict.fromkeys(sizes, 0)
    before: dict[int, tuple[str, int, int]] = {}  # by slot: dataset, first token, last id
    first_lap, wraps, changes, goes_on = {}, 0, 0, 0
    for g in range(len(rows)):
        name = next(n for n, start in reversed(shown) if start <= g)
        share = (len(oracles[name][0]) - 1) // 8 // slots
        at = 8 * (g % slots * share + drawn[name] // slots % share)
        drawn[name] += 1
        assert rows.tokens[g].tolist() == oracles[name][0][at : at + 9]
        ids = rows.document_ids[g]
        assert np.diff(ids).tolist() == np.diff(oracles[name][1][at : at + 9]).tolist()
        assert first_lap.setdefault((name, at), ids[0]) <= ids[0] < 2**31
        if g >= slots:
            then, place, last = before[g % slots]
            continues = then == name and place + 8 == at
            # a row's last token is the next row's first
            assert (last == ids[0]) == continues, f"sample {g}: {then} {place} then {name} {at}"
            wraps += then == name and not continues
            changes += then != name
            goes_on += continues
        before[g % slots] = (name, at, ids[-1])
    assert (wraps > 4, changes, goes_on > 50) == (True, 3 * slots, True)
    for count in range(1, len(shown)):
        earlier = contiguous_stream(slots, *(stage(paths[name], start=start) for name, start in shown[:count]))
        assert equal(earlier.read(0, shown[count][1]), rows.slice(0, shown[count][1])), "a later stage changes no id"


def test_contiguous_ids_that_do_not_fit_are_refused(write_ids: Any, tmp_path: Path) -> None:
    path, other = (write_ids(tmp_path / name, [90], chunk_tokens=64, seed=ord(name)) for name in "ab")
    for documents, fits in [(2**30 - 1, True), (2**30, False)]:
        fields = json.loads((path / "dataset.json").read_text())
        del fields["fingerprint"]
        fields["parts"][0]["documents"] = documents
        manifest = make_manifest({**fields, "documents": documents})
        (path / "dataset.json").write_bytes(manifest.to_bytes())
        both = [stage(other), stage(path, start=4)]
        if fits:
            assert contiguous_stream(2, *both).read(4, 16).document_ids.max() == 2 + documents < 2**31
            continue
        with pytest.raises(DatasetError, match=r"2 datasets from .*hold 1073741825 documents, more than 1073741824"):
            contiguous_stream(2, *both)
        TokenStream(both, **ONE)


def test_cross_boundaries_gives_one_document_per_row(write_ids: Any, tmp_path: Path) -> None:
    path = write_ids(tmp_path / "d", [5, 3, 40, 2, 2, 30], chunk_tokens=30)
    crossed = TokenStream([stage(path)], **ONE, boundaries="cross").read(0, 7)
    isolated = TokenStream([stage(path)], **ONE).read(0, 7)
    assert np.array_equal(crossed.tokens, isolated.tokens)
    assert not crossed.document_ids.any()
    assert (crossed.positions == np.arange(9)).all()
    assert crossed.single_document.all()
    windows = Windows(path, sequence_length=8, boundaries="cross").read(0, 99)
    padding = Windows(path, sequence_length=8).read(0, 99).document_ids < 0
    assert padding.any()
    assert np.array_equal(windows.document_ids, np.where(padding, -1, 0))


@pytest.fixture(scope="module")
def three(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three datasets of different sizes."""
    folder = tmp_path_factory.mktemp("three")
    rng = np.random.default_rng(5)
    return [
        write_ids(folder / str(i), rng.integers(1, 40, 20 * (i + 1)).tolist(), chunk_tokens=64, seed=i)
        for i in range(3)
    ]


def equal(a: Rows, b: Rows) -> bool:
    fields = ("tokens", "document_ids", "positions", "samples", "source")
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in fields)


def test_padding_of_held_out_windows_has_no_place_in_a_text(write_ids: Any, tmp_path: Path) -> None:
    windows = Windows(write_ids(tmp_path / "d", [20], chunk_tokens=64), sequence_length=8, boundaries="cross")
    rows = windows.read(0, 3)  # 19 targets: the last window holds three
    assert rows.document_ids.tolist() == [[0] * 9, [0] * 9, [0] * 4 + [-1] * 5]
    assert rows.positions.tolist() == [list(range(9)), list(range(9)), [0, 1, 2, 3, 0, 0, 0, 0, 0]]


def test_rows_are_a_function_of_the_sample_alone(three: list[Path]) -> None:
    stages = [stage(SourceSpec(three[0], 1.0), SourceSpec(three[1], 2.5)), stage(three[1], three[2], start=70_003)]
    stream = TokenStream(stages, **ONE)
    whole = stream.read(65_000, 6000)  # crosses a mixture block and a stage
    again = TokenStream(stages, **ONE)
    some = np.random.default_rng(0).permutation(6000)[:800]
    picked = again.rows(65_000 + some)
    assert np.array_equal(picked.tokens, whole.tokens[some])
    assert np.array_equal(picked.source, whole.source[some])
    assert np.array_equal(picked.samples, 65_000 + some)
    assert equal(stream.read(66_001, 97), whole.slice(1001, 1098))
    assert stream.read(10**12, 2).tokens.shape == (2, 9)
    other_seed = TokenStream(stages, sequence_length=8, seed=4).read(65_000, 6000)
    assert not np.array_equal(other_seed.tokens, whole.tokens)


def test_a_later_stage_changes_nothing_before_it(three: list[Path]) -> None:
    first = stage(SourceSpec(three[0], 1.0), SourceSpec(three[1], 3.0))
    alone = TokenStream([first], **ONE)
    staged = TokenStream([first, stage(three[2], start=500), stage(three[0], start=900)], **ONE)
    assert equal(alone.read(0, 500), staged.read(0, 500))
    later = staged.read(500, 400)
    assert set(later.source.tolist()) == {2}
    assert alone.fingerprint(500) == staged.fingerprint(500)
    assert alone.fingerprint(501) != staged.fingerprint(501)


def test_a_source_goes_on_where_an_earlier_stage_left_it(three: list[Path]) -> None:
    """Over both stages every row of the shared source comes once before any comes twice."""
    stages = [stage(SourceSpec(three[2], 1.0), SourceSpec(three[0], 1.0)), stage(three[2], start=60)]
    stream = TokenStream(stages, **ONE)
    n = stream.describe()[0].samples_per_epoch
    rows = stream.read(0, 400)
    of_shared = [tuple(row) for row in rows.tokens[rows.source == 0].tolist()]
    assert 20 < (rows.source[:60] == 0).sum() < 40
    assert len(of_shared) > 2 * n
    whole = sorted(of_shared[:n])
    assert len(set(whole)) == n
    assert sorted(of_shared[n : 2 * n]) == whole


def test_equal_content_is_one_source_wherever_it_lies(three: list[Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(three[2], tmp_path / "copy"))
    here = TokenStream([stage(three[2]), stage(three[2], start=40)], **ONE)
    moved = TokenStream([stage(copy), stage(three[2], start=40)], **ONE)
    assert equal(here.read(0, 300), moved.read(0, 300))
    assert here.fingerprint(41) == moved.fingerprint(41)
    with pytest.raises(MixtureError, match="twice"):
        TokenStream([stage(copy, three[2])], **ONE)


def test_sources_of_equal_size_are_read_in_different_orders(write_ids: Any, tmp_path: Path) -> None:
    twins = [write_ids(tmp_path / str(seed), [8 * 16 + 1], chunk_tokens=256, seed=seed) for seed in (0, 1)]
    orders = []
    for path in twins:
        rows = TokenStream([stage(path)], **ONE).read(0, 16).tokens
        along = {tuple(row): i for i, row in enumerate(Windows(path, sequence_length=8).read(0, 16).tokens.tolist())}
        orders.append([along[tuple(row)] for row in rows.tolist()])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(16))
    assert orders[0] != orders[1]


def test_every_seed_and_every_stage_mixes_in_an_order_of_its_own(three: list[Path]) -> None:
    def sources(seed: int) -> np.ndarray:
        stages = [stage(*three[:2]), stage(*three[:2], start=1000)]
        return TokenStream(stages, sequence_length=8, seed=seed).read(0, 2000).source

    one, other = sources(3), sources(4)
    for a, b in [(one, other), (one[:1000], one[1000:])]:
        assert 0.4 < np.mean(a == b) < 0.6  # 1,000 fair coins stray so far once in 10^9 seeds; these are fixed


def test_weights_are_kept(three: list[Path]) -> None:
    specs = [SourceSpec(path, weight) for path, weight in zip(three, (0.5, 1.5, 2.0), strict=True)]
    source = TokenStream([stage(*specs)], **ONE).read(0, 65_536).source
    assert np.bincount(source).tolist() == [8192, 24576, 32768]


PINNED = {"shuffled": "c4605f613c83ef8b", "window": "ebde82d7ff234aeb", "contiguous": "53c1d1eebe8e0b45"}


@pytest.mark.parametrize("order", PINNED)
def test_the_rows_of_this_state_version_stay_what_they_are(write_ids: Any, tmp_path: Path, order: str) -> None:
    """A checkpoint's fingerprint cannot see how samples are turned into rows. Whoever changes that, so that other rows
    come, must raise STATE_VERSION with these, or old runs go on with other data without a word."""
    paths = [write_ids(tmp_path / str(i), [9, 40, 3, 25] * 20, chunk_tokens=64, seed=i, parts=2) for i in range(2)]
    a, b = (SourceSpec(path, 1.0 + i) for i, path in enumerate(paths))
    options: dict[str, Any] = {"window": {"window": 3}, "contiguous": {"slots": 4}}.get(order, {})
    mixed = [stage(a, b), stage(b, a, start=4000)]
    stages = [stage(a), stage(b, start=4000)] if order == "contiguous" else mixed
    stream = TokenStream(stages, **ONE, order=order, **options)
    samples = np.concatenate([np.arange(300), 3900 + np.arange(300), 10**12 + np.arange(300)])
    rows, digest = stream.rows(samples), hashlib.sha256()
    for values in (rows.tokens, rows.document_ids, rows.positions, rows.source):
        digest.update(np.ascontiguousarray(values).astype("<i4").tobytes())
    assert (STATE_VERSION, digest.hexdigest()[:16]) == (2, PINNED[order])


def test_fingerprint_covers_what_decides_the_data_and_nothing_else(three: list[Path]) -> None:
    def made(*, path: Path = three[0], **change: Any) -> str:
        return TokenStream([stage(path)], **{**ONE, **change}).fingerprint(10)

    base = made()
    different = [
        made(seed=4),
        made(sequence_length=9),
        made(boundaries="cross"),
        made(order="contiguous", slots=2),
        made(order="contiguous", slots=3),
        made(path=three[1]),
    ]
    assert len({base, *different}) == 7
    weighted = [stage(SourceSpec(three[0], w), SourceSpec(three[1], 1.0, name=f"n{w}")) for w in (1.0, 2.0)]
    doubled = stage(SourceSpec(three[0], 2.0, name="x"), SourceSpec(three[1], 2.0))
    prints = [TokenStream([s], **ONE).fingerprint(1) for s in (*weighted, doubled)]
    assert prints[0] == prints[2] != prints[1]
    stream = TokenStream([stage(three[0])], **ONE)
    assert stream.fingerprint(0) == TokenStream([stage(three[1])], **ONE).fingerprint(0)  # no stage has begun
    assert stream.fingerprint(1) == stream.fingerprint(10**9)


def test_state_is_small_plain_and_checked(three: list[Path]) -> None:
    stream = TokenStream([stage(three[0])], **ONE)
    state = json.loads(json.dumps(stream.state_dict(48)))
    assert set(state) == {"version", "fingerprint", "next_sample"}
    assert stream.check_state(state) == 48
    other = TokenStream([stage(three[1])], sequence_length=8, seed=9)
    with pytest.raises(StateMismatchError, match="in: seed, stages") as caught:
        other.check_state(state)
    assert state["fingerprint"] in str(caught.value)
    assert other.fingerprint(48) in str(caught.value)
    for broken in ({"version": 1}, {"next_sample": -1, "fingerprint": stream.fingerprint(-1)}, {"next_sample": "48"}):
        with pytest.raises(StateMismatchError, match="is not of version 2 with a next_sample"):
            stream.check_state({**state, **broken})


def test_bad_arguments_are_refused_before_the_first_row(three: list[Path], write_ids: Any, tmp_path: Path) -> None:
    for match, stages, change in [
        ("sequence_length 0", [stage(three[0])], {"sequence_length": 0}),
        ("order 'random'", [stage(three[0])], {"order": "random"}),
        ("boundaries 'none'", [stage(three[0])], {"boundaries": "none"}),
        ("slots None", [stage(three[0])], {"order": "contiguous"}),
        (
            "order contiguous with boundaries cross.*use boundaries isolate, or order shuffled",
            [stage(three[0])],
            {"order": "contiguous", "slots": 2, "boundaries": "cross"},
        ),
        ("it takes no slots", [stage(three[0])], {"slots": 2}),
        (r"start at \[\]", [], {}),
        (r"start at \[5\]", [stage(three[0], start=5)], {}),
        (r"start at \[0, 0\]", [stage(three[0]), stage(three[1])], {}),
        ("multiples of slots", [stage(three[0]), stage(three[1], start=5)], {"order": "contiguous", "slots": 2}),
        ("reads one", [stage(three[0], three[1])], {"order": "contiguous", "slots": 2}),
        ("not a positive", [stage(SourceSpec(three[0], -1.0, name="web"))], {}),
        ("at least one", [StageSpec(0, ())], {}),
    ]:
        with pytest.raises(MixtureError, match=match):
            TokenStream(stages, **{**ONE, **change})
    with pytest.raises(DatasetError, match="does not divide"):
        TokenStream([stage(three[0])], sequence_length=7, seed=0, order="contiguous", slots=2)
    short = write_ids(tmp_path / "short", [30, 30, 30], chunk_tokens=64, parts=3)  # one chunk a part: none goes on
    TokenStream([stage(short)], sequence_length=7, seed=0, order="contiguous", slots=2)
    with pytest.raises(DatasetError, match=r"vocabulary ends at 99.*at least \d+"):
        TokenStream([stage(three[0])], **ONE, vocabulary=100)
    with pytest.raises(TokenizerMismatchError, match="prepared with tokenizer tttt"):
        TokenStream([stage(three[0])], **ONE, tokenizer_sha256="u" * 64)
    alien = write_ids(tmp_path / "alien", [9, 9, 9], chunk_tokens=16, tokenizer_sha256="u" * 64)
    with pytest.raises(TokenizerMismatchError, match="different tokenizers"):
        TokenStream([stage(three[0], alien)], **ONE)
    with pytest.raises(ValueError, match="negative"):
        TokenStream([stage(three[0])], **ONE).rows(np.array([-1]))
