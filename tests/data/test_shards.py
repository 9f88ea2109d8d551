"""Shards: deterministic, readable by stock tools, and every kind of damage is noticed and named."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import re
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.errors import CorruptShardError, DatasetError, TokenizerMismatchError
from potamos.data.manifest import make_manifest, read_manifest, verify
from potamos.data.shards import CHUNK_TOKENS, ShardIndex, build_index, index_path, shard_entry, token_dtype

LENGTHS = [7, 64, 3000, 5, 1, 9000, 2, 700, 4096, 12, 8000]
CHUNK = 4096  # 8 KiB payloads and one token: two blocks a chunk


@pytest.fixture(scope="module")
def dataset(write_ids: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ids(tmp_path_factory.mktemp("shards") / "d", LENGTHS, chunk_tokens=CHUNK)


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


def read_all(path: Path, length: int = 64) -> tuple[np.ndarray, ...]:
    """Tokens, document ids, positions of all rows in order, as a run reads them."""
    dataset = TokenDataset(path)
    cut = dataset.cut(length)
    return read_rows([dataset], np.zeros(cut.total, int), *cut.place(np.arange(cut.total)), length + 1)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """dataset.json edited by someone who also mends its fingerprint."""
    fields = json.loads((path / "dataset.json").read_text())
    del fields["fingerprint"]
    change(fields)
    (path / "dataset.json").write_bytes(make_manifest(fields).to_bytes())


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


def members_of(shard: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(shard) as tar:
        return tar.getmembers()


def test_members_are_plain_and_depend_on_no_clock(dataset: Path) -> None:
    for shard in dataset.glob("*.tar"):
        for member in members_of(shard):
            assert (member.mtime, member.uid, member.gid, member.uname, member.type) == (0, 0, 0, "", b"0")
            assert member.pax_headers == {}


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
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named_at_the_start_of_a_run(copy: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(copy)
    with pytest.raises(DatasetError, match=says):
        TokenDataset(copy)
    report = verify(copy)
    assert not report.ok
    assert any(says.split(r"\.")[0].split(" ")[0][:8] in problem for problem in report.problems)


@pytest.mark.parametrize("damage", [flip_index, stale_index])
def test_a_damaged_or_stale_index_is_named_when_its_shard_is_first_touched(
    copy: Path, damage: Callable[[Path], None]
) -> None:
    damage(copy)
    TokenDataset(copy)
    says = r"shard-00000-00001\.tar\.idx is damaged, or stale"
    with pytest.raises(CorruptShardError, match=says):
        read_all(copy)
    assert any("is damaged, or stale" in problem for problem in verify(copy).problems)


def test_a_flipped_byte_is_named_by_shard_chunk_and_offset(dataset: Path, copy: Path) -> None:
    shard = copy / "shard-00000-00001.tar"
    sound = shard.read_bytes()
    chunk = ShardIndex.from_bytes(index_path(shard).read_bytes(), "x").chunks[1]
    for offset in (0, 1, 5000, 8191, 8192, 8193):
        content = bytearray(sound)
        content[int(chunk["token_offset"]) + offset] ^= 0x10
        shard.write_bytes(content)
        block = int(chunk["token_offset"]) + offset // 8192 * 8192
        says = rf"shard-00000-00001\.tar, chunk 1 of the shard, bytes {block} to .*: crc32"
        with pytest.raises(CorruptShardError, match=says):
            read_all(copy)
        assert not verify(copy, deep=True).ok
        assert verify(copy, deep=False).ok
    content = bytearray(sound)
    content[int(chunk["end_offset"])] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptShardError, match="chunk 1 of the shard"):
        read_all(copy)


def test_rows_that_touch_no_damaged_block_are_read(dataset: Path, copy: Path) -> None:
    shard = copy / "shard-00000-00001.tar"
    content = bytearray(shard.read_bytes())
    content[int(ShardIndex.from_bytes(index_path(shard).read_bytes(), "x").chunks[1]["token_offset"]) + 100] ^= 1
    shard.write_bytes(content)
    expected, opened = read_all(dataset)[0], TokenDataset(copy)
    cut = opened.cut(64)
    chunk, start = cut.place(np.arange(cut.total))
    good = np.flatnonzero((chunk != 3) | (start >= 4096))  # chunks 2 and 3 are in shard 1; a block is 4,096 ids
    tokens, *_ = read_rows([opened], np.zeros(len(good), int), chunk[good], start[good], 65)
    assert np.array_equal(tokens, expected[good])
    with pytest.raises(CorruptShardError):
        read_all(copy)


def test_a_row_checks_every_block_it_touches(copy: Path) -> None:
    """A row over the seam of two blocks, the second one damaged where the row ends."""
    shard = copy / "shard-00000-00000.tar"
    content = bytearray(shard.read_bytes())
    content[int(ShardIndex.from_bytes(index_path(shard).read_bytes(), "x").chunks[0]["token_offset"]) + 8192] ^= 1
    shard.write_bytes(content)
    zero, start = np.zeros(1, int), np.array([4000])
    read_rows([TokenDataset(copy)], zero, zero, start, 96)  # ids 4000 to 4095
    with pytest.raises(CorruptShardError, match="chunk 0 of the shard"):
        read_rows([TokenDataset(copy)], zero, zero, start, 97)


def test_a_block_is_checked_once(copy: Path) -> None:
    """A run does not pay for a block twice: damage done after the first read goes unseen by this process."""
    dataset = TokenDataset(copy)
    one = (np.zeros(1, int), np.zeros(1, int), np.zeros(1, int))
    before = read_rows([dataset], *one, 65)[0][0, 1:]
    with open(copy / "shard-00000-00000.tar", "r+b") as file:
        file.seek(512 + 128)
        file.write(b"\xff")
    assert np.array_equal(read_rows([dataset], *one, 65)[0][0, 1:], before)


def test_a_damaged_archive_is_refused_where_it_is_damaged(dataset: Path, tmp_path: Path) -> None:
    """A corrupt header in the middle and a missing end-of-archive, where stock readers stop without a word."""
    sound = (dataset / "shard-00000-00000.tar").read_bytes()
    header = members_of(dataset / "shard-00000-00000.tar")[1].offset_data - 512

    def broken(at: int, value: bytes) -> bytes:
        return sound[:at] + value + sound[at + len(value) :]

    shard = tmp_path / "x.tar"
    for content, says in [
        (sound[:-512], "truncated inside its end-of-archive"),
        (sound[:-1024], "no end-of-archive"),
        (sound[: header + 515], "truncated: member"),
        (sound[:300], "truncated"),
        (broken(header, b"X"), f"byte {header}: the tar header's checksum"),
        (broken(header + 124, b"zzz"), "no tar header"),
        (b"", "is empty"),
    ]:
        shard.write_bytes(content)
        with pytest.raises(CorruptShardError, match=rf"x\.tar.*{says}"):
            build_index(shard)


def test_duplicate_keys_are_refused_adjacent_and_apart(dataset: Path, copy: Path) -> None:
    """Both as in a shard that another tool wrote, where index and dataset.json agree with it."""
    sound = (dataset / "shard-00000-00000.tar").read_bytes()
    first, second, _, other = members_of(dataset / "shard-00000-00000.tar")[:4]
    whole = sound[: other.offset]  # the first chunk
    twice = sound[: second.offset] + sound
    shard = copy / "shard-00000-00000.tar"
    index = ShardIndex.from_bytes(index_path(shard).read_bytes(), "x")
    for content, says in [
        (twice, rf"key '00000000' has field '{first.name[9:]}' twice"),
        (sound[:-1024] + whole + bytes(1024), "key '00000000' comes again after other samples"),
    ]:
        shard.write_bytes(content)
        with pytest.raises(CorruptShardError, match=rf"shard-00000-00000\.tar, byte \d+: {says}"):
            build_index(shard)
        sha256 = hashlib.sha256(content).hexdigest()
        agreeing = dataclasses.replace(index, tar_bytes=len(content), tar_sha256=sha256).to_bytes()
        index_path(shard).write_bytes(agreeing)
        entry = shard_entry(shard.name, ShardIndex.from_bytes(agreeing, "x"), agreeing)
        rewrite(copy, lambda fields, entry=entry: fields["parts"][0]["shards"][0].update(entry))
        assert verify(copy).ok
        assert re.search(says, verify(copy, deep=True).problems[0])


# Where the fields of a USTAR header begin: name, mode, uid, gid, size, mtime, checksum, type, link name, magic,
# version, owner, group, device numbers, prefix, filling.
HEADER_FIELDS = (0, 100, 108, 116, 124, 136, 148, 156, 157, 257, 263, 265, 297, 329, 337, 345, 500)


@pytest.mark.filterwarnings("ignore:Reading `.npy`")  # NumPy takes a damaged header for one of Python 2
def test_any_flipped_byte_of_a_dataset_is_reported_and_named(write_ids: Any, tmp_path: Path) -> None:
    """Every byte but the fillings of tar headers, of which both ends are flipped; nothing is ever an uncaught error."""
    path = write_ids(tmp_path / "d", [9, 30, 12, 40], chunk_tokens=64, shard_chunks=1)
    shard = path / "shard-00000-00000.tar"
    members = [(member.offset_data, member.size) for member in members_of(shard)]
    places = set(range(sum(members[-1]) - 2, shard.stat().st_size, 61))  # padding, end blocks
    for offset, size in members:
        fields = [offset - 512 + field for field in HEADER_FIELDS]
        places |= {*fields, *(field - 1 for field in fields[1:]), offset - 1}
        places |= {*range(offset, offset + size), offset + size, offset + size + -size % 512 - 1}
    for file, where in [(shard, places), (index_path(shard), range(index_path(shard).stat().st_size))]:
        sound = file.read_bytes()
        for at in sorted(where):
            for flip in (0x01, 0x42):
                with open(file, "r+b") as opened:
                    opened.seek(at)
                    opened.write(bytes([sound[at] ^ flip]))
                report = verify(path, deep=True)
                assert len(report.problems) == 1, (at, flip)
                assert file.name in report.problems[0], (at, flip)
            with open(file, "r+b") as opened:
                opened.write(sound)
    assert verify(path, deep=True).ok


def test_another_index_of_the_same_shard_is_refused(copy: Path) -> None:
    """Sound in itself and made for these very bytes, but not what prepare wrote: only dataset.json's hash tells."""
    file = copy / "shard-00000-00001.tar.idx"
    index = ShardIndex.from_bytes(file.read_bytes(), "x")
    chunks = index.chunks.copy()
    chunks["first_document"] += 1
    file.write_bytes(dataclasses.replace(index, chunks=chunks).to_bytes())
    with pytest.raises(CorruptShardError, match=r"shard-00000-00001\.tar\.idx is damaged, or stale"):
        read_all(copy)


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


