"""Token shards: stock WebDataset tars of large token chunks, each beside an index of offsets and checksums.

One chunk is three members of the tar:
    NNNNNNNN.tok.npy  uint16 or uint32 (vocabulary > 65,535), a slice of the stream "document, end-of-document, ..."
    NNNNNNNN.doc.npy  int32, where documents end inside the chunk (one past their end-of-document token), ascending
    NNNNNNNN.json     what else stock readers need to place the chunk in the stream
A dataset is cut into parts, one for each input that was read, and every part is written by itself: its document and
chunk numbers begin at 0 and its shards are ``shard-PPPPP-NNNNN.tar``. A part has a stride of ``chunk_tokens`` tokens;
every chunk holds one more, the first of the next chunk, so that rows of inputs and shifted targets need no second one.
Only the last chunk of a part is shorter. The index (``shard-PPPPP-NNNNN.tar.idx``, little endian) is
    header | a CHUNK record per chunk | uint32 crc32 per 8 KiB block of the two payloads | uint32 crc32 of all before
and is always built by scanning the tar, never from what the writer believes it wrote.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.archive import BLOCK, Member, map_tar, samples
from potamos.data.errors import CorruptShardError
from potamos.files import write_atomically

CHUNK_TOKENS = 262_144
CRC_BLOCK = 8192
INDEX_VERSION = 1
_MAGIC = b"POTAMIDX"
_HEADER = struct.Struct("<8sIIIIQ32s")  # magic, version, token bytes, crc block, chunks, tar bytes, tar sha256
CHUNK = np.dtype(
    [
        ("token_offset", "<i8"),  # byte offset of the token payload in the tar
        ("tokens", "<i4"),
        ("documents", "<i4"),  # document ends in the chunk
        ("end_offset", "<i8"),  # byte offset of the document ends' payload
        ("first_document", "<i8"),  # number, within the part, of the document that token 0 belongs to
        ("first_position", "<i8"),  # place of token 0 in its document
        ("first_block", "<i8"),  # its first crc32; the token payload's blocks come first, then the ends'
    ]
)


@dataclass(frozen=True)
class ShardIndex:
    """The content of one ``.tar.idx``: where everything is in a shard, and what it must hash to."""

    tar_bytes: int
    tar_sha256: str
    dtype: np.dtype
    chunks: np.ndarray
    crcs: np.ndarray

    def to_bytes(self) -> bytes:
        """The file's content."""
        header = _HEADER.pack(
            _MAGIC, INDEX_VERSION, self.dtype.itemsize, CRC_BLOCK, len(self.chunks), self.tar_bytes,
            bytes.fromhex(self.tar_sha256),
        )  # fmt: skip
        body = header + self.chunks.tobytes() + self.crcs.astype("<u4").tobytes()
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def from_bytes(cls, content: bytes, place: str) -> ShardIndex:
        """Parse and check a file's content; ``place`` names it in errors."""
        remedy = "copy the dataset again or prepare it again"
        if len(content) < _HEADER.size + 4 or content[:8] != _MAGIC:
            raise CorruptShardError(f"{place} is not a shard index or is truncated ({len(content)} bytes); {remedy}")
        _, version, itemsize, block, count, tar_bytes, sha256 = _HEADER.unpack_from(content)
        if version != INDEX_VERSION:
            raise CorruptShardError(f"{place} has index version {version}; this program reads {INDEX_VERSION}")
        if zlib.crc32(content[:-4]) != struct.unpack("<I", content[-4:])[0] or block != CRC_BLOCK:
            raise CorruptShardError(f"{place} is truncated or damaged (its own checksum does not hold); {remedy}")
        table_end = _HEADER.size + count * CHUNK.itemsize
        if itemsize not in (2, 4) or table_end > len(content) - 4 or (len(content) - 4 - table_end) % 4:
            raise CorruptShardError(f"{place}: {count} chunks of {itemsize}-byte tokens do not fit the file; {remedy}")
        chunks = np.frombuffer(content, CHUNK, count, _HEADER.size)
        crcs = np.frombuffer(content[table_end:-4], "<u4")
        return cls(tar_bytes, sha256.hex(), np.dtype(f"<u{itemsize}"), chunks, crcs)


def token_dtype(vocabulary: int) -> np.dtype:
    """The smallest stored type: uint16, or uint32 for vocabularies beyond 65,535."""
    return np.dtype("<u2") if vocabulary <= 65_535 else np.dtype("<u4")


