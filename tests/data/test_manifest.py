"""dataset.json and `verify`: every change, every wrong field and every broken promise is noticed and named."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.dataset import TokenDataset
from potamos.data.errors import DatasetError
from potamos.data.manifest import make_manifest, read_manifest, totals, verify
from potamos.data.shards import build_index, shard_entry


@pytest.fixture(scope="module")
def dataset(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = [7, 64, 3000, 5, 1, 9000, 2, 700, 4096, 12, 8000]
    return write_ids(tmp_path_factory.mktemp("manifest") / "d", lengths, chunk_tokens=4096)


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DatasetError, match=r"holds no dataset\.json: .*prepare it with"):
            TokenDataset(place)
        assert "holds no dataset.json" in verify(place).problems[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (b'{"format": "potamos-tokens", "ver', "cannot be read"),
        (b"\xff\xfe\xfd", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "does not describe a token dataset"),
        (b'{"format": "parquet"}', "does not describe a token dataset"),
        (b'{"format": "potamos-tokens", "version": 1}', "has format version 1; this program reads 2; prepare it"),
        (b'{"format": "potamos-tokens", "version": 2}', "was changed after it was written"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "dataset.json").write_bytes(content)
    with pytest.raises(DatasetError, match=rf"dataset\.json {says}"):
        TokenDataset(tmp_path)
    assert says in verify(tmp_path).problems[0]


def test_a_changed_field_does_not_keep_its_fingerprint(copy: Path) -> None:
    file = copy / "dataset.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "source": {"kind": "another"}}))
    with pytest.raises(DatasetError, match=r"dataset\.json was changed after it was written"):
        TokenDataset(copy)


def test_what_is_read_is_what_was_written(dataset: Path) -> None:
    manifest = read_manifest(dataset)
    assert manifest.to_bytes() == (dataset / "dataset.json").read_bytes()
    assert make_manifest(manifest.fields) == manifest
    assert manifest.layout == "chunks"
    assert manifest.shards == [entry for part in manifest.parts for entry in part["shards"]]


def test_totals_add_up() -> None:
    one = dict.fromkeys(("tokens", "documents", "text_bytes", "blank", "rejected", "mended", "duplicates"), 3)
    two = dict.fromkeys(one, 4)
    assert totals([{**one, "max_token": 9}, {**two, "max_token": 5}]) == {**dict.fromkeys(one, 7), "max_token": 9}
    assert totals([]) == {**dict.fromkeys(one, 0), "max_token": 0}


def test_any_flipped_byte_of_dataset_json_is_reported_or_only_layout(write_ids: Any, tmp_path: Path) -> None:
    path = write_ids(tmp_path / "d", [9, 30], chunk_tokens=64, shard_chunks=1)
    file = path / "dataset.json"
    sound = file.read_bytes()
    harmless = 0
    for at in range(len(sound)):
        for flip in (0x01, 0x20, 0x2A):  # the last makes a space a line's end
            with open(file, "r+b") as opened:
                opened.write(sound[:at] + bytes([sound[at] ^ flip]))
            if verify(path).ok:
                harmless += 1
                assert json.loads(file.read_bytes()) == json.loads(sound)
            else:
                with pytest.raises(DatasetError, match=r"dataset\.json"):
                    TokenDataset(path)
        with open(file, "r+b") as opened:
            opened.write(sound)
    assert 0 < harmless < len(sound)


def shards(fields: dict[str, Any]) -> list[Any]:
    return fields["parts"][0]["shards"]


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """dataset.json edited by someone who also mends its fingerprint."""
    fields = json.loads((path / "dataset.json").read_text())
    del fields["fingerprint"]
    change(fields)
    (path / "dataset.json").write_bytes(make_manifest(fields).to_bytes())


REQUIRED = (
    "layout", "source", "split", "tokenizer", "dtype", "chunk_tokens", "shard_chunks", "deduplicated", "parts",
    "tokens", "documents", "text_bytes", "max_token", "blank", "rejected", "mended", "duplicates",
)  # fmt: skip


@pytest.mark.parametrize("field", REQUIRED)
def test_a_field_missing_from_dataset_json_is_named(copy: Path, field: str) -> None:
    rewrite_manifest(copy, lambda fields: fields.pop(field))
    with pytest.raises(DatasetError, match=rf"dataset\.json: field '{field}' is missing"):
        TokenDataset(copy)
    rewrite_manifest(copy, lambda fields: fields.update({field: None}))
    with pytest.raises(DatasetError, match=rf"dataset\.json: field '{field}' is None, not"):
        TokenDataset(copy)
    assert not verify(copy).ok


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda fields: fields["tokenizer"].pop("sha256"), r"'tokenizer\.sha256' is missing"),
        (lambda fields: fields["tokenizer"].update(end_of_document="0"), r"'tokenizer\.end_of_document' is '0', not"),
        (lambda fields: shards(fields)[1].pop("index_sha256"), r"'parts\[0\]\.shards\[1\]\.index_sha256' is missing"),
        (lambda fields: shards(fields).append("x.tar"), r"'parts\[0\]\.shards\[4\]' is 'x\.tar', not a table"),
        (lambda fields: shards(fields)[0].update(name="../d/x.tar"), r"'parts\[0\]\.shards\[0\]\.name' is .*file name"),
        (lambda fields: shards(fields)[2].update(shards(fields)[1]), r"'parts\[0\]\.shards\[2\]\.name' is .*its own"),
        (lambda fields: shards(fields)[1].update(tokens=8193), r"'parts\[0\]\.shards\[1\]\.tokens' is 8193, not 8194"),
        (lambda fields: shards(fields)[3].update(tokens=1), r"'parts\[0\]\.shards\[3\]\.tokens' is 1, not 2 to 4097"),
        (lambda fields: shards(fields)[3].update(chunks=0), r"'parts\[0\]\.shards\[3\]\.chunks' is 0, not at least 1"),
        (lambda fields: fields["parts"][0].pop("documents"), r"'parts\[0\]\.documents' is missing"),
        (lambda fields: fields["parts"][0].update(blank=1), r"'blank' is 0, not 1, as its parts say"),
        (lambda fields: fields.update(max_token=5), r"'max_token' is 5, not 299, as its parts say"),
        (lambda fields: fields.update(layout="rows"), r"'layout' is 'rows', not one of chunks, members, text"),
        (lambda fields: fields.update(parts=[]), "'parts' is .*at least one shard"),
        (lambda fields: fields.update(deduplicated=0), "'deduplicated' is 0, not bool"),
        (lambda fields: fields.update(chunk_tokens=0), "'chunk_tokens' is 0, not at least 1"),
        (lambda fields: fields.update(documents=True), "'documents' is True, not a whole number"),
        (lambda fields: fields.update(tokens=-1), "'tokens' is -1, not a whole number"),
        (lambda fields: fields.update(tokens=7), "'tokens' is 7, not 24887, as its parts say"),
        (lambda fields: fields.update(dtype="<f4"), "'dtype' is '<f4', not '<u2' or '<u4'"),
    ],
)
def test_a_wrong_field_of_dataset_json_is_named(copy: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    rewrite_manifest(copy, change)
    with pytest.raises(DatasetError, match=rf"dataset\.json: field {says}"):
        TokenDataset(copy)
    assert not verify(copy).ok


def test_verify_finds_ids_above_what_dataset_json_promises(copy: Path) -> None:
    def promise_less(fields: dict[str, Any]) -> None:
        fields["max_token"] = fields["parts"][0]["max_token"] = 250

    rewrite_manifest(copy, promise_less)
    assert verify(copy).ok
    assert re.search(r"chunk 0: token 299 is above the promised 250", verify(copy, deep=True).problems[0])


def test_verify_finds_shards_that_dataset_json_does_not_list(copy: Path) -> None:
    (copy / "shard-00000-00009.tar").write_bytes(b"")
    (problem,) = verify(copy).problems
    assert re.search(r"shard-00000-00009\.tar is not listed in dataset\.json; remove it", problem)


def write_chunks(folder: Path, chunks: list[tuple[list[int], list[int], int, int]]) -> Path:
    """A dataset of one shard of given chunks (ids, ends, first document, first position), sound in its checksums."""
    folder.mkdir()
    with tarfile.open(folder / "shard-00000-00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (ids, ends, document, position) in enumerate(chunks):
            about = {"first_document": document, "first_position": position}
            arrays = {"tok.npy": np.array(ids, "<u2"), "doc.npy": np.array(ends, "<i4")}
            for name, part in {**arrays, "json": json.dumps(about).encode()}.items():
                file = io.BytesIO()
                file.write(part) if isinstance(part, bytes) else np.lib.format.write_array(file, part, version=(1, 0))
                info = tarfile.TarInfo(f"{number:08d}.{name}")
                info.size = file.tell()
                file.seek(0)
                tar.addfile(info, file)
    index = build_index(folder / "shard-00000-00000.tar")
    (folder / "shard-00000-00000.tar.idx").write_bytes(index.to_bytes())
    entry = shard_entry("shard-00000-00000.tar", index, index.to_bytes())
    part = dict.fromkeys(("text_bytes", "blank", "rejected", "mended", "duplicates"), 0)
    tokens = entry["tokens"] - entry["chunks"] + 1
    part |= {"name": "x", "files": [], "shards": [entry], "tokens": tokens, "documents": 3, "max_token": 9}
    tokenizer = {"kind": "json", "sha256": "t" * 64, "vocabulary": 10, "end_of_document": 0}
    settings = {"source": {}, "split": "all", "tokenizer": tokenizer, "dtype": "<u2", "chunk_tokens": 4}
    settings |= {"shard_chunks": 2, "layout": "chunks", "deduplicated": False, "parts": [part], **totals([part])}
    (folder / "dataset.json").write_bytes(make_manifest(settings).to_bytes())
    return folder


CHUNKS = [([1, 2, 0, 3, 4], [3], 0, 0), ([4, 0, 5, 0], [2, 4], 1, 1)]


@pytest.mark.parametrize(
    ("number", "chunk", "says"),
    [
        (0, ([1, 2, 0, 3, 4], [2], 0, 0), "chunk 0: document ends do not match"),
        (0, ([1, 2, 0, 3, 4], [], 0, 0), "chunk 0: document ends do not match"),
        (0, ([1, 2, 0, 3, 4], [3], 1, 0), "chunk 0: begins with token 0 of document 1, not 0 of 0"),
        (1, ([4, 0, 5, 0], [2, 4], 2, 1), "chunk 1: begins with token 1 of document 2, not 1 of 1"),
        (1, ([4, 0, 5, 0], [2, 4], 1, 0), "chunk 1: begins with token 0 of document 1, not 1 of 1"),
        (1, ([5, 0, 5, 0], [2, 4], 1, 1), "chunk 1: begins with token id 5, the chunk before ends with another"),
        (1, ([4, 0, 5, 6], [2], 1, 1), "part x ends inside a document"),
        (1, ([4, 5, 5, 0], [4], 1, 1), "part x hold 2 documents, dataset.json says 3"),
    ],
)
def test_a_deep_check_finds_chunks_that_do_not_go_on(tmp_path: Path, number: int, chunk: Any, says: str) -> None:
    """What a faulty writer would leave, with every checksum right."""
    assert verify(write_chunks(tmp_path / "sound", CHUNKS), deep=True).ok
    faulty = [*CHUNKS]
    faulty[number] = chunk
    path = write_chunks(tmp_path / "faulty", faulty)
    assert verify(path).ok
    problems = verify(path, deep=True).problems
    assert any(says in problem for problem in problems), problems
