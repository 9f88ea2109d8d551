"""Skipped samples against a list of all samples with some struck out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from potamos.data.errors import MixtureError, StateMismatchError
from potamos.data.loader import Loader, Rows, SourceSpec, StageSpec, TokenStream
from potamos.data.skips import SkipList

LIMIT = 200
bounds = st.tuples(st.integers(0, LIMIT), st.integers(1, 25)).map(lambda pair: [pair[0], pair[0] + pair[1]])
ranges = st.lists(bounds, max_size=8)
ONE: dict[str, Any] = {"sequence_length": 8, "seed": 3}


def kept_of(skip: list[list[int]]) -> list[int]:
    """All samples that are not skipped, far beyond the last range."""
    return [sample for sample in range(3 * LIMIT) if not any(a <= sample < b for a, b in skip)]


@given(ranges, st.integers(0, LIMIT + 50), st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_skipping_is_striking_samples_from_a_list(skip: list[list[int]], first: int, count: int) -> None:
    skips = SkipList(skip)
    expected = [sample for sample in kept_of(skip) if sample >= first][:count]
    assert skips.samples(first, count).tolist() == expected
    after = skips.after(first, count)
    assert after == (expected[-1] + 1 if expected else first)
    runs = skips.runs(first, after)
    assert [sample for begin, end in runs for sample in range(begin, end)] == expected
    assert all(begin < end for begin, end in runs)
    assert all(a < b for (_, a), (b, _) in itertools.pairwise(runs)), "runs that touch are one"
    struck = [sample for begin, end in skips.before(first) for sample in range(begin, end)]
    assert struck == sorted(set(range(first)) - set(kept_of(skip)))
    assert bool(skips) == bool(skip)


@given(ranges, st.integers(0, LIMIT), st.integers(0, 40), st.integers(0, 40))
@settings(max_examples=100, deadline=None)
def test_two_steps_are_one_long_one(skip: list[list[int]], first: int, count: int, more: int) -> None:
    skips = SkipList(skip)
    assert skips.after(skips.after(first, count), more) == skips.after(first, count + more)


def test_ranges_are_put_in_order_and_joined() -> None:
    assert SkipList([[9, 12], [0, 3], [2, 5], [5, 6], [20, 21], [9, 10]]).ranges == ((0, 6), (9, 12), (20, 21))
    assert SkipList().samples(5, 3).tolist() == [5, 6, 7]
    far = SkipList([[10**12, 10**12 + 5]])
    assert far.samples(10**12 - 2, 4).tolist() == [10**12 - 2, 10**12 - 1, 10**12 + 5, 10**12 + 6]


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ([[5, 5]], r"skip range 0 is \[5, 5\]; it needs 0 <= first < end"),
        ([[0, 4], [9, 7]], r"skip range 1 is \[9, 7\]"),
        ([[-3, 7]], r"skip range 0 is \[-3, 7\]"),
        ([[1, 2, 3]], r"skip range 0 is \[1, 2, 3\]; write two whole numbers"),
        ([[1.0, 2]], r"skip range 0 is \[1.0, 2\]; write two whole numbers"),
        ([[True, 2]], "write two whole numbers"),
        ([[0, 2**62]], "it needs 0 <= first < end"),
    ],
)
def test_bad_skip_ranges_are_refused_by_number(bad: Any, match: str) -> None:
    with pytest.raises(MixtureError, match=match):
        SkipList(bad)


@pytest.fixture(scope="module")
def two(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("skip")
    rng = np.random.default_rng(8)
    return [
        write_ids(folder / str(i), rng.integers(1, 40, 30 * (i + 1)).tolist(), chunk_tokens=64, seed=i, parts=i + 1)
        for i in range(2)
    ]


def mixed(paths: list[Path], **options: Any) -> TokenStream:
    sources = tuple(SourceSpec(path, 1.0 + i) for i, path in enumerate(paths))
    return TokenStream([StageSpec(0, sources), StageSpec(90, sources[:1])], **{**ONE, **options})


def equal(a: Rows, b: Rows) -> bool:
    fields = ("tokens", "document_ids", "positions", "samples", "source")
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in fields)


@pytest.mark.parametrize("options", [{}, {"order": "window", "window": 2}])
@given(ranges, st.integers(0, LIMIT), st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_rows_not_skipped_are_what_they_were(
    two: list[Path], options: dict[str, Any], skip: list[list[int]], first: int, count: int
) -> None:
    plain, skipping = mixed(two, **options), mixed(two, skip=skip, **options)
    expected = [sample for sample in kept_of(skip) if sample >= first][:count]
    assert skipping.samples(first, count).tolist() == expected
    assert equal(skipping.read(first, count), plain.rows(np.array(expected)))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_the_loader_hands_out_what_is_not_skipped(two: list[Path], world: int) -> None:
    skip = [[5, 9], [12, 13], [36, 90], [100, 101]]
    stream = mixed(two, skip=skip)
    expected = kept_of(skip)
    steps, places = [], []
    for rank in range(world):
        with Loader(stream, sequences=12, rank=rank, world=world) as loader:
            batches = []
            place = [0]
            for rows in itertools.islice(loader, 7):
                batches.append(rows)
                place.append(loader.next_sample)
        steps.append(batches)
        places.append(place)
    assert all(place == places[0] for place in places), "ranks come to the same place"
    got = [sample for step in zip(*steps, strict=True) for rows in step for sample in rows.samples.tolist()]
    assert got == expected[: 7 * 12]
    assert places[0] == [0, *(expected[12 * step - 1] + 1 for step in range(1, 8))]
    # going on from any of these places gives the batches that followed it
    for step, place in enumerate(places[0][:-1]):
        with Loader(stream, sequences=12, next_sample=place) as loader:
            assert next(loader).samples.tolist() == expected[12 * step : 12 * step + 12]


def test_a_range_may_be_added_ahead_and_none_changed_behind(two: list[Path]) -> None:
    """Equal fingerprints exactly where the samples before are the same."""

    def check(was: list[list[int]], now: list[list[int]], sample: int) -> None:
        assert mixed(two, skip=now).check_state(mixed(two, skip=was).state_dict(sample)) == sample

    check([], [[50, 60]], 50)
    check([[10, 20]], [[50, 60], [10, 20]], 50)
    check([[10, 20]], [[10, 15], [15, 20]], 30)  # the same samples, written otherwise
    check([[10, 20]], [[10, 20], [20, 25]], 20)  # touches what is behind
    check([[60, 70]], [], 60)  # taken away before it began
    for was, now in [
        ([], [[10, 20]]),
        ([], [[49, 60]]),
        ([[10, 20]], []),
        ([[10, 20]], [[10, 21]]),
        ([[10, 20]], [[11, 20]]),
        ([[10, 20]], [[10, 20], [30, 31]]),
    ]:
        with pytest.raises(StateMismatchError, match=r"in: skip \(.*only samples from 50 on can still be skipped"):
            check(was, now, 50)


def test_the_place_after_a_batch_lies_before_the_next_range(two: list[Path]) -> None:
    """So that a range beginning just there has not begun, and may still be taken out again."""
    stream = mixed(two, skip=[[24, 48]])
    with Loader(stream, sequences=12) as loader:
        assert [next(loader).samples[0] for _ in range(2)] == [0, 12]
        assert loader.next_sample == 24
        state = loader.state_dict()
        assert next(loader).samples.tolist() == list(range(48, 60))
    assert mixed(two).check_state(state) == 24


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=5),
    st.lists(st.integers(1, 70), min_size=3, max_size=14),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
)
@example(skip=[(1, 6)], lengths=[1, 1, 42], slots=3, parts=1, interlude=False)  # a whole lap: the text goes on
@example(skip=[(3, 15)], lengths=[1, 1, 42], slots=3, parts=1, interlude=False)
@example(skip=[(6, 6)], lengths=[1, 1, 42], slots=3, parts=1, interlude=False)  # a lap from its beginning to its end
@example(skip=[(6, 12)], lengths=[1, 1, 42], slots=3, parts=1, interlude=False)
@example(skip=[(6, 3)], lengths=[1, 1, 42], slots=3, parts=1, interlude=False)  # from where a lap begins
@example(skip=[(8, 8)], lengths=[60, 60, 60], slots=2, parts=1, interlude=True)  # all of what lies between
@settings(max_examples=25, deadline=None)
def test_contiguous_ids_with_skips_are_equal_exactly_where_the_text_goes_on(
    write_ids: Any,
    tmp_path_factory: pytest.TempPathFactory,
    skip: list[tuple[int, int]],
    lengths: list[int],
    slots: int,
    parts: int,
    interlude: bool,
) -> None:
    """Over laps, parts, skips, skips that hold laps, and a dataset in between; one document may be the whole text."""
    lengths = [lengths[0] + 100, *lengths]
    folder = tmp_path_factory.mktemp("c")
    path = write_ids(folder / "a", lengths, chunk_tokens=16, parts=parts)
    other = write_ids(folder / "b", [90], chunk_tokens=16, seed=1)
    stages = [StageSpec(0, (SourceSpec(path),))]
    if interlude:
        stages += [StageSpec(10 * slots, (SourceSpec(other),)), StageSpec(14 * slots, (SourceSpec(path),))]
    struck = [[a * slots, (a + n) * slots] for a, n in skip]
    options: dict[str, Any] = {**ONE, "order": "contiguous", "slots": slots}
    stream = TokenStream(stages, **options, skip=struck)
    rows = stream.read(0, 80 * slots)
    assert len(np.unique(rows.samples % slots)) == slots
    plain = TokenStream(stages, **options).rows(rows.samples)
    assert np.array_equal(rows.tokens, plain.tokens)
    assert np.array_equal(rows.positions, plain.positions)
    where = text_places(lengths, parts)
    before: dict[int, tuple[int, tuple[int, int] | None, int]] = {}
    for g in range(len(rows)):
        slot, ids = int(rows.samples[g]) % slots, rows.document_ids[g]
        place = where[tuple(rows.tokens[g].tolist())] if rows.source[g] == 0 else None
        assert np.array_equal(np.diff(ids), np.diff(plain.document_ids[g]))
        if slot in before and place is not None:
            source, last_place, last_id = before[slot]
            goes_on = source == 0 and last_place is not None and last_place == (place[0], place[1] - 8)
            assert (last_id == ids[0]) == goes_on, f"row {g}, sample {rows.samples[g]}"
        if slot in before and before[slot][0] != rows.source[g]:
            assert before[slot][2] != ids[0]
        before[slot] = (int(rows.source[g]), place, int(ids[-1]))


def text_places(lengths: list[int], parts: int) -> dict[tuple[int, ...], tuple[int, int]]:
    """Part and first token of every row, found by its tokens."""
    rng = np.random.default_rng(0)
    places: dict[tuple[int, ...], tuple[int, int]] = {}
    for part in range(parts):
        mine = lengths[part * len(lengths) // parts : (part + 1) * len(lengths) // parts]
        text = [t for length in mine for t in [*rng.integers(1, 300, length - 1).tolist(), 0]]
        for at in range(0, len(text) - 8, 8):
            assert places.setdefault(tuple(text[at : at + 9]), (part, at)) == (part, at)
    return places


def test_contiguous_skips_need_multiples_of_slots(two: list[Path]) -> None:
    with pytest.raises(MixtureError, match=r"skip ranges \[\[4, 6\]\]: contiguous order needs multiples of slots 4"):
        TokenStream([StageSpec(0, (SourceSpec(two[0]),))], **ONE, order="contiguous", slots=4, skip=[[4, 6]])
