"""WebDataset tars of text: each tar one input, each sample one document (or, from a .jsonl field, several)."""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from potamos.data.archive import Member, map_tar, samples
from potamos.data.errors import CorruptShardError, DatasetError, SourceError
from potamos.data.foreign import choose_field
from potamos.data.members import CRC_BLOCK, MAGIC, MemberIndex
from potamos.data.shards import index_path
from potamos.data.sources.base import START_BYTES, Document, Input, Record
from potamos.data.sources.files import named_inputs
from potamos.data.sources.json_lines import MAX_LINE_BYTES

_HASH_BYTES = 128 * CRC_BLOCK


class TextTars:
    """Samples with their text in a field .txt, or under ``text`` of a .json object or of each line of a .jsonl.

    The field is that of the first tar's first sample, .txt before .json; what a .json holds besides the text is the
    document's meta. A bad sample is counted, listed and skipped: no such field, not UTF-8, not JSON, no text, longer
    than ``max_text_bytes``. A damaged or truncated tar is an error, where an index of `index_tars` lies beside it also
    one whose bytes have changed.

    Raises:
        SourceError: the first tar is damaged or has no text.
    """

    shard_chunks = 512

    def __init__(self, paths: Sequence[Path], root: Path, name: str, *, max_text_bytes: int = MAX_LINE_BYTES):
        self._paths, self._root, self._name, self._max_text_bytes = list(paths), root, name, max_text_bytes
        try:
            self._field, _ = choose_field(self._paths[0], text_only=True)
        except DatasetError as error:
            raise SourceError(
                f"{error}; tars of token ids are not prepared but indexed: `potamos data index`"
            ) from None

    @property
    def description(self) -> dict[str, Any]:
        return {
            "kind": "tars",
            "name": self._name,
            "files": len(self._paths),
            "field": self._field,
            "max_text_bytes": self._max_text_bytes,
        }

    def inputs(self) -> list[Input]:
        return named_inputs(self._paths, self._root)

    def read(self, input: Input, record: Record) -> Iterator[Document]:
        record.start(input, "samples")
        (path,) = input.files
        try:
            content = map_tar(path)
            proof = _Proof(content, path, record)
            for key, fields in samples(content, str(path)):
                proof.up_to(max(member.offset + member.size for member in fields.values()))
                yield from self._documents(content, f"{input.name}:{key}", fields, record)
            proof.up_to(len(content))
        except DatasetError as error:
            raise SourceError(str(error)) from None
        record.files.append({"name": input.name, "bytes": len(content), "sha256": proof.sha256})
        record.finish()

    def _documents(
        self, content: mmap.mmap, place: str, fields: dict[str, Member], record: Record
    ) -> Iterator[Document]:
        if self._field not in fields:
            record.lines += 1
            record.reject(place, f"no field {self._field!r} but {', '.join(sorted(fields))}", b"")
            return
        member = fields[self._field]
        if member.size > self._max_text_bytes:
            record.lines += 1
            start = content[member.offset : member.offset + START_BYTES]
            record.reject(place, f"text longer than {self._max_text_bytes} bytes", start)
            return
        raw = _payload(content, member)
        kind = self._field.rpartition(".")[2]
        if kind == "jsonl":
            for number, line in enumerate(raw.split(b"\n"), start=1):
                if line and not line.isspace():
                    yield from _of_json(line, f"{place}:{number}", record)
        elif kind == "json":
            yield from _of_json(raw, place, record)
        else:
            beside = _payload(content, fields["json"]) if "json" in fields else b"{}"
            yield from _of_text(raw, beside, place, record)


def _payload(content: mmap.mmap, member: Member) -> bytes:
    return content[member.offset : member.offset + member.size]


def _of_text(raw: bytes, beside: bytes, place: str, record: Record) -> Iterator[Document]:
    record.lines += 1
    text, reason = _decode(raw)
    meta: dict[str, Any] = {}
    if not reason:
        meta, reason = _object(beside)
    if reason:
        record.reject(place, reason, raw)
    elif document := record.admit(text, place, meta):
        yield document


def _of_json(raw: bytes, place: str, record: Record) -> Iterator[Document]:
    record.lines += 1
    fields, reason = _object(raw)
    if not reason and "text" not in fields:
        reason = "no key 'text'"
    text = fields.pop("text", "")
    if not reason and not isinstance(text, str):
        reason = f"'text' is {type(text).__name__}, not a string"
    if reason:
        record.reject(place, reason, raw)
    elif document := record.admit(str(text), place, fields):
        yield document


class _Proof:
    """Hashes a tar as far as it was read and compares it with the index beside it, if there is one."""

    def __init__(self, content: mmap.mmap, path: Path, record: Record):
        self._content, self._path, self._record = content, path, record
        self._digest, self._at = hashlib.sha256(), 0
        self._crcs = _known_crcs(path, len(content))

    def up_to(self, end: int) -> None:
        """Everything before ``end`` is as it was when it was indexed, or an error is raised."""
        while self._at < end:
            stop = min(self._at + _HASH_BYTES, len(self._content))
            with memoryview(self._content) as view, view[self._at : stop] as piece:
                self._digest.update(piece)
                for start in range(0, len(piece), CRC_BLOCK) if self._crcs is not None else ():
                    assert self._crcs is not None
                    place = self._at + start
                    if zlib.crc32(piece[start : start + CRC_BLOCK]) != self._crcs[place // CRC_BLOCK]:
                        raise CorruptShardError(
                            f"{self._path}, bytes {place} to {min(place + CRC_BLOCK, stop)}: crc32 does not match the "
                            f"index: the tar changed since it was indexed; fetch it again, or index it again"
                        )
            self._record.bytes_read += stop - self._at
            self._at = stop

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _known_crcs(path: Path, size: int) -> list[int] | None:
    """The checksums that an index of ours beside a tar holds."""
    place = index_path(path)
    if not place.is_file():
        return None
    content = place.read_bytes()
    if not content.startswith(MAGIC):  # other tools keep files of this name too
        return None
    index = MemberIndex.from_bytes(content, str(place))
    if index.tar_bytes != size:
        raise CorruptShardError(
            f"{path} has {size} bytes, {index.tar_bytes} when it was indexed; fetch it again, or index it again"
        )
    return index.crcs.tolist()


def _decode(raw: bytes) -> tuple[str, str]:
    try:
        return raw.decode(), ""
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start})"


def _object(raw: bytes) -> tuple[dict[str, Any], str]:
    """A JSON object, or the reason why there is none."""
    text, reason = _decode(raw)
    if reason:
        return {}, reason
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON: {error}"
    return (fields, "") if isinstance(fields, dict) else ({}, f"a {type(fields).__name__}, not an object")