def index_path(shard: Path) -> Path:
    """The index beside a shard."""
    return shard.with_name(shard.name + ".idx")


class ShardWriter:
    """Cuts the documents of one part into chunks and chunks into shards, all under ``folder``.

    Documents must already carry their end-of-document id. The bytes written are a function of the documents and the
    arguments alone. Nothing here renames: `prepare` writes into a temporary folder and renames that.

    Attributes:
        shards: what dataset.json says of the shards written so far, see `shard_entry`.
        documents, tokens, max_token: counts of what was added; the largest id, 0 before the first document.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype, *, chunk_tokens: int, shard_chunks: int, source: str, part: int = 0
    ):
        if not 1 <= chunk_tokens < 2**31 - 1 or shard_chunks < 1:
            raise ValueError(f"chunk_tokens {chunk_tokens} and shard_chunks {shard_chunks} must be positive")
        self.folder, self.dtype, self.part = folder, dtype, part
        self.shards: list[dict[str, Any]] = []
        self.documents = 0  # finished
        self.tokens = 0
        self.max_token = 0
        self._shard_chunks, self._source = shard_chunks, source
        self._buffer = np.empty(chunk_tokens + 1, dtype)
        self._filled, self._ends = 0, []
        self._first_document, self._first_position = 0, 0
        self._chunks = self._in_shard = 0
        self._tar: io.BufferedWriter | None = None

    def add(self, ids: np.ndarray) -> None:
        """Append one document, shape (tokens,), the last id being the end of the document."""
        self.max_token = max(self.max_token, int(ids.max()))
        done = 0
        while done < len(ids):
            if self._filled == len(self._buffer):
                self._next_chunk(position=done - 1)
            take = min(len(ids) - done, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + take] = ids[done : done + take]
            self._filled += take
            done += take
        self._ends.append(self._filled)
        self.tokens += len(ids)
        self.documents += 1
        if self._filled == len(self._buffer):
            self._next_chunk(position=len(ids) - 1)
            self._ends.append(1)  # the repeated token closes this document in the next chunk too

    def finish(self) -> None:
        """Write what is left and close the last shard."""
        if self._filled > 1:  # one token alone is only the repeat of the chunk before
            self._write_chunk()
        if self._tar is not None:
            self._close_shard()

    def _next_chunk(self, position: int) -> None:
        """Write the full buffer and begin the next with its last token, number ``position`` of its document."""
        first = self._first_document + len(self._ends) - bool(self._ends and self._ends[-1] == self._filled)
        self._write_chunk()
        self._buffer[0] = self._buffer[-1]
        self._filled, self._ends = 1, []
        self._first_document, self._first_position = first, position

    def _write_chunk(self) -> None:
        if self._tar is None:
            path = self.folder / f"shard-{self.part:05d}-{len(self.shards):05d}.tar"
            self._tar = open(path, "wb")  # noqa: SIM115  (stays open over many chunks)
            self._in_shard = 0
        key = f"{self._chunks:08d}"
        about = {
            "chunk": self._chunks,
            "documents": len(self._ends),
            "first_document": self._first_document,
            "first_position": self._first_position,
            "part": self.part,
            "source": self._source,
            "tokens": self._filled,
        }
        _write_member(self._tar, f"{key}.tok.npy", _npy(self._buffer[: self._filled]))
        _write_member(self._tar, f"{key}.doc.npy", _npy(np.array(self._ends, "<i4")))
        _write_member(self._tar, f"{key}.json", json.dumps(about, sort_keys=True).encode())
        self._chunks += 1
        self._in_shard += 1
        if self._in_shard == self._shard_chunks:
            self._close_shard()

    def _close_shard(self) -> None:
        assert self._tar is not None
        self._tar.write(bytes(2 * BLOCK))
        self._tar.flush()
        os.fsync(self._tar.fileno())
        path = Path(self._tar.name)
        self._tar.close()
        self._tar = None
        index = build_index(path)
        content = index.to_bytes()
        write_atomically(index_path(path), content)
        self.shards.append(shard_entry(path.name, index, content))


def shard_entry(name: str, index: ShardIndex, index_content: bytes) -> dict[str, Any]:
    """What dataset.json says of one shard."""
    return {
        "name": name,
        "bytes": index.tar_bytes,
        "sha256": index.tar_sha256,
        "index_bytes": len(index_content),
        "index_sha256": hashlib.sha256(index_content).hexdigest(),
        "chunks": len(index.chunks),
        "tokens": int(index.chunks["tokens"].sum()),
    }


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0))
    return file.getvalue()


def _write_member(tar: io.BufferedWriter, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # mtime, owner and group are 0 unless set: the bytes depend on name and content only
    info.size = len(content)
    tar.write(info.tobuf(tarfile.USTAR_FORMAT))
    tar.write(content)
    tar.write(bytes(-len(content) % BLOCK))


def build_index(shard: Path) -> ShardIndex:
    """Scan a shard and compute its index: offsets, counts, the crc32 of every block, the sha256 of the tar.

    Raises:
        DatasetError: no sound tar, or no chunks of one type of ids in it; nearly always a CorruptShardError.
    """
    place, content = str(shard), map_tar(shard)
    records: list[tuple[int, ...]] = []
    crcs: list[int] = []
    dtypes: set[np.dtype] = set()
    with memoryview(content) as view:
        for key, fields in samples(content, place):
            if fields.keys() != {"tok.npy", "doc.npy", "json"}:
                found = sorted(fields)
                raise CorruptShardError(f"{place}: chunk {key} has members {found}, not tok.npy, doc.npy and json")
            tokens, token_offset = _read_npy(content, fields["tok.npy"], place)
            ends, end_offset = _read_npy(content, fields["doc.npy"], place)
            if ends.dtype != np.dtype("<i4"):
                raise CorruptShardError(f"{place}: {key}.doc.npy holds {ends.dtype}, expected int32")
            dtypes.add(tokens.dtype)
            about = _read_about(content, fields["json"], place)
            records.append((token_offset, len(tokens), len(ends), end_offset, *about, len(crcs)))
            crcs += block_crcs(view[token_offset : token_offset + tokens.nbytes])
            crcs += block_crcs(view[end_offset : end_offset + ends.nbytes])
        sha256 = hashlib.sha256(view).hexdigest()
    if len(dtypes) != 1 or not dtypes <= {np.dtype("<u2"), np.dtype("<u4")}:
        raise CorruptShardError(f"{place}: token types {sorted(map(str, dtypes))}, expected one of uint16, uint32")
    return ShardIndex(len(content), sha256, dtypes.pop(), np.array(records, CHUNK), np.array(crcs, "<u4"))


def block_crcs(payload: memoryview) -> list[int]:
    """crc32 of each 8 KiB block, the last one shorter."""
    return [zlib.crc32(payload[i : i + CRC_BLOCK]) for i in range(0, len(payload), CRC_BLOCK)]


def _read_about(content: mmap.mmap, member: Member, shard: str) -> tuple[int, int]:
    """``first_document`` and ``first_position`` of a chunk's description."""
    place = f"{shard}: {member.name}"
    try:
        about = json.loads(content[member.offset : member.offset + member.size])
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise CorruptShardError(f"{place} is not JSON: {error}") from None
    values = [about.get(key) if isinstance(about, dict) else None for key in ("first_document", "first_position")]
    counts = [value for value in values if type(value) is int and 0 <= value < 2**63]
    if len(counts) < 2:
        raise CorruptShardError(f"{place} gives first_document and first_position as {values}, not as whole numbers")
    return counts[0], counts[1]


def _read_npy(content: mmap.mmap, member: Member, shard: str) -> tuple[np.ndarray, int]:
    """A one-dimensional array of a member and the byte offset of its payload."""
    place, (_, offset, length) = f"{shard}: {member.name}", member
    # The header of format 1.0 is the magic string, two version bytes and a length; the array follows it.
    if content[offset : offset + 8] != b"\x93NUMPY\x01\x00":
        raise CorruptShardError(f"{place} is not a version 1.0 .npy array")
    start = 10 + int.from_bytes(content[offset + 8 : offset + 10], "little")
    file = io.BytesIO(content[offset : offset + start])
    np.lib.format.read_magic(file)
    try:
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # NumPy parses it as Python: a damaged one meets errors of the tokenizer, of sorting...
        raise CorruptShardError(f"{place}: no .npy header: {error}") from None
    if len(shape) != 1 or shape[0] * dtype.itemsize != length - start or dtype.hasobject:
        raise CorruptShardError(f"{place}: shape {shape} of {dtype} does not fill its {length - start} bytes")
    return np.frombuffer(content, dtype, shape[0], offset + start), offset + start
