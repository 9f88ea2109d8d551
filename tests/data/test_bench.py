"""The measurement of readers: what it reads is what it says, checksums are made, made datasets are sound."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data import bench as module
from potamos.data.bench import bench
from potamos.data.dataset import TokenDataset
from potamos.data.errors import DatasetError
from potamos.data.manifest import MANIFEST, verify
from potamos.data.shards import CRC_BLOCK, ShardIndex, index_path
from potamos.data.synthetic import VOCABULARY, write_random, write_sparse
from potamos.data.windows import Windows


@pytest.fixture(scope="module")
def random_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("bench") / "random", 150_000, chunk_tokens=16_384)


def stream_of(dataset: Path) -> np.ndarray:
    """All tokens of a dataset in order but for the last, by the standard library alone."""
    chunks = []
    for shard in sorted(dataset.glob("*.tar")):
        with tarfile.open(shard) as tar:
            files = [tar.extractfile(member) for member in tar if member.name.endswith(".tok.npy")]
            chunks += [np.load(io.BytesIO(file.read())) for file in files if file is not None]
    return np.concatenate([chunk[:-1] for chunk in chunks])


def test_every_reader_is_measured_and_every_latency(random_tokens: Path) -> None:
    before = sorted((p.name, p.stat().st_mtime_ns) for p in random_tokens.iterdir())
    said: list[str] = []
    report = bench(
        random_tokens, rounds=2, batch=4, length=256, tokens=50_000, seconds=0.02, shards=20, progress=said.append
    )
    assert (report.path, report.batch, report.length, report.tokens) == (random_tokens, 4, 256, 50_000)
    speeds = [row for row in report.rows if row.unit == "Mtok/s/core"]
    assert [row.unit for row in report.rows if row not in speeds] == ["ms", "s", "s"]
    assert [row.name.partition(",")[0] for row in speeds] == [
        *["loader 4 x 256"] * 4,
        "memory map",
        *["stock webdataset"] * 3,
    ]
    for row in report.rows:
        assert 0 < row.lowest <= row.median <= row.highest < float("inf")
        assert row.count == (8 if row.unit == "ms" else 2)
    assert said[:3] == ["writing what is to be read", "round 0 of 2", "round 1 of 2"]
    assert sorted((p.name, p.stat().st_mtime_ns) for p in random_tokens.iterdir()) == before


def test_without_a_dataset_random_tokens_are_read() -> None:
    report = bench(rounds=1, batch=2, length=128, tokens=20_000, seconds=0.01, shards=3)
    assert report.path is None
    assert len(report.rows) == 11


def test_checksums_are_made_in_first_passes_only(random_tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = 0

    class Counting:
        @staticmethod
        def crc32(data: Any) -> int:
            nonlocal checked
            checked += len(data) == CRC_BLOCK
            return zlib.crc32(data)

    monkeypatch.setattr("potamos.data.dataset.zlib", Counting)
    passes = module._LoaderPasses(random_tokens, 4, 256, 10**9, "cross")
    blocks = 2 * 150_000 // CRC_BLOCK
    passes.first()
    for _ in range(2):  # right after another first pass, and after a later one
        checked = 0
        tokens, seconds = passes.first()
        assert tokens == 150_000 // 256 // 4 * 4 * 256
        assert seconds > 0
        assert blocks * 0.95 <= checked <= blocks + 20
        checked = 0
        assert passes.later()[0] == tokens
        assert checked <= 2  # the last rows of an epoch that batches do not divide


def test_what_the_other_readers_read_is_the_same_tokens(random_tokens: Path, tmp_path: Path) -> None:
    dtype = np.dtype("<u2")
    flat = module._copy_flat(random_tokens, tmp_path / "flat.bin", dtype, 10**9)
    wanted = stream_of(random_tokens)
    assert np.array_equal(np.fromfile(flat, dtype), wanted)
    members = module._copy_members(flat, dtype, tmp_path / "members")
    small = module._stock([members])
    first = [next(small) for _ in range(len(wanted) // 1024)]
    assert np.array_equal(np.concatenate(first), wanted[: len(first) * 1024])
    assert np.array_equal(next(small), first[0]), "it goes on from the beginning"
    large = module._stock([str(p) for p in sorted(random_tokens.glob("*.tar"))])
    assert np.array_equal(next(large)[:-1], wanted[:16_384])
    batches = module._batches([str(p) for p in sorted(random_tokens.glob("*.tar"))], 4, 256)
    assert [next(batches) for _ in range(16)] == [4 * 256] * 16


def test_speed_is_tokens_over_processor_time() -> None:
    def counts() -> Any:
        while True:
            sum(range(20_000))
            yield 7

    tokens, seconds = module._for(0.05, counts())
    assert tokens % 7 == 0
    assert 0 < seconds < 1


def test_random_datasets_are_sound_and_equal(random_tokens: Path, tmp_path: Path) -> None:
    assert verify(random_tokens, deep=True).ok
    dataset = TokenDataset(random_tokens, vocabulary=VOCABULARY)
    assert dataset.manifest.tokens == 150_000
    assert len(dataset.manifest.shards) == 4
    assert 100 < dataset.manifest.documents < 300
    assert len(np.unique(stream_of(random_tokens))) > 40_000
    again = write_random(tmp_path / "again", 150_000, chunk_tokens=16_384)
    assert (again / MANIFEST).read_bytes() == (random_tokens / MANIFEST).read_bytes()


def test_sparse_datasets_take_no_space_and_read_as_any_other(tmp_path: Path) -> None:
    holes = write_sparse(tmp_path / "holes", 30)
    tars = sorted(holes.glob("*.tar"))
    assert len(tars) == 30
    assert tars[0].stat().st_size > 250 * 2**20
    index = ShardIndex.from_bytes(index_path(tars[7]).read_bytes(), "an index")
    blocks = -(-2 * 262_145 // CRC_BLOCK)
    assert index.chunks["first_block"].tolist() == list(range(0, 512 * blocks, blocks))
    assert len(index.crcs) == 512 * blocks
    disk = {p.stat().st_ino: 512 * p.stat().st_blocks for p in holes.iterdir()}
    assert sum(disk.values()) < 2**20
    windows = Windows(holes, sequence_length=262_144)
    assert len(windows) == 30 * 512
    rows = windows.read(len(windows) - 2, 2)
    assert not rows.tokens.any()
    assert not rows.document_ids.any()
    assert module.first_batch(holes, 8, 2048) < 5


def test_only_token_chunks_are_measured(random_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"holds no dataset\.json"):
        bench(tmp_path)
    with pytest.raises(DatasetError, match="no row of sequence_length 200000"):
        bench(random_tokens, length=200_000)
    read: Callable[..., Any] = module.read_manifest

    def foreign(path: Path) -> Any:
        manifest = read(path)
        manifest.fields["layout"] = "members"
        return manifest

    monkeypatch.setattr(module, "read_manifest", foreign)
    with pytest.raises(DatasetError, match="is not of token chunks"):
        bench(random_tokens)
