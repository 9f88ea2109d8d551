"""Opened datasets: rows over parts against the plain stream, lazy opening, shards left out or fetched again."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data import dataset as dataset_module
from potamos.data.dataset import MAX_OPEN_SHARDS, TokenDataset, read_rows
from potamos.data.errors import CorruptShardError, DatasetError
from potamos.data.loader import SourceSpec, StageSpec, TokenStream, Windows
from potamos.data.manifest import MANIFEST, make_manifest, read_manifest, totals, verify
from potamos.data.shards import index_path

LENGTHS = [7, 64, 300, 5, 1, 900, 2, 70, 406, 12, 800, 33, 1, 1, 250, 8, 40, 611]


def read(dataset: TokenDataset, length: int, *, rest: bool = False, true_positions: bool = True) -> tuple[Any, ...]:
    """Every row of a dataset in order."""
    cut = dataset.cut(length, rest=rest)
    chunk, start = cut.place(np.arange(cut.total))
    return read_rows([dataset], np.zeros(cut.total, int), chunk, start, length + 1, true_positions=true_positions)


def part_streams(oracle: Any, lengths: Sequence[int], parts: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens, documents and positions of each part."""
    bounds = [sum(lengths[: part * len(lengths) // parts]) for part in range(parts + 1)]
    return [tuple(values[a:b] for values in oracle) for a, b in itertools.pairwise(bounds)]  # type: ignore[misc]


def plain_rows(streams: list[Any], chunk_tokens: int, length: int, rest: bool) -> list[tuple[int, list[Any]]]:
    """(chunk, (token, document, position) of each token) of every row, in order."""
    rows, chunk = [], 0
    for tokens, documents, positions in streams:
        whole = list(zip(tokens, documents, positions, strict=True))
        for begin in range(0, len(whole) - 1, chunk_tokens):
            stored = whole[begin : begin + chunk_tokens + 1]
            for at in range(0, len(stored) - 1, length):
                row = stored[at : at + length + 1]
                if rest or len(row) == length + 1:
                    rows.append((chunk, row))
            chunk += 1
    return rows


lengths_strategy = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 60)), min_size=1, max_size=30)


@given(lengths_strategy, st.integers(1, 4), st.integers(3, 40), st.integers(1, 3), st.integers(1, 17), st.booleans())
@settings(max_examples=40, deadline=None)
def test_rows_over_parts_equal_the_plain_cut(
    write_ids: Any,
    plain_stream: Any,
    lengths: list[int],
    parts: int,
    chunk_tokens: int,
    shard_chunks: int,
    length: int,
    rest: bool,
) -> None:
    streams = part_streams(plain_stream(lengths), lengths, parts)
    if all(len(tokens) < 2 for tokens, _, _ in streams):
        return
    expected = plain_rows(streams, chunk_tokens, length, rest)
    with tempfile.TemporaryDirectory() as folder:
        path = write_ids(Path(folder) / "d", lengths, chunk_tokens=chunk_tokens, shard_chunks=shard_chunks, parts=parts)
        assert verify(path, deep=True).ok, verify(path, deep=True).problems
        dataset = TokenDataset(path)
        tokens, documents, positions = read(dataset, length, rest=rest)
    assert len(tokens) == len(expected)
    for i, (_, row) in enumerate(expected):
        got = list(zip(tokens[i].tolist(), documents[i].tolist(), positions[i].tolist(), strict=True))
        assert got == row + [(0, -1, 0)] * (length + 1 - len(row))
    # the same arithmetic without a place
    per_chunk = np.bincount([chunk for chunk, _ in expected], minlength=dataset.chunks)
    chunks = [entry["chunks"] for entry in dataset.manifest.shards]
    by_shard = [part.sum() for part in np.split(per_chunk, np.cumsum(chunks)[:-1])]
    assert dataset.cut(length, rest=rest).per_shard.tolist() == by_shard
    assert dataset.targets == sum(max(0, len(tokens) - 1) for tokens, _, _ in streams)
    sizes = [
        min(chunk_tokens + 1, len(tokens) - begin)
        for tokens, _, _ in streams
        for begin in range(0, len(tokens) - 1, chunk_tokens)
    ]
    assert [dataset.chunk_size(chunk) for chunk in range(dataset.chunks)] == sizes