def test_a_token_beyond_the_models_vocabulary_is_refused_at_the_start(dataset: Path) -> None:
    highest = read_manifest(dataset).max_token
    assert highest == max(int(read_all(dataset, 1)[0].max()), 0) == 299
    TokenDataset(dataset, vocabulary=300)
    with pytest.raises(DatasetError, match=r"holds token id 299, the model's vocabulary ends at 298; .* at least 300"):
        TokenDataset(dataset, vocabulary=299)


def test_another_tokenizer_than_the_datasets_is_refused_at_the_start(dataset: Path) -> None:
    TokenDataset(dataset, tokenizer_sha256="t" * 64)
    with pytest.raises(TokenizerMismatchError, match=r"was prepared with tokenizer tttttttttttt, the run uses uuuu"):
        TokenDataset(dataset, tokenizer_sha256="u" * 64)


def test_default_chunks_cost_less_than_a_hundredth(
    write_ids: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tar and index beside the ids alone, for documents of about 900 ids (4 KiB of English text)."""
    rng = np.random.default_rng(0)
    lengths = (rng.exponential(899, 2400).astype(int) + 1).tolist()
    path = write_ids(tmp_path / "d", lengths, chunk_tokens=CHUNK_TOKENS, shard_chunks=512, vocabulary=50_257)
    assert abs(sum(lengths) / len(lengths) - 900) < 50
    assert sum(lengths) > 8 * CHUNK_TOKENS
    stored = sum(file.stat().st_size for file in path.glob("*.tar*"))
    overhead = stored / (2 * sum(lengths)) - 1
    with capsys.disabled():
        print(f"\n  {sum(lengths)} ids in {stored} bytes: {100 * overhead:.2f} % over the ids alone")
    assert overhead < 0.01
