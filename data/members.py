"""Foreign tars as shards: an index of the members of one field, and reading them as one stream of ids.

A shard of token members is one stream: its members in the order of the tar, with the end-of-document id after each
member that lacks one (``documents="members"``), or exactly as stored (``documents="rows"``: fixed rows cut from a
stream). Documents end at every end-of-document id. The index (``<tar>.idx``, little endian) is
    header | a MEMBER record per member | int64 document ends in the stream | uint32 crc32 per 8 KiB of the tar |
    uint32 crc32 of all before
The crc32s cover the whole file, so no byte of a foreign tar goes unchecked, its headers included.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from potamos.data.archive import Member, map_tar, samples
from potamos.data.errors import CorruptShardError, DatasetError
from potamos.data.manifest import MANIFEST, Manifest, read_index
from potamos.data.shards import index_path

CRC_BLOCK = 8192
DOCUMENTS = ("members", "rows")
INDEX_VERSION = 1
MAGIC = b"POTAMEMB"
_HEADER = struct.Struct("<8sIIqQQQQ32s")  # magic, version, crc block, end id, members, ends, stream, tar bytes, sha256
MEMBER = np.dtype(
    [
        ("offset", "<i8"),  # byte offset of the payload in the tar
        ("count", "<i8"),  # ids, or bytes of text, that the payload holds
        ("begin", "<i8"),  # where they begin in the shard's stream
        ("type", "u1"),  # number in TYPES
    ]
)
TYPES = (
    *map(np.dtype, ("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", ">u2", ">i2", ">u4", ">i4", ">u8", ">i8")),
)
TEXT = 255  # in place of a number in TYPES: bytes of text
_AGAIN = "fetch the tar again, or index it again if it is meant to be so"


@dataclass(frozen=True)
class MemberIndex:
    """The content of one ``.idx`` of a foreign tar."""

    tar_bytes: int
    tar_sha256: str
    end_of_document: int  # -1 for text
    tokens: int  # length of the stream, or bytes of text
    members: np.ndarray  # MEMBER
    ends: np.ndarray  # int64, one past each end-of-document id of the stream
    crcs: np.ndarray

    @property
    def documents(self) -> int:
        """Documents of the stream; one without an end at its end counts."""
        return len(self.ends) + int(self.tokens > (self.ends[-1] if len(self.ends) else 0))

    def to_bytes(self) -> bytes:
        """The file's content."""
        header = _HEADER.pack(
            MAGIC, INDEX_VERSION, CRC_BLOCK, self.end_of_document, len(self.members), len(self.ends), self.tokens,
            self.tar_bytes, bytes.fromhex(self.tar_sha256),
        )  # fmt: skip
        tables = (self.members, self.ends.astype("<i8"), self.crcs.astype("<u4"))
        body = header + b"".join(table.tobytes() for table in tables)
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def from_bytes(cls, content: bytes, place: str) -> MemberIndex:
        """Parse and check a file's content; ``place`` names it in errors."""
        remedy = "copy the dataset again, or run `potamos data index` again"
        if len(content) < _HEADER.size + 4 or content[:8] != MAGIC:
            raise CorruptShardError(
                f"{place} is not an index of a foreign tar or is truncated ({len(content)} bytes); {remedy}"
            )
        _, version, block, end, members, ends, tokens, tar_bytes, sha256 = _HEADER.unpack_from(content)
        if version != INDEX_VERSION:
            raise CorruptShardError(f"{place} has index version {version}; this program reads {INDEX_VERSION}")
        if zlib.crc32(content[:-4]) != struct.unpack("<I", content[-4:])[0] or block != CRC_BLOCK:
            raise CorruptShardError(f"{place} is truncated or damaged (its own checksum does not hold); {remedy}")
        blocks = -(-tar_bytes // CRC_BLOCK)
        at = np.cumsum([_HEADER.size, members * MEMBER.itemsize, ends * 8, blocks * 4]).tolist()
        if at[-1] + 4 != len(content):
            raise CorruptShardError(f"{place}: {members} members and {ends} documents do not fit the file; {remedy}")
        table = np.frombuffer(content, MEMBER, members, at[0])
        known = (table["type"] == TEXT) if end < 0 else (table["type"] < len(TYPES))
        if not known.all() or (np.diff(table["begin"], append=tokens) < table["count"]).any():
            raise CorruptShardError(f"{place}: members of unknown types, or that overlap; {remedy}")
        stream_ends = np.frombuffer(content, "<i8", ends, at[1])
        return cls(
            tar_bytes, sha256.hex(), end, tokens, table, stream_ends, np.frombuffer(content, "<u4", blocks, at[2])
        )


class MemberShard:
    """One mapped tar of token members, read as one stream of ``tokens`` ids.

    Args:
        path: the tar; its index lies beside it.
        entry: what dataset.json says of the shard.
        manifest: of the dataset.
        first_document: number of the shard's first document in the dataset.

    Raises:
        CorruptShardError: tar or index are missing, truncated, or not those that dataset.json lists.
    """

    def __init__(self, path: Path, entry: dict[str, Any], manifest: Manifest, first_document: int = 0):
        self.path, self.first_document = path, first_document
        self.index = index = open_member_index(path, entry, manifest.tokenizer["end_of_document"])
        self.tokens = index.tokens
        self._checked = bytearray(len(index.crcs))
        self._bytes = map_tar(path)
        if len(self._bytes) != index.tar_bytes:
            raise CorruptShardError(f"shard {path} has {len(self._bytes)} bytes, {MANIFEST} says {index.tar_bytes}")
        self._begin = np.ascontiguousarray(index.members["begin"])

    def read_row(self, start: int, stop: int, out: np.ndarray) -> tuple[int, int, np.ndarray]:
        """Copy ids [start, stop) of the stream to ``out``, int32 of shape (stop - start,).

        Returns:
            The number of the first id's document in the shard, the id's place in that document, and where in ``out``
            other documents begin, int64.

        Raises:
            CorruptShardError: a block read for the first time does not match its crc32.
        """
        index = self.index
        assert 0 <= start < stop <= index.tokens, "rows do not cross shards"
        assert out.shape == (stop - start,)
        out.fill(index.end_of_document)  # what no member covers is an end put after one that lacks it
        first = int(self._begin.searchsorted(start, "right")) - 1
        last = int(self._begin.searchsorted(stop, "left"))
        for number, (offset, count, begin, code) in enumerate(index.members[first:last].tolist(), first):
            low, high = max(start, begin), min(stop, begin + count)
            if low >= high:
                continue
            dtype = TYPES[code]
            at = offset + (low - begin) * dtype.itemsize
            self._check(at, at + (high - low) * dtype.itemsize, number)
            out[low - start : high - start] = np.frombuffer(self._bytes, dtype, high - low, at)
        before, after = index.ends.searchsorted((start, stop - 1), "right").tolist()
        return before, start - (int(index.ends[before - 1]) if before else 0), index.ends[before:after] - start

    def _check(self, begin: int, end: int, member: int) -> None:
        """Check the crc32 of the not yet checked blocks under bytes [begin, end) of the tar."""
        block, last = begin // CRC_BLOCK, -(-end // CRC_BLOCK)
        while (block := self._checked.find(0, block, last)) >= 0:
            start = block * CRC_BLOCK
            with memoryview(self._bytes)[start : start + CRC_BLOCK] as view:
                if zlib.crc32(view) != self.index.crcs[block]:
                    raise CorruptShardError(
                        f"shard {self.path}, member {member} of the shard, bytes {start} to {start + len(view)}: crc32 "
                        f"does not match the index: the data changed on disk; {_AGAIN}"
                    )
            self._checked[block] = 1


def open_member_index(shard: Path, entry: dict[str, Any], end_of_document: int | None) -> MemberIndex:
    """Read the index of one foreign tar and check it against dataset.json, without a scan of the tar.

    Args:
        entry: what dataset.json says of the shard.
        end_of_document: id that closes documents, None for text.

    Raises:
        CorruptShardError: missing or truncated tar or index, or an index that says other than dataset.json.
    """
    index = MemberIndex.from_bytes(read_index(shard, entry), str(index_path(shard)))
    text = end_of_document is None
    end, tokens = (-1, index.tokens) if text else (end_of_document, entry["tokens"])
    said = (entry["bytes"], entry["sha256"], end, tokens)
    if (index.tar_bytes, index.tar_sha256, index.end_of_document, index.tokens) != said:
        raise CorruptShardError(
            f"index {index_path(shard)} does not describe the shard that {MANIFEST} lists; {_AGAIN}"
        )
    return index


class TokenRules(NamedTuple):
    """What the ids of a tar must keep to, and where its documents end."""

    vocabulary: int
    end_of_document: int
    documents: str = "members"


class Facts(NamedTuple):
    """What dataset.json says of one tar besides its index."""

    max_token: int = -1
    blank: int = 0
    text_bytes: int = 0


def build_token_index(
    path: Path, field: str, rules: TokenRules, token_bytes: np.ndarray | None = None
) -> tuple[MemberIndex, Facts]:
    """Scan a tar whose samples hold ids under ``field``.

    Args:
        token_bytes: bytes of text of each id, to count the text behind the ids; without, text_bytes is 0.

    Raises:
        CorruptShardError: the tar is damaged, or repeats a key.
        DatasetError: a sample without the field, or with something else than ids of the vocabulary there.
    """
    content = map_tar(path)
    read_header = _NpyHeaders()
    members: list[tuple[int, int, int, int]] = []
    ends: list[np.ndarray] = []
    begin = blank = text_bytes = 0
    max_token = -1
    for key, fields in samples(content, str(path)):
        place = f"{path}: {key}.{field}"
        dtype, count, offset = read_header(content, _require(fields, field, key, path), place)
        if count == 0:
            blank += 1
            continue
        ids = np.frombuffer(content, dtype, count, offset)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= rules.vocabulary:
            raise DatasetError(
                f"{place}: id {low if low < 0 else high} at place {int(ids.argmin() if low < 0 else ids.argmax())} is "
                f"outside the vocabulary 0..{rules.vocabulary - 1}; give the tokenizer that these ids came from"
            )
        max_token = max(max_token, high)
        if token_bytes is not None:
            text_bytes += int(token_bytes[ids].sum())
        members.append((offset, count, begin, TYPES.index(dtype)))
        ends.append(np.flatnonzero(ids == rules.end_of_document) + (begin + 1))
        begin += count
        if rules.documents == "members" and ids[-1] != rules.end_of_document:
            begin += 1
            max_token = max(max_token, rules.end_of_document)
            ends.append(np.array([begin]))
    table = np.array(members, MEMBER)
    index = _index(content, rules.end_of_document, begin, table, np.concatenate(ends) if ends else np.empty(0, "<i8"))
    return index, Facts(max_token, blank, text_bytes)


def build_text_index(path: Path, field: str) -> tuple[MemberIndex, Facts]:
    """Scan a tar whose samples hold text under ``field``; the text itself is read by `prepare`.

    Raises:
        CorruptShardError: the tar is damaged, or repeats a key.
        DatasetError: a sample without the field.
    """
    content = map_tar(path)
    members: list[tuple[int, int, int, int]] = []
    begin = 0
    for key, fields in samples(content, str(path)):
        member = _require(fields, field, key, path)
        members.append((member.offset, member.size, begin, TEXT))
        begin += member.size
    return _index(content, -1, begin, np.array(members, MEMBER), np.empty(0, "<i8")), Facts(text_bytes=begin)


def holds_ids(content: mmap.mmap, member: Member, place: str, *, explain: bool = False) -> bool:
    """Whether a member is a one-dimensional array of whole numbers; with ``explain`` an error says why not.

    Raises:
        CorruptShardError: a damaged .npy header.
    """
    try:
        _NpyHeaders()(content, member, place)
    except DatasetError as error:
        if explain or isinstance(error, CorruptShardError):
            raise
        return False
    return True


class _NpyHeaders:
    """Type, length and payload offset of .npy members; equal headers, as fixed rows have, are parsed once."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[np.dtype, int]] = {}

    def __call__(self, content: mmap.mmap, member: Member, place: str) -> tuple[np.dtype, int, int]:
        prefix = content[member.offset : member.offset + min(12, member.size)]
        if prefix[:8] == b"\x93NUMPY\x01\x00" and len(prefix) == 12:
            start = 10 + int.from_bytes(prefix[8:10], "little")
        elif prefix[:8] == b"\x93NUMPY\x02\x00" and len(prefix) == 12:
            start = 12 + int.from_bytes(prefix[8:12], "little")
        else:
            raise DatasetError(f"{place} is not an .npy array; choose the field that holds the ids with --field")
        header = content[member.offset : member.offset + min(start, member.size)]
        if header not in self._known:
            self._known[header] = self._parse(header, place)
        dtype, count = self._known[header]
        if start + count * dtype.itemsize != member.size:
            raise CorruptShardError(
                f"{place}: {count} values of {dtype} do not fill its {member.size - start} bytes; {_AGAIN}"
            )
        return dtype, count, member.offset + start

    @staticmethod
    def _parse(header: bytes, place: str) -> tuple[np.dtype, int]:
        file = io.BytesIO(header)
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        try:
            shape, _, dtype = read(file)
        except Exception as error:  # NumPy parses it as Python: a damaged one meets errors of many types
            raise CorruptShardError(f"{place}: no .npy header: {error}; {_AGAIN}") from None
        if len(shape) != 1 or dtype not in TYPES:
            raise DatasetError(
                f"{place} holds an array of shape {shape} and type {dtype}, not one row of whole numbers; choose the "
                f"field that holds the ids with --field"
            )
        return dtype, shape[0]


def _require(fields: dict[str, Member], field: str, key: str, path: Path) -> Member:
    if field not in fields:
        raise DatasetError(
            f"{path}: sample {key!r} has no field {field!r} but {', '.join(sorted(fields))}; every sample must have it"
        )
    return fields[field]


def _index(content: mmap.mmap, end_of_document: int, tokens: int, members: np.ndarray, ends: np.ndarray) -> MemberIndex:
    digest = hashlib.sha256()
    crcs = np.empty(-(-len(content) // CRC_BLOCK), "<u4")
    with memoryview(content) as view:
        for number in range(len(crcs)):
            block = view[number * CRC_BLOCK : (number + 1) * CRC_BLOCK]
            crcs[number] = zlib.crc32(block)
            digest.update(block)
    return MemberIndex(len(content), digest.hexdigest(), end_of_document, tokens, members, ends, crcs)
