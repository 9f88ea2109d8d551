"""The loader: equal global batches for every world, exact resume, failures that surface, a thread that ends."""

from __future__ import annotations

import collections
import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data.errors import CorruptShardError, DatasetError, MixtureError
from potamos.data.loader import Loader, Rows, SourceSpec, StageSpec, TokenStream
from potamos.data.stream import PLAN


@pytest.fixture(scope="module")
def paths(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(1)
    return [
        write_ids(folder / str(i), rng.integers(1, 90, 300).tolist(), chunk_tokens=512, seed=i, parts=1 + i)
        for i in range(2)
    ]


@pytest.fixture(scope="module")
def stream(paths: list[Path]) -> TokenStream:
    sources = tuple(SourceSpec(path, 1.0 + i) for i, path in enumerate(paths))
    return TokenStream([StageSpec(0, sources)], sequence_length=32, seed=11)


ORDERS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "window": {"order": "window", "window": 4},
    "contiguous": {"order": "contiguous", "slots": 4},
}


def staged(paths: list[Path], order: str, **options: Any) -> TokenStream:
    """A stream whose second stage begins at sample 336."""
    a, b = (SourceSpec(path) for path in paths)
    stages = [StageSpec(0, (a,) if order == "contiguous" else (a, b)), StageSpec(336, (b,))]
    return TokenStream(stages, sequence_length=32, seed=11, **ORDERS[order], **options)


FIELDS = ("tokens", "document_ids", "positions", "samples", "source")


def global_batches(
    stream: TokenStream, world: int, count: int, next_sample: int = 0, sequences: int = 16
) -> list[list[np.ndarray]]:
    """Global batches put together from every rank's own loader: tokens, ids, positions, samples, source."""
    ranks: list[list[Rows]] = []
    for rank in range(world):
        with Loader(stream, sequences=sequences, rank=rank, world=world, next_sample=next_sample) as loader:
            ranks.append(list(itertools.islice(loader, count)))
    return [
        [np.concatenate([getattr(rows, field) for rows in step]) for field in FIELDS]
        for step in zip(*ranks, strict=True)
    ]