@pytest.mark.parametrize("many", [0, 1, 24, 10_000])
def test_rows_of_few_and_of_many_documents(
    write_ids: Any, plain_stream: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    """Both ways to number a row's documents, whichever a row takes; long documents and runs of single ids."""
    monkeypatch.setattr(dataset_module, "MANY_DOCUMENTS", many)
    lengths = [1] * 90 + [700] + [3, 1, 2] * 40 + [64, 65, 63, 1, 1] + [200]
    path = write_ids(tmp_path / "d", lengths, chunk_tokens=256, vocabulary=70_000)
    expected = plain_rows([plain_stream(lengths, 70_000)], 256, 64, rest=True)
    for true_positions in (True, False):
        rows = read(TokenDataset(path), 64, rest=True, true_positions=true_positions)
        for i, (_, row) in enumerate(expected):
            began = 0 if true_positions else row[0][2]
            plain = [(token, d, at - began * (d == row[0][1])) for token, d, at in row]
            got = list(zip(*(values[i].tolist() for values in rows), strict=True))
            assert got == plain + [(0, -1, 0)] * (65 - len(row))


def test_a_part_without_a_shard_counts_its_documents(write_ids: Any, tmp_path: Path) -> None:
    """Parts of nothing or of one lonely end-of-document; documents of later parts keep their numbers."""
    path = write_ids(tmp_path / "d", [1, 30], chunk_tokens=16, parts=2)
    dataset = TokenDataset(path)
    assert [len(part["shards"]) for part in dataset.manifest.parts] == [0, 1]
    assert [part["tokens"] for part in dataset.manifest.parts] == [1, 30]
    assert set(read(dataset, 4)[1].ravel().tolist()) == {1}
    assert verify(path, deep=True).ok
    with pytest.raises(DatasetError, match="at least one shard"):
        TokenDataset(write_ids(tmp_path / "nothing", [], chunk_tokens=16))


@pytest.fixture(scope="module")
def parted(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts of several shards."""
    return write_ids(tmp_path_factory.mktemp("parted") / "d", LENGTHS, chunk_tokens=128, shard_chunks=2, parts=3)


@pytest.fixture
def copy(parted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parted, tmp_path / "copy"))


def test_what_is_kept_is_all_that_is_remembered(parted: Path) -> None:
    """In windows of shards memory must not grow to that of all of them, and what comes again is checked again."""
    dataset = TokenDataset(parted)
    read(dataset, 4)
    assert len(dataset._known) == len(dataset._open) == len(dataset.manifest.shards) > 2
    dataset.keep([1, 2])
    assert dataset._known.keys() == dataset._open.keys() == {1, 2}
    assert np.array_equal(read(dataset, 4)[0], read(TokenDataset(parted), 4)[0])


def test_more_documents_than_ids_have_numbers_are_refused(copy: Path) -> None:
    fields = {key: value for key, value in read_manifest(copy).fields.items() if key not in ("format", "version")}
    last = dict(fields["parts"][-1])
    last["documents"] += 2**31 - fields["documents"]
    parts = [*fields["parts"][:-1], last]
    for documents, refused in ((2**31, True), (2**31 - 1, False)):
        last["documents"] -= int(not refused)
        (copy / MANIFEST).write_bytes(make_manifest({**fields, "parts": parts, **totals(parts)}).to_bytes())
        with pytest.raises(DatasetError, match="has 2147483648 documents") if refused else contextlib.nullcontext():
            assert TokenDataset(copy).manifest.documents == documents


def test_opening_reads_no_index_and_no_shard(parted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(dataset_module, "open_index", lambda *_: opened.append("index"))
    monkeypatch.setattr(dataset_module.mmap, "mmap", lambda *_, **__: opened.append("shard"))
    dataset = TokenDataset(parted)
    assert dataset.cut(32).total > 20
    assert opened == []


def test_2800_shards_open_at_once(
    write_ids: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset of the Pile's number of shards, which are links to one file, each a part of its own."""
    one = write_ids(tmp_path / "one", [40, 9, 52], chunk_tokens=64)
    fields = dict(read_manifest(one).fields)
    (part,) = fields.pop("parts")
    (entry,) = part["shards"][:1]
    many, parts = tmp_path / "many", []
    many.mkdir()
    for number in range(2800):
        name = f"shard-{number:05d}-00000.tar"
        os.link(one / entry["name"], many / name)
        os.link(index_path(one / entry["name"]), index_path(many / name))
        parts.append({**part, "name": f"{number:05d}.jsonl.zst", "shards": [{**entry, "name": name}]})
    manifest = make_manifest({**fields, "parts": parts, **totals(parts)})
    (many / MANIFEST).write_bytes(manifest.to_bytes())
    begin = time.process_time()  # what else a machine does is not counted
    stream = TokenStream([StageSpec(0, (SourceSpec(many),))], sequence_length=16, seed=1)
    rows = stream.read(0, 8)
    seconds = time.process_time() - begin
    with capsys.disabled():
        print(f"\n  2,800 shards: opened and read one batch in {seconds:.2f} s of processor time")
    assert len(np.unique(rows.document_ids)) > 6
    assert seconds < 1
    monkeypatch.setattr(dataset_module, "MAX_OPEN_SHARDS", 256)
    samples = np.arange(3000)
    assert len(np.unique(stream.rows(samples).document_ids[:, 0])) > 2000
    assert len(stream.datasets[0]._open) <= 256
    assert 16 <= MAX_OPEN_SHARDS <= 4096


def test_mapped_shards_are_bounded_over_all_datasets(
    write_ids: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()  # datasets of other tests
    monkeypatch.setattr(dataset_module, "MAX_OPEN_SHARDS", 5)
    paths = [write_ids(tmp_path / name, [300], chunk_tokens=16, shard_chunks=1, seed=ord(name)) for name in "abc"]
    datasets = [TokenDataset(path) for path in paths]
    alone = [read(TokenDataset(path), 8) for path in paths]
    order = np.random.default_rng(0).permutation(3 * 37)  # 37 rows each
    place = [dataset.cut(8).place(order % 37) for dataset in datasets]
    source = order // 37
    chunk, start = (np.where(source == 0, a, np.where(source == 1, b, c)) for a, b, c in zip(*place, strict=True))
    got = read_rows(datasets, source, chunk, start, 9, true_positions=True)
    for values, whole in zip(got, zip(*alone, strict=True), strict=True):
        assert np.array_equal(values, np.stack(whole)[source, order % 37])
    assert sum(len(dataset._open) for dataset in datasets) <= 5


def damage_missing(path: Path) -> str:
    (path / "shard-00001-00001.tar").unlink()
    return r"shard-00001-00001\.tar is missing, expected \d+ bytes"


def damage_truncated(path: Path) -> str:
    with open(path / "shard-00001-00001.tar", "r+b") as file:
        file.truncate(700)
    return r"shard-00001-00001\.tar has 700 bytes, dataset\.json says \d+"


def damage_index_missing(path: Path) -> str:
    (path / "shard-00001-00001.tar.idx").unlink()
    return r"shard-00001-00001\.tar\.idx is missing, expected \d+ bytes"


def damage_index(path: Path) -> str:
    file = path / "shard-00001-00001.tar.idx"
    content = bytearray(file.read_bytes())
    content[60] ^= 1
    file.write_bytes(content)
    return r"shard-00001-00001\.tar\.idx is damaged, or stale"


DAMAGES = [damage_missing, damage_truncated, damage_index_missing, damage_index]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_shard_is_an_error_with_both_remedies(copy: Path, damage: Any) -> None:
    says = damage(copy) + r".*copy the dataset again, or .*data\.on_bad_shard: skip"
    with pytest.raises(CorruptShardError, match=says):
        read(TokenDataset(copy), 32)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_shard_is_left_out_whole_and_told(
    parted: Path, copy: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    says = damage(copy)
    whole = TokenDataset(parted)
    with caplog.at_level(logging.WARNING):
        left = TokenDataset(copy, on_bad_shard="skip")
    assert left.dropped == ("shard-00001-00001.tar",)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(says, record.getMessage()), record.getMessage()
    names = [entry["name"] for entry in whole.manifest.shards]
    lost = names.index("shard-00001-00001.tar")
    for rest in (False, True):
        before, after = whole.cut(32, rest=rest).per_shard, left.cut(32, rest=rest).per_shard
        assert before[lost] > 0
        assert after.tolist() == [0 if i == lost else n for i, n in enumerate(before.tolist())]
        kept = np.repeat(np.arange(len(names)), before) != lost
        for mine, theirs in zip(read(left, 32, rest=rest), read(whole, 32, rest=rest), strict=True):
            assert np.array_equal(mine, theirs[kept])
    assert whole.targets - left.targets == sum(
        entry["tokens"] - entry["chunks"] for entry in whole.manifest.shards if entry["name"] == names[lost]
    )
    assert left.fingerprint != whole.fingerprint == TokenDataset(parted, on_bad_shard="skip").fingerprint
    assert left.fingerprint == TokenDataset(copy, on_bad_shard="skip").fingerprint


def test_the_fingerprint_tells_which_shards_were_left_out(copy: Path) -> None:
    seen = set()
    for name in ("shard-00000-00000.tar", "shard-00001-00000.tar", "shard-00002-00000.tar"):
        (copy / name).rename(copy / "aside")
        seen.add(TokenDataset(copy, on_bad_shard="skip").fingerprint)
        (copy / "aside").rename(copy / name)
    assert len(seen) == 3


def test_a_dataset_without_a_usable_shard_is_refused(copy: Path) -> None:
    for shard in copy.glob("*.tar"):
        shard.unlink()
    with pytest.raises(DatasetError, match=r"copy has no usable shard among \d+"):
        TokenDataset(copy, on_bad_shard="skip")
    with pytest.raises(DatasetError, match=r"data\.on_bad_shard 'ignore' is unknown; known: error, skip"):
        TokenDataset(copy, on_bad_shard="ignore")


class FetchedFiles:
    """Shards that are copied from a store when asked for, and removed when let go."""

    def __init__(self, store: Path, cache: Path):
        self.names = [entry["name"] for entry in read_manifest(store).shards]
        self.store, self.cache = store, cache
        self.fetched: list[int] = []
        cache.mkdir()

    def path(self, shard: int) -> Path:
        local = self.cache / self.names[shard]
        if not local.exists():
            self.fetched.append(shard)
            for name in (local.name, index_path(local).name):
                shutil.copyfile(self.store / name, self.cache / name)
        return local

    def prefetch(self, shards: Sequence[int]) -> None:
        pass

    def keep(self, shards: Sequence[int]) -> None:
        for number in set(range(len(self.names))) - set(shards):
            (self.cache / self.names[number]).unlink(missing_ok=True)


def test_shards_come_from_wherever_files_has_them(parted: Path, copy: Path, tmp_path: Path) -> None:
    manifest_only = tmp_path / "manifest"
    manifest_only.mkdir()
    shutil.copy(parted / MANIFEST, manifest_only)
    files = FetchedFiles(copy, tmp_path / "cache")
    dataset = TokenDataset(manifest_only, files=files)
    assert files.fetched == [], "opening fetches nothing"
    assert dataset.fingerprint == TokenDataset(parted).fingerprint
    expected = read(TokenDataset(parted), 32)
    for mine, theirs in zip(read(dataset, 32), expected, strict=True):
        assert np.array_equal(mine, theirs)
    assert files.fetched == list(range(len(files.names)))

    # One is let go, and comes back changed: it is mapped anew and its blocks are checked anew.
    shard = copy / files.names[3]
    content = bytearray(shard.read_bytes())
    content[512 + 128 + 6] ^= 1
    shard.write_bytes(content)
    dataset.keep([number for number in range(len(files.names)) if number != 3])
    with pytest.raises(CorruptShardError, match=rf"{files.names[3]}, chunk 0 of the shard, bytes 640 to .*crc32"):
        read(dataset, 32)
    assert files.fetched[-1] == 3

    shutil.copy(parted / files.names[3], shard)
    dataset.keep([])
    assert np.array_equal(read(dataset, 32)[0], expected[0])

    # A file replaced behind the reader's back is noticed when it is mapped again, whatever was known of the old one.
    shard.write_bytes(content)
    os.replace(shard, tmp_path / "cache" / files.names[3])
    dataset._open.clear()
    with pytest.raises(CorruptShardError, match=rf"{files.names[3]}, chunk 0 of the shard, bytes 640 to .*crc32"):
        read(dataset, 32)
    (tmp_path / "cache" / files.names[0]).write_bytes(b"half")
    dataset._open.clear()
    with pytest.raises(CorruptShardError, match=rf"{files.names[0]} has 4 bytes, dataset\.json says \d+"):
        read(dataset, 32)


def test_skipping_needs_to_know_the_shards_at_once(parted: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"data\.on_bad_shard: skip .* not known before they are fetched"):
        TokenDataset(parted, on_bad_shard="skip", files=FetchedFiles(parted, tmp_path / "cache"))


def test_text_shards_are_to_be_prepared_first(copy: Path) -> None:
    fields = json.loads((copy / MANIFEST).read_text())
    kept = {key: fields[key] for key in ("source", "split")}
    parts = [
        {
            "name": part["name"],
            "files": part["files"],
            "shards": [{k: v for k, v in entry.items() if k not in ("chunks", "tokens")} for entry in part["shards"]],
        }
        for part in fields["parts"]
    ]
    (copy / MANIFEST).write_bytes(make_manifest({**kept, "layout": "text", "parts": parts}).to_bytes())
    assert read_manifest(copy).layout == "text"
    for opening in (TokenDataset, lambda path: Windows(path, sequence_length=8)):
        with pytest.raises(DatasetError, match=r"copy holds text: prepare it"):
            opening(copy)
