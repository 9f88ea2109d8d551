"""The loader: equal global batches for every world, exact resume, failures that surface, a thread that ends."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.errors import CorruptShardError, DatasetError, MixtureError
from potamos.data.loader import Loader, Rows, SourceSpec, StageSpec, TokenStream


@pytest.fixture(scope="module")
def stream(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    folder = tmp_path_factory.mktemp("loader")
    rng = np.random.default_rng(1)
    sources = [
        SourceSpec(write_ids(folder / str(i), rng.integers(1, 90, 300).tolist(), chunk_tokens=512, seed=i), 1.0 + i)
        for i in range(2)
    ]
    return TokenStream([StageSpec(0, tuple(sources))], sequence_length=32, seed=11)


def batches(stream: TokenStream, world: int, count: int, next_sample: int = 0) -> list[list[np.ndarray]]:
    """Global batches put together from every rank's own loader: tokens, ids, positions, samples, source."""
    ranks: list[list[Rows]] = []
    for rank in range(world):
        with Loader(stream, sequences=16, rank=rank, world=world, next_sample=next_sample) as loader:
            ranks.append(list(itertools.islice(loader, count)))
    fields = ("tokens", "document_ids", "positions", "samples", "source")
    return [
        [np.concatenate([getattr(rows, field) for rows in step]) for field in fields]
        for step in zip(*ranks, strict=True)
    ]


def same(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)
    )


def test_global_batches_are_equal_for_every_world(stream: TokenStream) -> None:
    one = batches(stream, 1, 6)
    assert one[1][3].tolist() == list(range(16, 32))
    for world in (2, 4, 8, 16):
        assert same(one, batches(stream, world, 6))


def test_the_world_may_change_on_resume(stream: TokenStream) -> None:
    one = batches(stream, 1, 9)
    assert same(one, batches(stream, 8, 3) + batches(stream, 2, 2, 3 * 16) + batches(stream, 16, 4, 5 * 16))


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
    rows = min(s.samples_per_epoch / s.share for s in stream.describe())
    with pytest.raises(DatasetError, match=r"has \d+ rows of 32 tokens, a batch of"):
        Loader(stream, sequences=int(rows) + 1)
    Loader(stream, sequences=int(rows) + 1, allow_repeat=True).close()


def test_slots_must_divide_the_batch(write_ids: Any, tmp_path: Path) -> None:
    path = write_ids(tmp_path / "d", [100] * 20, chunk_tokens=256)
    slotted = TokenStream(
        [StageSpec(0, (SourceSpec(path),))], sequence_length=32, seed=0, order="contiguous", slots=4
    )  # fmt: skip
    with pytest.raises(MixtureError, match="multiple of slots 4"):
        Loader(slotted, sequences=6)
    Loader(slotted, sequences=8).close()


def test_an_error_in_the_thread_reaches_the_consumer(write_ids: Any, tmp_path: Path) -> None:
    path = write_ids(tmp_path / "d", [100] * 40, chunk_tokens=512, shard_chunks=1)
    stream = TokenStream([StageSpec(0, (SourceSpec(path),))], sequence_length=32, seed=0)
    shard = path / "shard-00000-00003.tar"
    content = bytearray(shard.read_bytes())
    content[512 + 128 + 300] ^= 1
    shard.write_bytes(content)
    with Loader(stream, sequences=4) as loader:
        with pytest.raises(CorruptShardError, match="shard-00000-00003"):
            list(itertools.islice(loader, 100))
        with pytest.raises(CorruptShardError, match="shard-00000-00003"):  # not a hang, not the end of the data
            next(loader)


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


def test_waiting_is_measured(stream: TokenStream, monkeypatch: pytest.MonkeyPatch) -> None:
    read = stream.read

    def slow(first: int, count: int) -> Rows:
        time.sleep(0.05)
        return read(first, count)

    monkeypatch.setattr(stream, "read", slow)
    with Loader(stream, sequences=4) as loader:
        list(itertools.islice(loader, 3))
        assert 0.1 < loader.data_wait < 2.0


def test_speed_is_printed(write_ids: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Timings are for people: they are printed and not asserted."""
    path = write_ids(tmp_path / "d", [1200] * 900, chunk_tokens=262_144)
    lines = []
    for sequences, length in ((8, 2048), (32, 256)):
        stream = TokenStream([StageSpec(0, (SourceSpec(path),))], sequence_length=length, seed=0)
        with Loader(stream, sequences=sequences) as loader:
            list(itertools.islice(loader, 60))
            begin, tokens = time.process_time(), 0
            for rows in itertools.islice(loader, 200):
                tokens += rows.tokens.size
            lines.append(f"{sequences} x {length}: {tokens / (time.process_time() - begin) / 1e6:.0f} M tokens/s/core")
    begin = time.perf_counter()
    stream.rows(np.array([10**12]))
    lines.append(f"seek to sample 10^12: {1000 * (time.perf_counter() - begin):.1f} ms")
    with capsys.disabled():
        print("\n  loader " + ", ".join(lines))
    assert rows.tokens.shape == (32, 257)