def same(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


def joined(steps: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [np.concatenate(field) for field in zip(*steps, strict=True)]


def equal(rows: Rows, other: Rows) -> bool:
    return all(np.array_equal(getattr(rows, field), getattr(other, field)) for field in FIELDS)


@pytest.mark.parametrize("order", ORDERS)
def test_global_batches_are_equal_for_every_world_from_1_to_16(paths: list[Path], order: str) -> None:
    """Batches of 48 and 80 and 144 cut by all their divisors to 16; worlds that divide none of them read the same
    samples in batches that they can cut."""
    stream = staged(paths, order)
    whole = stream.rows(np.arange(700))
    covered = set()
    for sequences in (48, 80, 144):
        one = global_batches(stream, 1, 3, 192, sequences)
        assert one[1][3].tolist() == list(range(192 + sequences, 192 + 2 * sequences))
        assert same([joined(one)], [[getattr(whole, f)[192 : 192 + 3 * sequences] for f in FIELDS]])
        for world in (w for w in range(2, 17) if sequences % w == 0):
            assert same(one, global_batches(stream, world, 3, 192, sequences)), f"{sequences} over {world}"
            covered.add(world)
    for world in sorted(set(range(2, 17)) - covered):
        got = joined(global_batches(stream, world, 4, 192, 4 * world))
        assert same([got], [[getattr(whole, f)[192 : 192 + 16 * world] for f in FIELDS]]), f"{world}"


schedules = st.lists(st.tuples(st.integers(1, 16), st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=6)


@pytest.mark.parametrize("order", ORDERS)
@given(schedules, st.sampled_from([(), ([40, 64], [328, 340])]))
@settings(max_examples=8, deadline=None)
def test_the_samples_read_do_not_depend_on_world_and_batch_size(
    paths: list[Path], order: str, schedule: list[tuple[int, int, int]], skip: tuple[list[int], ...]
) -> None:
    """Runs of some steps each, with another world and batch size after each resume, across a change of stage."""
    stream = staged(paths, order, skip=skip)
    steps, state = [], stream.state_dict(0)
    for world, share, count in schedule:
        resumed = staged(paths, order, skip=skip)
        place = resumed.check_state(json.loads(json.dumps(state)))
        steps += global_batches(resumed, world, count, place, 4 * world * share)
        state = resumed.state_dict(stream.after(place, count * 4 * world * share))
    if steps:
        read = joined(steps)
        assert read[3].tolist() == stream.samples(0, len(read[3])).tolist()
        assert same([read], [[getattr(stream.read(0, len(read[3])), field) for field in FIELDS]])


def test_peers_of_one_data_rank_get_equal_batches(paths: list[Path]) -> None:
    """Tensor, pipeline, sequence and expert peers: loaders of processes of their own, in any order of calls."""
    for order in ORDERS:
        peers = [
            Loader(staged(paths, order), sequences=24, rank=1, world=3, next_sample=240, ahead=ahead)
            for ahead in (1, 2, 5)
        ]
        batches: list[list[Rows]] = [[] for _ in peers]
        for peer in (0, 1, 1, 2, 0, 2, 2, 1, 0, 1, 2, 0):
            batches[peer].append(next(peers[peer]))
        for loader in peers:
            loader.close()
        for step in zip(*batches, strict=True):
            assert step[0].samples.tolist() == list(range(step[0].samples[0], step[0].samples[0] + 8))
            assert all(equal(step[0], rows) for rows in step[1:])


def test_one_shard_feeds_a_thousand_ranks(write_ids: Any, tmp_path: Path) -> None:
    path = write_ids(tmp_path / "d", [60] * 140, chunk_tokens=10_000)
    stream = TokenStream([StageSpec(0, (SourceSpec(path),))], sequence_length=8, seed=0)
    assert len(stream.datasets[0].manifest.shards) == 1
    rows = []
    for rank in range(1000):
        with Loader(stream, sequences=1000, rank=rank, world=1000, next_sample=2000) as loader:
            rows.append(next(loader))
    whole = stream.read(2000, 1000)
    assert np.array_equal(np.concatenate([r.tokens for r in rows]), whole.tokens)
    assert np.concatenate([r.samples for r in rows]).tolist() == list(range(2000, 3000))


def test_a_shard_missing_at_the_start_is_found_before_any_row(write_ids: Any, tmp_path: Path) -> None:
    """By every rank, whatever it would have read first."""
    path = write_ids(tmp_path / "d", [60] * 140, chunk_tokens=512, shard_chunks=1)
    (path / "shard-00000-00011.tar").unlink()
    with pytest.raises(CorruptShardError, match=r"shard-00000-00011\.tar is missing, expected \d+ bytes"):
        TokenStream([StageSpec(0, (SourceSpec(path),))], sequence_length=8, seed=0)


def test_a_shard_left_out_is_left_out_for_all_and_part_of_the_fingerprint(write_ids: Any, tmp_path: Path) -> None:
    path = write_ids(tmp_path / "d", [60] * 140, chunk_tokens=512, shard_chunks=1)
    stages = [StageSpec(0, (SourceSpec(path),))]
    options: dict[str, Any] = {"sequence_length": 8, "seed": 0, "on_bad_shard": "skip"}
    whole = TokenStream(stages, **options)
    shard = path / "shard-00000-00011.tar"
    shard.write_bytes(shard.read_bytes()[:-100])
    for order in ("shuffled", "window"):
        stream = TokenStream(stages, **options, **ORDERS[order])
        assert stream.datasets[0].dropped == ("shard-00000-00011.tar",)
        n = stream.describe()[0].samples_per_epoch
        assert n == whole.describe()[0].samples_per_epoch - 512 // 8
        assert stream.fingerprint(1) != TokenStream(stages, **options, **ORDERS[order]).fingerprint(0)
        steps = global_batches(stream, 4, 2, 0, n - n % 4)
        assert same(steps, global_batches(stream, 1, 2, 0, n - n % 4))
        kept = {tuple(row) for row in stream.read(0, n).tokens.tolist()}
        assert len(kept) == n
    assert stream.fingerprint(1) != whole.fingerprint(1)
    with pytest.raises(DatasetError, match=r"read without shard-00000-00011\.tar.*mend the shards"):
        TokenStream(stages, **options, **ORDERS["contiguous"])


def test_a_dataset_smaller_than_one_global_batch_is_refused_with_both_numbers(stream: TokenStream) -> None:
    rows = min(s.samples_per_epoch / s.share for s in stream.describe())
    with pytest.raises(DatasetError, match=r"has \d+ rows of 32 tokens, a batch of \d+ needs \d+.* allow repeats"):
        Loader(stream, sequences=int(rows) + 1)
    with Loader(stream, sequences=int(rows) + 1, allow_repeat=True) as loader:
        assert len(next(loader)) == int(rows) + 1


def test_a_source_that_is_not_there_is_refused_by_its_path(paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"elsewhere holds no dataset\.json: it is no finished dataset"):
        TokenStream(
            [StageSpec(0, (SourceSpec(paths[0]), SourceSpec(tmp_path / "elsewhere")))], sequence_length=8, seed=0
        )


def test_resume_after_the_batch_handed_out_last(stream: TokenStream) -> None:
    with Loader(stream, sequences=6, next_sample=30) as loader:
        list(itertools.islice(loader, 4))
        time.sleep(0.05)  # let the thread read ahead: that must not count
        state = loader.state_dict()
        rest = list(itertools.islice(loader, 3))
    assert state["next_sample"] == 30 + 4 * 6 == stream.check_state(state)
    with Loader(stream, sequences=6, next_sample=state["next_sample"]) as resumed:
        for expected, got in zip(rest, resumed, strict=False):
            assert np.array_equal(expected.tokens, got.tokens)
            assert np.array_equal(expected.samples, got.samples)


def test_state_is_equal_on_every_rank_and_free_of_the_world(stream: TokenStream) -> None:
    states = []
    for rank, world in [(0, 1), (0, 4), (3, 4)]:
        with Loader(stream, sequences=8, rank=rank, world=world) as loader:
            list(itertools.islice(loader, 3))
            states.append(loader.state_dict())
    assert states[0]["next_sample"] == 24
    assert states[0] == states[1] == states[2]


def test_bad_sizes_are_refused(stream: TokenStream) -> None:
    with pytest.raises(MixtureError, match="sequences 10 cannot be cut into 4"):
        Loader(stream, sequences=10, world=4)
    with pytest.raises(MixtureError, match="rank 2 of 2"):
        Loader(stream, sequences=2, rank=2, world=2)


def test_slots_must_divide_the_batch(write_ids: Any, tmp_path: Path) -> None:
    path = write_ids(tmp_path / "d", [100] * 20, chunk_tokens=256)
    slotted = TokenStream(
        [StageSpec(0, (SourceSpec(path),))], sequence_length=32, seed=0, order="contiguous", slots=4
    )  # fmt: skip
    with pytest.raises(MixtureError, match="multiple of slots 4"):
        Loader(slotted, sequences=6)
    with pytest.raises(MixtureError, match="from sample 6: both must be a multiple of slots 4"):
        Loader(slotted, sequences=8, next_sample=6)
    Loader(slotted, sequences=8).close()


@pytest.mark.parametrize("boundaries", ["isolate", "cross"])
def test_an_error_in_the_thread_reaches_the_consumer(write_ids: Any, tmp_path: Path, boundaries: str) -> None:
    path = write_ids(tmp_path / "d", [100] * 40, chunk_tokens=512, shard_chunks=1)
    stream = TokenStream([StageSpec(0, (SourceSpec(path),))], sequence_length=32, seed=0, boundaries=boundaries)
    shard = path / "shard-00000-00003.tar"
    content = bytearray(shard.read_bytes())
    content[512 + 128 + 300] ^= 1
    shard.write_bytes(content)
    with Loader(stream, sequences=4) as loader:
        with pytest.raises(CorruptShardError, match="shard-00000-00003"):
            list(itertools.islice(loader, 100))
        with pytest.raises(CorruptShardError, match="shard-00000-00003"):  # not a hang, not the end of the data
            next(loader)


def test_batches_before_an_error_are_handed_out(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are made in groups of 1, 2, 4, ...; the error stands in the middle of the third."""
    read = stream.read

    def failing(first: int, count: int) -> Rows:
        if first >= 20:
            raise OSError(5, "Input/output error")
        return read(first, count)

    monkeypatch.setattr(stream, "read", failing)
    with Loader(stream, sequences=4) as loader:
        for number in range(5):
            assert next(loader).samples.tolist() == list(range(4 * number, 4 * number + 4))
        with pytest.raises(OSError, match="Input/output"):
            next(loader)
        assert loader.next_sample == 20


def test_a_loader_taken_over_a_fork_says_so(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked process has none of its parent's threads, so it would wait for ever."""
    monkeypatch.setattr("potamos.data.loader.WATCHING", 0.05)
    with Loader(stream, sequences=4) as loader:
        next(loader)
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # not for ever, if it does
            try:
                collections.deque(loader, maxlen=0)
            except RuntimeError as error:
                os._exit(0 if "make the loader in the process that reads it" in str(error) else 2)
            os._exit(3)
        assert os.waitpid(child, 0)[1] == 0
        next(loader)


def test_no_more_is_read_ahead_than_asked_for(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hand-overs grow to a fixed size, not on and on: the third one here is of 4 batches, and so is the last."""
    read, made = stream.read, []
    monkeypatch.setattr("potamos.data.loader.GROUP", 4 * 4 * 33)
    monkeypatch.setattr(stream, "read", lambda first, count: made.append(first) or read(first, count))
    with Loader(stream, sequences=4, ahead=2) as loader:
        for _ in range(60):
            next(loader)
        time.sleep(0.2)
        assert 60 < len(made) <= 60 + 3 * 4  # what is left of one, and two that are ready or in the making


def test_places_of_samples_long_read_are_forgotten(stream: TokenStream) -> None:
    for block in range(40):
        stream.read(block * PLAN, 1)
    assert len(stream._plans) <= 4


def test_close_ends_the_thread_also_after_an_interrupt(stream: TokenStream) -> None:
    def running() -> int:
        return sum(thread.name == "potamos-loader" for thread in threading.enumerate())

    assert running() == 0
    loader = Loader(stream, sequences=4)

    def interrupted() -> None:
        with loader:
            next(loader)
            assert running() == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert running() == 0
    loader.close()
    with pytest.raises(StopIteration):
        next(loader)


def test_closing_does_not_wait_for_a_fetch_that_hangs(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()
    read = stream.read

    def fetching(first: int, count: int) -> Rows:
        if first >= 8:
            hangs.wait(30)
        return read(first, count)

    monkeypatch.setattr(stream, "read", fetching)
    monkeypatch.setattr("potamos.data.loader.CLOSING", 0.1)
    loader = Loader(stream, sequences=8)
    next(loader)
    thread = loader._thread
    begin = time.perf_counter()
    loader.close()
    assert time.perf_counter() - begin < 5
    hangs.set()
    assert thread is not None
    thread.join(5)
    assert not thread.is_alive(), "it goes on after the loader was closed"


def test_waiting_is_measured(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    read = stream.read

    def slow(first: int, count: int) -> Rows:
        time.sleep(0.05)
        return read(first, count)

    monkeypatch.setattr(stream, "read", slow)
    with Loader(stream, sequences=4) as loader:
        list(itertools.islice(loader, 3))
        assert 0.1 < loader.data_wait < 2.0


def test_a_batch_lost_on_its_way_is_noticed(stream: TokenStream) -> None:
    """An interrupt between taking rows and counting them must not shift the samples of the rest."""
    with Loader(stream, sequences=4) as loader:
        list(itertools.islice(loader, 3))
        while not loader._held:
            next(loader)
        loader._held.popleft()
        with pytest.raises(AssertionError, match=r"batch from sample \d+ where \d+ comes next"):
            list(itertools.islice(loader, 8))


@pytest.mark.parametrize("order", ["shuffled", "window", "contiguous"])
def test_seeking_to_sample_10_to_the_12_takes_under_10_ms(write_ids: Any, tmp_path: Path, order: str) -> None:
    """Of processor time, the least of some seeks to places never seen before: nothing is walked or replayed."""
    folders = [write_ids(tmp_path / str(i), [500] * 12, chunk_tokens=256, seed=i, shard_chunks=1) for i in range(3)]
    sources = tuple(SourceSpec(path, 1.0 + i) for i, path in enumerate(folders))
    stages = [StageSpec(0, sources[: 1 if order == "contiguous" else 3])]
    stream = TokenStream(stages, sequence_length=8, seed=0, skip=[[4, 8]], **ORDERS[order])
    stream.read(0, 8)
    took = []
    for attempt in range(8):
        place = 10**12 + attempt * 10**9
        begin = time.process_time()
        rows = stream.read(place, 8)
        took.append(time.process_time() - begin)
        assert rows.samples[0] == place
    assert min(took) < 0.010, took


def test_speed_is_printed(write_ids: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Timings are for people: they are printed and not asserted."""
    path = write_ids(tmp_path / "d", [1200] * 900, chunk_tokens=262_144)
    lines = []
    for sequences, length, boundaries in ((8, 2048, "isolate"), (8, 2048, "cross"), (32, 256, "isolate")):
        stream = TokenStream([StageSpec(0, (SourceSpec(path),))], sequence_length=length, seed=0, boundaries=boundaries)
        with Loader(stream, sequences=sequences) as loader:
            list(itertools.islice(loader, 100))
            begin, tokens = time.process_time(), 0
            for rows in itertools.islice(loader, 300):
                tokens += rows.tokens.size
            speed = tokens / (time.process_time() - begin) / 1e6
            lines.append(f"{sequences} x {length} {boundaries}: {speed:.0f} M tokens/s/core")
        assert rows.tokens.shape == (sequences, length + 1)
    with capsys.disabled():
        print("\n  loader " + ", ".join(lines))
