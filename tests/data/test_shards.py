"""Shards: deterministic, readable by stock tools, and every kind of damage is noticed and named."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.errors import CorruptShardError, DatasetError
from potamos.data.loader import SourceSpec, StageSpec, TokenStream
from potamos.data.manifest import make_manifest, read_manifest, verify
from potamos.data.shards import CHUNK_TOKENS, ShardIndex, build_index, index_path, scan_tar, token_dtype

LENGTHS = [7, 64, 3000, 5, 1, 9000, 2, 700, 4096, 12, 8000]
CHUNK = 4096  # 8 KiB payloads and one token: two blocks a chunk


@pytest.fixture(scope="module")
def dataset(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ids(tmp_path_factory.mktemp("shards") / "d", LENGTHS, chunk_tokens=CHUNK)


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def open_stream(path: Path, length: int = 64) -> TokenStream:
    return TokenStream([StageSpec(0, (SourceSpec(path),))], sequence_length=length, seed=0)


def test_default_chunk_and_types() -> None:
    assert CHUNK_TOKENS == 262_144
    assert token_dtype(65_535) == np.uint16
    assert token_dtype(65_536) == np.uint32


def test_bytes_depend_on_the_documents_alone(write_ids: Any, dataset: Path, tmp_path: Path) -> None:
    again = write_ids(tmp_path / "again", LENGTHS, chunk_tokens=CHUNK)
    names = sorted(p.name for p in dataset.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    assert len(names) > 6
    for name in names:
        assert (dataset / name).read_bytes() == (again / name).read_bytes()


def test_stock_webdataset_reads_the_shards(dataset: Path, plain_stream: Callable[..., Any]) -> None:
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    tokens, documents, positions = plain_stream(LENGTHS)
    shards = sorted(str(p) for p in dataset.glob("*.tar"))
    seen = 0
    for sample in wds.WebDataset(shards, shardshuffle=False, empty_check=False).decode():
        begin = seen * CHUNK
        expected = tokens[begin : begin + CHUNK + 1]
        assert sample["tok.npy"].dtype == np.uint16
        assert sample["tok.npy"].tolist() == expected
        ends = [i + 1 for i in range(len(expected)) if expected[i] == 0]
        assert sample["doc.npy"].dtype == np.int32
        assert sample["doc.npy"].tolist() == ends
        about = sample["json"]
        assert (about["chunk"], about["tokens"], about["documents"]) == (seen, len(expected), len(ends))
        assert (about["first_document"], about["first_position"]) == (documents[begin], positions[begin])
        seen += 1
    assert seen == -(-(len(tokens) - 1) // CHUNK)


@pytest.mark.parametrize(("lengths", "stored"), [([5, 12], [17]), ([5, 13], [17, 2]), ([16, 17], [17, 17])])
def test_a_repeated_token_alone_makes_no_chunk(
    write_ids: Any, tmp_path: Path, lengths: list[int], stored: list[int]
) -> None:
    path = write_ids(tmp_path / "d", lengths, chunk_tokens=16, shard_chunks=9)
    assert build_index(path / "shard-00000-00000.tar").chunks["tokens"].tolist() == stored
    assert verify(path, deep=True).ok


def test_scanner_agrees_with_tarfile(dataset: Path) -> None:
    shard = dataset / "shard-00000-00000.tar"
    with tarfile.open(shard) as tar:
        stock = [(m.name, m.offset_data, m.size) for m in tar]
        assert all(m.mtime == 0 for m in tar.getmembers())
    assert list(scan_tar(shard.read_bytes(), "x")) == stock


def test_index_is_rebuilt_from_the_shard_alone(dataset: Path) -> None:
    for shard in dataset.glob("*.tar"):
        content = index_path(shard).read_bytes()
        assert build_index(shard).to_bytes() == content
        index = ShardIndex.from_bytes(content, "x")
        assert index.tar_sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
        sizes = -(-index.chunks["tokens"] * 2 // 8192) + -(-index.chunks["documents"] * 4 // 8192)
        assert len(index.crcs) == sizes.sum()


def test_a_sound_dataset_verifies(dataset: Path) -> None:
    report = verify(dataset, deep=True)
    assert report.ok, report.problems
    assert (report.shards, report.chunks) == (4, 7)


def truncate_shard(path: Path) -> None:
    content = (path / "shard-00000-00001.tar").read_bytes()
    (path / "shard-00000-00001.tar").write_bytes(content[:-700])


def drop_shard(path: Path) -> None:
    (path / "shard-00000-00002.tar").unlink()


def truncate_index(path: Path) -> None:
    file = path / "shard-00000-00001.tar.idx"
    file.write_bytes(file.read_bytes()[:-20])


def empty_index(path: Path) -> None:
    (path / "shard-00000-00001.tar.idx").write_bytes(b"")


def flip_index(path: Path) -> None:
    file = path / "shard-00000-00001.tar.idx"
    content = bytearray(file.read_bytes())
    content[80] ^= 4
    file.write_bytes(content)


def drop_index(path: Path) -> None:
    (path / "shard-00000-00001.tar.idx").unlink()


def stale_index(path: Path) -> None:
    """The shard was written again with other ids: same size, new sound index, old dataset.json."""
    shard = path / "shard-00000-00001.tar"
    content = bytearray(shard.read_bytes())
    content[512 + 128 + 10] ^= 1
    shard.write_bytes(content)
    index_path(shard).write_bytes(build_index(shard).to_bytes())


def shorter_shard(path: Path) -> None:
    """The last shard was replaced by a sound one, with its index, of another dataset."""
    for suffix in ("tar", "tar.idx"):
        shutil.copy(path / f"shard-00000-00000.{suffix}", path / f"shard-00000-00003.{suffix}")


def swap_shards(path: Path) -> None:
    """Each with its own sound index."""
    for suffix in ("tar", "tar.idx"):
        one, two, spare = path / f"shard-00000-00001.{suffix}", path / f"shard-00000-00002.{suffix}", path / "spare"
        one.rename(spare)
        two.rename(one)
        spare.rename(two)


def edit_manifest(path: Path) -> None:
    file = path / "dataset.json"
    fields = json.loads(file.read_text())
    fields["max_token"] = 5
    file.write_text(json.dumps(fields))


def cut_manifest(path: Path) -> None:
    file = path / "dataset.json"
    file.write_bytes(file.read_bytes()[:100])


def drop_manifest(path: Path) -> None:
    (path / "dataset.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate_shard, r"shard-00000-00001\.tar has \d+ bytes, dataset.json says \d+"),
        (drop_shard, r"shard-00000-00002\.tar is missing"),
        (truncate_index, r"shard-00000-00001\.tar\.idx has \d+ bytes, dataset.json says \d+"),
        (empty_index, r"shard-00000-00001\.tar\.idx has 0 bytes, dataset.json says \d+"),
        (drop_index, r"shard-00000-00001\.tar\.idx is missing"),
        (swap_shards, r"shard-00000-00001\.tar(\.idx)? has \d+ bytes, dataset.json says \d+"),
        (shorter_shard, r"shard-00000-00003\.tar has \d+ bytes, dataset.json says \d+"),
        (edit_manifest, r"dataset.json was changed after it was written"),
        (cut_manifest, r"dataset.json cannot be read"),
        (drop_manifest, r"holds no dataset.json"),
    ],
)
def test_damage_is_named_at_the_start_of_a_run(copy: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(copy)
    with pytest.raises(DatasetError, match=says):
        open_stream(copy)
    report = verify(copy)
    assert not report.ok
    assert any(says.split(r"\.")[0].split(" ")[0][:8] in problem for problem in report.problems)


@pytest.mark.parametrize("damage", [flip_index, stale_index])
def test_a_damaged_or_stale_index_is_named_when_its_shard_is_first_touched(
    copy: Path, damage: Callable[[Path], None]
) -> None:
    damage(copy)
    stream = open_stream(copy)
    says = r"shard-00000-00001\.tar\.idx is damaged, or stale"
    with pytest.raises(CorruptShardError, match=says):
        stream.read(0, stream.describe()[0].samples_per_epoch)
    assert any("is damaged, or stale" in problem for problem in verify(copy).problems)


def test_missing_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"prepare it with"):
        open_stream(tmp_path / "nowhere")


def test_any_flipped_payload_byte_is_found_on_first_read_and_by_verify(dataset: Path, copy: Path) -> None:
    shard = copy / "shard-00000-00001.tar"
    sound = shard.read_bytes()
    chunk = ShardIndex.from_bytes(index_path(shard).read_bytes(), "x").chunks[1]
    stream = open_stream(copy)
    n = stream.describe()[0].samples_per_epoch
    first_row_of_chunk = 3 * (CHUNK // 64)  # chunks 2 and 3 are in shard 1
    for offset in (0, 1, 5000, 8191, 8192, 8193):
        content = bytearray(sound)
        content[int(chunk["token_offset"]) + offset] ^= 0x10
        shard.write_bytes(content)
        block = int(chunk["token_offset"]) + offset // 8192 * 8192
        says = rf"shard-00000-00001\.tar, chunk 1 of the shard, bytes {block} to "
        with pytest.raises(CorruptShardError, match=says):
            open_stream(copy).read(0, n)
        assert not verify(copy, deep=True).ok
        assert verify(copy, deep=False).ok
    content = bytearray(sound)
    content[int(chunk["end_offset"])] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptShardError, match="chunk 1 of the shard"):
        open_stream(copy).read(0, n)
    # rows that touch no damaged block are still read
    shard.write_bytes(sound)
    content = bytearray(sound)
    content[int(chunk["token_offset"]) + 100] ^= 1
    shard.write_bytes(content)
    windows_before = open_stream(dataset).read(0, n)
    good = [g for g in range(n) if not _touches(stream, g, first_row_of_chunk)]
    assert np.array_equal(open_stream(copy).rows(np.array(good)).tokens, windows_before.tokens[good])


def _touches(stream: TokenStream, sample: int, first_row: int) -> bool:
    _, chunk, *_ = stream._places(np.array([sample]))
    return chunk[0] * (CHUNK // 64) == first_row


def test_a_block_is_checked_once(copy: Path) -> None:
    """A run does not pay for a block twice: damage done after the first read goes unseen by this process."""
    stream = open_stream(copy)
    before = stream.read(0, 50).tokens
    shard = copy / "shard-00000-00000.tar"
    with open(shard, "r+b") as file:
        file.seek(512 + 128)
        file.write(b"\xff")
    assert stream.read(0, 50).tokens.shape == before.shape


def test_scanner_refuses_damaged_archives(dataset: Path) -> None:
    sound = (dataset / "shard-00000-00000.tar").read_bytes()
    members = list(scan_tar(sound, "x"))
    header = members[1][1] - 512

    def broken(at: int, value: bytes) -> bytes:
        return sound[:at] + value + sound[at + len(value) :]

    for content, says in [
        (sound[:-512], "truncated inside its end-of-archive"),
        (sound[:-1024], "no end-of-archive"),
        (sound[: members[1][1] + 3], "truncated: member"),
        (sound[:300], "truncated"),
        (broken(header, b"X"), f"byte {header}: the tar header's checksum"),
        (broken(header + 124, b"zzz"), "no tar header"),
        (sound[:-1024] + sound, "twice"),
    ]:
        with pytest.raises(CorruptShardError, match=says):
            list(scan_tar(content, "x.tar"))


# Where the fields of a USTAR header begin: name, mode, uid, gid, size, mtime, checksum, type, link name, magic,
# version, owner, group, device numbers, prefix, filling.
HEADER_FIELDS = (0, 100, 108, 116, 124, 136, 148, 156, 157, 257, 263, 265, 297, 329, 337, 345, 500)


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # NumPy takes a damaged header for one of Python 2
def test_any_flipped_byte_of_a_dataset_is_reported_and_named(write_ids: Any, tmp_path: Path) -> None:
    """Every byte but the fillings of tar headers, of which both ends are flipped; nothing is ever an uncaught error."""
    path = write_ids(tmp_path / "d", [9, 30, 12, 40], chunk_tokens=64, shard_chunks=1)
    shard = path / "shard-00000-00000.tar"
    members = list(scan_tar(shard.read_bytes(), "x"))
    places = set(range(members[-1][1] + members[-1][2] - 2, shard.stat().st_size, 61))  # padding, end blocks
    for _, offset, size in members:
        fields = [offset - 512 + field for field in HEADER_FIELDS]
        places |= {*fields, *(field - 1 for field in fields[1:]), offset - 1}
        places |= {*range(offset, offset + size), offset + size, offset + size + -size % 512 - 1}
    for file, where in [(shard, places), (index_path(shard), range(index_path(shard).stat().st_size))]:
        sound = file.read_bytes()
        for at in sorted(where):
            for flip in (0x01, 0x42):
                file.write_bytes(sound[:at] + bytes([sound[at] ^ flip]) + sound[at + 1 :])
                report = verify(path, deep=True)
                assert len(report.problems) == 1, (at, flip)
                assert file.name in report.problems[0], (at, flip)
        file.write_bytes(sound)
    assert verify(path, deep=True).ok


def test_any_flipped_byte_of_dataset_json_is_reported_or_only_layout(write_ids: Any, tmp_path: Path) -> None:
    path = write_ids(tmp_path / "d", [9, 30], chunk_tokens=64, shard_chunks=1)
    file = path / "dataset.json"
    sound = file.read_bytes()
    harmless = 0
    for at in range(len(sound)):
        for flip in (0x01, 0x20, 0x2A):  # the last makes a space a line's end
            file.write_bytes(sound[:at] + bytes([sound[at] ^ flip]) + sound[at + 1 :])
            if verify(path).ok:
                harmless += 1
                assert json.loads(file.read_bytes()) == json.loads(sound)
            else:
                with pytest.raises(DatasetError, match=r"dataset\.json"):
                    open_stream(path, 8)
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
        open_stream(copy)
    rewrite_manifest(copy, lambda fields: fields.update({field: None}))
    with pytest.raises(DatasetError, match=rf"dataset\.json: field '{field}' is None, not"):
        open_stream(copy)
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
        open_stream(copy)
    assert not verify(copy).ok


def test_another_index_of_the_same_shard_is_refused(copy: Path) -> None:
    """Sound in itself and made for these very bytes, but not what prepare wrote: only dataset.json's hash tells."""
    file = copy / "shard-00000-00001.tar.idx"
    index = ShardIndex.from_bytes(file.read_bytes(), "x")
    chunks = index.chunks.copy()
    chunks["first_document"] += 1
    file.write_bytes(dataclasses.replace(index, chunks=chunks).to_bytes())
    stream = open_stream(copy)
    with pytest.raises(CorruptShardError, match=r"shard-00000-00001\.tar\.idx is damaged, or stale"):
        stream.read(0, stream.describe()[0].samples_per_epoch)


