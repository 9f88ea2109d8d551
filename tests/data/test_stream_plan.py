"""Plans of runs against counting the rows that the run reads."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data.loader import Loader, SourceSpec, StageSpec, TokenStream
from potamos.data.order import BLOCK

LENGTH = 8


@pytest.fixture(scope="module")
def three(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("plan")
    rng = np.random.default_rng(5)
    return [
        write_ids(folder / str(i), rng.integers(1, 40, 20 * (i + 1)).tolist(), chunk_tokens=60, seed=i, parts=i + 1)
        for i in range(3)
    ]


def staged(paths: list[Path], second: int, **options: Any) -> TokenStream:
    """Two stages that share a source, and a third with it alone."""
    a, b, c = paths
    stages = [
        StageSpec(0, (SourceSpec(a, 1.0, "a"), SourceSpec(b, 2.5, "b"))),
        StageSpec(second, (SourceSpec(b, 1.0, "b"), SourceSpec(c, 0.1, "c"))),
        StageSpec(second + 200, (SourceSpec(b, 3.0, "again"),)),
    ]
    return TokenStream(stages, sequence_length=LENGTH, seed=3, **options)


def counted(stream: TokenStream, starts: list[int], samples: int, start: int) -> Counter[tuple[int, str]]:
    """(stage, dataset) of every row that a run reads."""
    found: Counter[tuple[int, str]] = Counter()
    rows = stream.rows(stream.samples(start, samples))
    for sample, source in zip(rows.samples.tolist(), rows.source.tolist(), strict=True):
        found[sum(begin <= sample for begin in starts) - 1, str(stream.datasets[source].path)] += 1
    return found


skips = st.lists(st.tuples(st.integers(0, 900), st.integers(1, 200)).map(lambda r: [r[0], sum(r)]), max_size=4)


@given(st.integers(1, 400), st.integers(0, 700), st.integers(0, 900), skips, st.sampled_from(["shuffled", "window"]))
@settings(max_examples=40, deadline=None)
def test_a_plan_is_what_the_run_reads(
    three: list[Path], second: int, samples: int, start: int, skip: list[list[int]], order: str
) -> None:
    stream = staged(three, second, skip=skip, order=order, window=2 if order == "window" else None)
    starts = [0, second, second + 200]
    plan = stream.plan(samples, start)
    expected = counted(stream, starts, samples, start)
    assert {(p.stage, str(p.path)): p.samples for p in plan if p.samples} == expected
    assert [(p.stage, p.name) for p in plan] == [(0, "a"), (0, "b"), (1, "b"), (1, "c"), (2, "again")]
    assert sum(p.samples for p in plan) == samples
    for p in plan:
        assert p.tokens == LENGTH * p.samples
        assert p.epochs == p.samples / p.samples_per_epoch
    unskipped = staged(three, second)
    for p in plan:  # rows passed over count as gone through
        begin = min(max(start, starts[p.stage]), starts[p.stage + 1] if p.stage < 2 else 10**9)
        gone = sum(unskipped.rows(np.arange(begin)).source == index_of(unskipped, p.path)) if begin else 0
        assert p.epochs_before == pytest.approx(gone / p.samples_per_epoch, abs=1e-12)


def index_of(stream: TokenStream, path: Path) -> int:
    return next(i for i, dataset in enumerate(stream.datasets) if dataset.path == path)


def test_plans_over_mixture_blocks(three: list[Path]) -> None:
    stream = staged(three, BLOCK + 77, skip=[[100, 165], [BLOCK - 3, BLOCK + 9]])
    for samples, start in [(BLOCK + 200, 0), (BLOCK, 50), (3, BLOCK - 5)]:
        expected = counted(stream, [0, BLOCK + 77, BLOCK + 277], samples, start)
        assert {(p.stage, str(p.path)): p.samples for p in stream.plan(samples, start) if p.samples} == expected


def test_a_plan_of_a_long_run_adds_up(three: list[Path]) -> None:
    stream = staged(three, 10**9, skip=[[5, 10**6]])
    plan = stream.plan(10**10, 12345)
    whole = 1 / (2.5 + 1)
    assert sum(p.samples for p in plan) == 10**10
    assert abs(plan[0].samples - whole * (10**9 - 10**6)) < 300  # within a block of the mixture
    pieces = [stream.plan(10**9, start) for start in itertools.accumulate([10**9] * 2, initial=10**6)]
    joined = stream.plan(3 * 10**9, 10**6)
    for number, entry in enumerate(joined):
        assert entry.samples == sum(piece[number].samples for piece in pieces)


def test_a_plan_tells_what_no_row_reads(three: list[Path], write_ids: Any, tmp_path: Path) -> None:
    """Rows of an epoch and what is left at the ends of chunks and parts are all targets of the dataset."""
    for entry in staged(three, 500).plan(10):
        stream = TokenStream([StageSpec(0, (SourceSpec(entry.path),))], sequence_length=1, seed=0)
        targets = stream.plan(0)[0].samples_per_epoch
        assert entry.samples_per_epoch * LENGTH + entry.unread_tokens == targets
        assert entry.unread_tokens > 0
    # 3 parts of one chunk each: (40 - 1) % 8 targets are left in each
    path = write_ids(tmp_path / "d", [40, 40, 40], chunk_tokens=64, parts=3)
    (entry,) = TokenStream([StageSpec(0, (SourceSpec(path),))], sequence_length=LENGTH, seed=0).plan(30)
    assert (entry.samples_per_epoch, entry.unread_tokens, entry.epochs, entry.tokens) == (12, 21, 2.5, 240)


def test_a_contiguous_plan_counts_only_what_slots_walk(write_ids: Any, tmp_path: Path) -> None:
    path = write_ids(tmp_path / "d", [8 * 14 + 1], chunk_tokens=64)
    stream = TokenStream(
        [StageSpec(0, (SourceSpec(path),))], sequence_length=LENGTH, seed=0, order="contiguous", slots=3, skip=[[3, 9]]
    )
    (entry,) = stream.plan(24)
    assert (entry.samples, entry.samples_per_epoch, entry.epochs, entry.unread_tokens) == (24, 12, 2.0, 16)
    with Loader(stream, sequences=6) as loader:
        list(itertools.islice(loader, 4))
        assert stream.plan(6, loader.next_sample)[0].epochs_before == 30 / 12


def test_plans_of_less_than_nothing_are_refused(three: list[Path]) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        staged(three, 5).plan(-1)
    assert all(p.samples == 0 for p in staged(three, 5).plan(0, 99))
