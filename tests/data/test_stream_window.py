"""Window order: which shards are at hand while rows are read, here and behind a URL."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.dataset import TokenDataset
from potamos.data.errors import DatasetError, MixtureError
from potamos.data.files import LocalFiles
from potamos.data.loader import Loader, Rows, SourceSpec, StageSpec, TokenStream, Windows
from potamos.data.order import derive_key, window_shards
from potamos.data.remote import CacheSpec, RemoteError, RemoteShards, Retry

WINDOW = 3
ONE: dict[str, Any] = {"sequence_length": 8, "seed": 3, "order": "window", "window": WINDOW}


@pytest.fixture(scope="module")
def many(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two datasets of 20 and 11 shards of unequal size, the first in three parts."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(8)
    return [
        write_ids(
            folder / str(i), rng.integers(1, 60, n).tolist(), chunk_tokens=64, shard_chunks=1, seed=i, parts=parts
        )
        for i, (n, parts) in enumerate([(38, 3), (20, 1)])
    ]


def one(path: str | Path, **options: Any) -> TokenStream:
    return TokenStream([StageSpec(0, (SourceSpec(path),))], **{**ONE, **options})


def mixed(paths: Sequence[str | Path], **options: Any) -> TokenStream:
    sources = tuple(SourceSpec(path, 2.0 - i) for i, path in enumerate(paths))
    return TokenStream([StageSpec(0, sources), StageSpec(300, sources[1:])], **{**ONE, **options})


def shards_of(stream: TokenStream, source: int = 0) -> np.ndarray:
    return stream.datasets[source].cut(8).per_shard


def equal(a: Rows, b: Rows) -> bool:
    fields = ("tokens", "document_ids", "positions", "samples", "source")
    return all(np.array_equal(getattr(a, f), getattr(b, f)) for f in fields)


def test_every_row_comes_once_in_an_epoch_and_epochs_differ(many: list[Path]) -> None:
    stream = one(many[0])
    n = stream.describe()[0].samples_per_epoch
    assert n == one(many[0], order="shuffled", window=None).describe()[0].samples_per_epoch
    every = sorted(map(tuple, one(many[0], order="shuffled", window=None).read(0, n).tokens.tolist()))
    epochs = [list(map(tuple, stream.read(epoch * n, n).tokens.tolist())) for epoch in range(3)]
    assert all(sorted(epoch) == every for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    whole = stream.read(0, 3 * n)
    picked = np.random.default_rng(0).permutation(3 * n)[:100]
    assert np.array_equal(one(many[0]).rows(picked).tokens, whole.tokens[picked])
    assert equal(stream.read(n + 7, 31), whole.slice(n + 7, n + 38))  # in the middle of a window
    assert not np.array_equal(one(many[0], window=4).read(0, n).tokens, whole.slice(0, n).tokens)


class Watched(LocalFiles):
    """Local files that refuse every shard not kept, and remember what they were told."""

    def __init__(self, dataset: TokenDataset):
        super().__init__(dataset.path, [entry["name"] for entry in dataset.manifest.shards])
        self.kept: set[int] = set()
        self.log: list[tuple[str, list[int]]] = []

    def path(self, shard: int) -> Path:
        assert shard in self.kept, f"shard {shard} is read, kept are {sorted(self.kept)}"
        self.log.append(("path", [shard]))
        return super().path(shard)

    def prefetch(self, shards: Sequence[int]) -> None:
        assert set(shards) <= self.kept
        self.log.append(("prefetch", list(shards)))

    def keep(self, shards: Sequence[int]) -> None:
        self.kept = set(shards)
        self.log.append(("keep", list(shards)))


def watch(stream: TokenStream) -> list[Watched]:
    watched = [Watched(dataset) for dataset in stream.datasets]
    for dataset, files in zip(stream.datasets, watched, strict=True):
        dataset.files = files
    return watched


@pytest.mark.parametrize("batch", [1, 5, 16, 70])
def test_the_window_read_and_the_next_are_at_hand_and_no_more(many: list[Path], batch: int) -> None:
    """Every shard is read only while it is kept, was asked for a window before, and kept are two windows."""
    stream = one(many[0])
    (files,) = watch(stream)
    per_shard, key = shards_of(stream), derive_key("rows", 3, stream.datasets[0].fingerprint)
    n = int(per_shard.sum())
    for first in range(0, 2 * n, batch):
        files.log.clear()
        stream.read(first, batch)
        now = window_shards(first, per_shard, WINDOW, key)
        following = window_shards(now.end, per_shard, WINDOW, key)
        assert files.kept >= set(now.shards.tolist()) | set(following.shards.tolist())
        assert len(files.kept) <= 2 * WINDOW or first + batch > following.end
        told = [call for call, _ in files.log if call != "path"]
        assert told == (["keep", "prefetch"] if told else [])
        assert bool(told) == (first == 0 or now.begin > first - batch or first + batch > now.end)
        if told:
            asked = files.log[1][1]
            assert asked[: len(now.shards)] == now.shards.tolist(), "what is needed now comes first"
            assert len(set(asked)) == len(asked)
    stream.read(0, batch)  # going back
    assert files.kept >= set(window_shards(0, per_shard, WINDOW, key).shards.tolist())


def test_each_source_of_a_mixture_has_its_own_window_and_a_finished_stage_none(many: list[Path]) -> None:
    stream = mixed(many)
    files = watch(stream)
    for first in range(0, 300, 10):
        stream.read(first, 10)
        assert all(len(f.kept) <= 2 * WINDOW for f in files)
        assert all(f.kept for f in files) or first < 50  # a source's first draw may be a while away
    for first in range(300, 500, 10):
        stream.read(first, 10)
    assert files[0].log[-1] == ("keep", [])
    assert files[0].kept == set()
    assert files[1].kept
    stream.read(5, 4)  # back again: what is needed is asked for anew
    assert files[0].kept


def test_a_run_begun_in_mid_window_fetches_that_window_first(many: list[Path]) -> None:
    stream = one(many[0])
    (files,) = watch(stream)
    per_shard, key = shards_of(stream), derive_key("rows", 3, stream.datasets[0].fingerprint)
    far = 10**12 + 17
    rows = stream.read(far, 4)
    now = window_shards(far, per_shard, WINDOW, key)
    assert files.log[0][0] == "keep"
    assert files.log[1][1][: len(now.shards)] == now.shards.tolist()
    assert {call[1][0] for call in files.log[2:]} <= set(now.shards.tolist())
    assert equal(rows, one(many[0]).rows(np.arange(far, far + 4)))


@pytest.fixture(scope="module")
def remote(many: list[Path]) -> list[str]:
    return [f"file://{path}" for path in many]


def cache_of(folder: Path, stream: TokenStream, windows: float = 2) -> CacheSpec:
    """Room for so many windows of every dataset of a local stream."""
    room = 0.0
    for dataset in stream.datasets:
        sizes = sorted(entry["bytes"] + entry["index_bytes"] for entry in dataset.manifest.shards)
        room += sum(sizes[-int(windows * WINDOW) :])
    return CacheSpec(folder, int(room), retry=Retry(attempts=2, sleep=lambda _: None))


def bytes_in(folder: Path) -> int:
    """Of shards and indexes, while other threads replace them: the least of a few looks."""

    def look() -> int:
        found = 0
        for path in folder.rglob("*.tar*"):
            with contextlib.suppress(FileNotFoundError):
                found += path.stat().st_size if path.parent.name not in ("locks", "leases") else 0
        return found

    return min(look() for _ in range(3))


def test_shards_behind_a_url_are_read_through_a_bounded_cache(
    many: list[Path], remote: list[str], tmp_path: Path
) -> None:
    """Equal rows, never more bytes than allowed, over epochs, a change of stage, a resume and a change of world."""
    local = mixed(many)
    cache = cache_of(tmp_path / "cache", local)
    stream = mixed(remote, cache=cache)
    assert stream.fingerprint(400) == local.fingerprint(400)
    with Loader(stream, sequences=6) as loader:
        for step, rows in enumerate(itertools.islice(loader, 70)):
            assert equal(rows, local.read(6 * step, 6))
            assert bytes_in(tmp_path / "cache") <= cache.bytes
        state = loader.state_dict()
    stream.close()
    again = mixed(remote, cache=cache)
    place = again.check_state(state)
    for rank in range(3):
        with Loader(again, sequences=12, rank=rank, world=3, next_sample=place) as loader:
            assert equal(next(loader), local.read(place + 4 * rank, 4))
    again.close()


def test_closing_does_not_wait_for_a_server_that_hangs(
    many: list[Path], remote: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = mixed(remote, cache=cache_of(tmp_path / "cache", mixed(many)))
    hangs, closed = threading.Event(), []
    close = RemoteShards.close

    def slow(files: RemoteShards) -> None:
        hangs.wait(30)
        close(files)
        closed.append(files)

    monkeypatch.setattr(RemoteShards, "close", slow)
    monkeypatch.setattr("potamos.data.lookahead.CLOSING", 0.1)
    begin = time.monotonic()
    stream.close()
    assert time.monotonic() - begin < 5
    hangs.set()
    for thread in [thread for thread in threading.enumerate() if thread.name == "shard-closer"]:
        thread.join(5)
    assert len(closed) == len(remote), "each dataset was told"


def test_a_shard_that_cannot_be_fetched_ends_the_iteration_with_an_error(many: list[Path], tmp_path: Path) -> None:
    """Not a hang, not a hole, not the end of the data; batches before it are handed out; and again at every call."""
    here = Path(shutil.copytree(many[0], tmp_path / "far"))
    local = one(many[0])
    key = derive_key("rows", 3, local.datasets[0].fingerprint)
    third = window_shards(0, shards_of(local), WINDOW, key)
    for _ in range(2):
        third = window_shards(third.end, shards_of(local), WINDOW, key)
    name = local.datasets[0].manifest.shards[int(third.shards[-1])]["name"]
    (here / name).unlink()
    stream = one(f"file://{here}", cache=cache_of(tmp_path / "cache", local))
    handed: list[Rows] = []
    with Loader(stream, sequences=2) as loader:
        with pytest.raises(RemoteError, match=name):
            handed.extend(loader)
        assert all(equal(rows, local.read(2 * step, 2)) for step, rows in enumerate(handed))
        assert third.begin - 1 <= 2 * len(handed) == loader.next_sample < third.end
        with pytest.raises(RemoteError, match=name):
            next(loader)
    stream.close()


def test_orders_that_read_everywhere_refuse_what_is_behind_a_url(remote: list[str], tmp_path: Path) -> None:
    cache = CacheSpec(tmp_path / "cache", 10**9)
    for options in ({"order": "shuffled", "window": None}, {"order": "contiguous", "window": None, "slots": 2}):
        with pytest.raises(DatasetError, match=rf"order {options['order']} reads all of its shards.*use order: window"):
            one(remote[0], cache=cache, **options)
    with pytest.raises(DatasetError, match=r"source s3://(\.\.\.@)?bucket/text is behind a URL"):
        one("s3://key:secret@bucket/text", order="shuffled", window=None)
    assert not (tmp_path / "cache").exists(), "refused before anything is fetched"
    with pytest.raises(DatasetError, match=r"say where its shards may be kept with data\.cache"):
        one(remote[0])


def test_held_out_data_behind_a_url_are_refused(remote: list[str]) -> None:
    with pytest.raises(DatasetError, match=r"is behind a URL; held-out data.* copy them to a local folder"):
        Windows("s3://key:secret@bucket/held-out", sequence_length=8)
    with pytest.raises(DatasetError, match=r"^dataset s3://(\.\.\.@)?bucket/held-out is"):
        Windows("s3://key:secret@bucket/held-out", sequence_length=8)
    with pytest.raises(DatasetError, match="copy them"):
        Windows(remote[0], sequence_length=8)


def test_a_cache_too_small_for_two_windows_of_each_source_is_refused(
    many: list[Path], remote: list[str], tmp_path: Path
) -> None:
    local = mixed(many)
    room = cache_of(tmp_path / "cache", local)
    small = CacheSpec(tmp_path / "cache", room.bytes - 1)
    with pytest.raises(DatasetError, match=rf"stage 0: two windows of 3 shards of its 2 datasets.*{room.bytes} bytes"):
        mixed(remote, cache=small)
    one(remote[0], cache=small).close()


def test_windows_need_their_size_and_other_orders_take_none(many: list[Path]) -> None:
    for options, match in [
        ({"window": None}, "window None with order window: it needs window >= 1"),
        ({"window": 0}, "window 0 with order window"),
        ({"order": "shuffled"}, "window 3 with order shuffled: it takes no window"),
        ({"order": "contiguous", "slots": 2}, "window 3 with order contiguous: it takes no window"),
        ({"slots": 2}, "slots 2 with order window: it takes no slots"),
    ]:
        with pytest.raises(MixtureError, match=match):
            one(many[0], **options)


def test_windows_belong_to_the_fingerprint(many: list[Path]) -> None:
    prints = {one(many[0], **o).fingerprint(10) for o in ({}, {"window": 4}, {"order": "shuffled", "window": None})}
    assert len(prints) == 3