ABOUT = {"chunk": 0, "documents": 1, "first_document": 0, "first_position": 0, "source": "x", "tokens": 3}
SOUND = {"tok.npy": np.array([4, 5, 0], "<u2"), "doc.npy": np.array([3], "<i4"), "json": json.dumps(ABOUT).encode()}
HEADER = {"descr": "<u2", "fortran_order": False, "shape": (3,)}


def npy(header: str, payload: bytes = bytes(6)) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + payload


@pytest.mark.parametrize(
    ("suffix", "content", "says"),
    [
        ("json", b'{"first_document": 0,', "is not JSON"),
        ("json", b"\xff", "is not JSON"),
        ("json", b"[" * 100_000, "is not JSON"),
        ("json", b"[0, 0]", r"first_position as \[None, None\]"),
        ("json", json.dumps({"first_document": 0}).encode(), r"\[0, None\]"),
        ("json", json.dumps({**ABOUT, "first_position": "0"}).encode(), r"\[0, '0'\]"),
        ("json", json.dumps({**ABOUT, "first_document": -1}).encode(), r"\[-1, 0\]"),
        ("json", json.dumps({**ABOUT, "first_document": 2**63}).encode(), "as"),
        ("tok.npy", b"not an array", "not a version 1.0"),
        ("tok.npy", npy("{'descr': '<u2'"), "no .npy header"),
        ("tok.npy", npy(str(HEADER).replace(", 'f", ",b'f")), "no .npy header"),
        ("tok.npy", npy(str(HEADER).replace("(3,)", "(4,)")), "does not fill"),
        ("tok.npy", np.array([4, 5, 0], "<i8"), "token types"),
        ("doc.npy", np.array([3.0], "<f4"), "holds float32, expected int32"),
    ],
)
def test_a_damaged_member_is_named(tmp_path: Path, suffix: str, content: Any, says: str) -> None:
    """Sound checksums around it, as from a faulty writer: the shard is scanned without an index to compare with."""
    shard = tmp_path / "shard-00000-00000.tar"
    for parts, fails in [(SOUND, False), ({**SOUND, suffix: content}, True)]:
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, part in parts.items():
                file = io.BytesIO()
                if isinstance(part, bytes):
                    file.write(part)
                else:
                    np.lib.format.write_array(file, part, version=(1, 0))
                info = tarfile.TarInfo(f"00000000.{name}")
                info.size = file.tell()
                file.seek(0)
                tar.addfile(info, file)
        if not fails:
            assert build_index(shard).chunks["tokens"].tolist() == [3]
            continue
        with pytest.raises(CorruptShardError, match=says) as caught:
            build_index(shard)
        assert "shard-00000-00000.tar" in str(caught.value)
        assert says == "token types" or f"00000000.{suffix}" in str(caught.value)


def test_an_index_whose_table_does_not_fit_is_refused(dataset: Path) -> None:
    """Its own checksum holds, as after a faulty writer."""
    sound = (dataset / "shard-00000-00000.tar.idx").read_bytes()
    for at, value in [(12, 3), (12, 2**31), (20, 9999)]:  # bytes of a token; chunks
        body = sound[:at] + struct.pack("<I", value) + sound[at + 4 : -4]
        with pytest.raises(CorruptShardError, match=r"x\.idx: .* do not fit the file"):
            ShardIndex.from_bytes(body + struct.pack("<I", zlib.crc32(body)), "x.idx")


def test_verify_finds_ids_above_what_dataset_json_promises(write_ids: Any, tmp_path: Path) -> None:
    path = write_ids(tmp_path / "d", [30, 30], chunk_tokens=16)
    (path / "shard-00000-00009.tar").write_bytes(b"")
    report = verify(path)
    assert "shard-00000-00009.tar is not listed" in report.problems[0]
    assert read_manifest(path).max_token < 300
