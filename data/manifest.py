"""dataset.json: what a prepared dataset holds, and the fingerprint that stands for all of it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.errors import CorruptShardError, DatasetError
from potamos.data.shards import ShardIndex, build_index, index_path, shard_entry

FORMAT = "potamos-tokens"
VERSION = 2
MANIFEST = "dataset.json"
LAYOUTS = ("chunks", "members", "text")
_PREPARE = "prepare it with `potamos data prepare`"
_REMEDY = "copy the dataset again, or leave whole shards out with data.on_bad_shard: skip"
# What readers rely on: the type of each field, numbers being whole and not negative.
_FIELDS = {"layout": str, "source": dict, "parts": list}
_PART_FIELDS = {"name": str, "files": list, "shards": list}
_SHARD_FIELDS = {"name": str, "bytes": int, "sha256": str, "index_bytes": int, "index_sha256": str}
# Shards of foreign text have no more than these; shards of tokens also have the following.
_COUNTS = ("tokens", "documents", "text_bytes", "blank", "rejected", "mended", "duplicates")  # add up over parts
_TOKEN_FIELDS = {
    "split": str, "tokenizer": dict, "dtype": str, "chunk_tokens": int, "shard_chunks": int, "deduplicated": bool,
    **dict.fromkeys((*_COUNTS, "max_token"), int),
}  # fmt: skip
_TOKENIZER_FIELDS = {"kind": str, "sha256": str, "vocabulary": int, "end_of_document": int}
_TOKEN_PART_FIELDS = dict.fromkeys((*_COUNTS, "max_token"), int)
_TOKEN_SHARD_FIELDS = {"chunks": int, "tokens": int}


@dataclass(frozen=True)
class Manifest:
    """A parsed dataset.json. ``fingerprint`` is the sha256 of every other field."""

    fields: dict[str, Any]
    fingerprint: str

    @property
    def layout(self) -> str:
        """``chunks`` (written here), ``members`` (foreign tars of tokens) or ``text`` (foreign tars of text)."""
        return self.fields["layout"]

    @property
    def parts(self) -> list[dict[str, Any]]:
        """One for each input: ``name``, its ``files``, its ``shards``, and its share of each count of the dataset."""
        return self.fields["parts"]

    @cached_property
    def shards(self) -> list[dict[str, Any]]:
        """The shards of all parts in order."""
        return [shard for part in self.parts for shard in part["shards"]]

    @property
    def chunk_tokens(self) -> int:
        """The stride of chunks; each full chunk stores one token more. Only layout ``chunks`` has it."""
        return self.fields["chunk_tokens"]

    @property
    def tokens(self) -> int:
        return self.fields["tokens"]

    @property
    def documents(self) -> int:
        return self.fields["documents"]

    @property
    def text_bytes(self) -> int:
        return self.fields["text_bytes"]

    @property
    def max_token(self) -> int:
        return self.fields["max_token"]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.fields["dtype"])

    @property
    def tokenizer(self) -> dict[str, Any]:
        """``kind``, ``sha256``, ``vocabulary``, ``end_of_document``."""
        return self.fields["tokenizer"]

    def to_bytes(self) -> bytes:
        """The file's content."""
        content = {**self.fields, "fingerprint": self.fingerprint}
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def make_manifest(fields: dict[str, Any]) -> Manifest:
    """Add format, version and fingerprint to the fields of a dataset."""
    fields = {"format": FORMAT, "version": VERSION, **fields}
    return Manifest(fields, _fingerprint(fields))


def totals(parts: Iterable[dict[str, Any]]) -> dict[str, int]:
    """The counts of a dataset of token parts: sums, and the largest token id."""
    parts = list(parts)
    sums = {key: sum(part[key] for part in parts) for key in _COUNTS}
    return {**sums, "max_token": max((part["max_token"] for part in parts), default=0)}


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check ``folder/dataset.json``.

    Raises:
        DatasetError: no such folder or file, not this format, fields missing, or edited since it was written.
    """
    path = Path(folder) / MANIFEST
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DatasetError(f"{folder} holds no {MANIFEST}: it is no finished dataset; {_PREPARE}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read: {error}; {_PREPARE}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise DatasetError(f"{path} does not describe a token dataset; {_PREPARE}")
    if fields.get("version") != VERSION:
        raise DatasetError(
            f"{path} has format version {fields.get('version')}; this program reads {VERSION}; {_PREPARE}"
        )
    stored = fields.pop("fingerprint", None)
    if stored != _fingerprint(fields):
        raise DatasetError(f"{path} was changed after it was written (its fingerprint does not hold); {_PREPARE} again")
    _check_fields(fields, path)
    return Manifest(fields, stored)


def _check_fields(fields: dict[str, Any], path: Path) -> None:
    _check_types(fields, _FIELDS, path)
    if fields["layout"] not in LAYOUTS:
        raise _wrong(path, "layout", fields["layout"], f"one of {', '.join(LAYOUTS)}")
    text = fields["layout"] == "text"
    if not text:
        _check_types(fields, _TOKEN_FIELDS, path)
        _check_types(fields["tokenizer"], _TOKENIZER_FIELDS, path, "tokenizer.")
    part_fields = _PART_FIELDS if text else _PART_FIELDS | _TOKEN_PART_FIELDS
    shard_fields = _SHARD_FIELDS if text else _SHARD_FIELDS | _TOKEN_SHARD_FIELDS
    names: set[str] = set()
    for number, part in enumerate(fields["parts"]):
        _check_types(part, part_fields, path, f"parts[{number}].")
        for place, shard in enumerate(part["shards"]):
            within = f"parts[{number}].shards[{place}]."
            _check_types(shard, shard_fields, path, within)
            name = shard["name"]
            if os.path.basename(name) != name or name in names:  # a shard lies in its dataset's folder
                raise _wrong(path, within + "name", name, "a file name of its own")
            names.add(name)
    if not names:
        raise _wrong(path, "parts", fields["parts"], "parts with at least one shard")
    if not text:
        _check_counts(fields, path)


def _check_counts(fields: dict[str, Any], path: Path) -> None:
    """The counts that rows are numbered by: those of the dataset, its parts, and the chunks of their shards."""
    chunked = fields["layout"] == "chunks"
    if chunked and fields["dtype"] not in ("<u2", "<u4"):
        raise _wrong(path, "dtype", fields["dtype"], "'<u2' or '<u4'")
    if chunked and fields["chunk_tokens"] < 1:
        raise _wrong(path, "chunk_tokens", fields["chunk_tokens"], "at least 1")
    for key, total in totals(fields["parts"]).items():
        # max_token is a promise about every id, so it may also be larger
        if fields[key] < total if key == "max_token" else fields[key] != total:
            raise _wrong(path, key, fields[key], f"{total}, as its parts say")
    for number, part in enumerate(fields["parts"]):
        wrong = _wrong_chunks(part, fields["chunk_tokens"] + 1) if chunked else _wrong_members(part)
        if wrong is not None:
            key, value, wanted = wrong
            raise _wrong(path, f"parts[{number}].{key}", value, wanted)


def _wrong_chunks(part: dict[str, Any], full: int) -> tuple[str, int, str] | None:
    """The first count of a part that its chunks of ``full`` tokens cannot have: field, value, what it should be."""
    stored = chunks = 0
    for number, shard in enumerate(part["shards"]):
        most = shard["chunks"] * full
        least = most - full + 2 if number == len(part["shards"]) - 1 else most  # only the part's last chunk is short
        if shard["chunks"] < 1:
            return f"shards[{number}].chunks", shard["chunks"], "at least 1"
        if not least <= shard["tokens"] <= most:
            return f"shards[{number}].tokens", shard["tokens"], f"{least} to {most} for {shard['chunks']} chunks"
        stored, chunks = stored + shard["tokens"], chunks + shard["chunks"]
    # Each chunk repeats the last token of the one before. A single token makes no chunk, since nothing follows it.
    most = stored - chunks + 1
    if part["tokens"] != most and (chunks or part["tokens"] > 1):
        return "tokens", part["tokens"], f"{most}, as its shards say"
    return None


def _wrong_members(part: dict[str, Any]) -> tuple[str, int, str] | None:
    """As `_wrong_chunks`, where a shard is one chunk of any length."""
    for number, shard in enumerate(part["shards"]):
        if shard["chunks"] != 1:
            return f"shards[{number}].chunks", shard["chunks"], "1"
    stored = sum(shard["tokens"] for shard in part["shards"])
    return None if part["tokens"] == stored else ("tokens", part["tokens"], f"{stored}, as its shards say")


def _wrong(path: Path, field: str, value: Any, wanted: str) -> DatasetError:
    return DatasetError(f"{path}: field {field!r} is {value!r}, not {wanted}; {_PREPARE} again")


def _check_types(fields: Any, types: dict[str, type], path: Path, within: str = "") -> None:
    if not isinstance(fields, dict):
        raise _wrong(path, within[:-1], fields, "a table")
    for key, wanted in types.items():
        if key not in fields:
            raise DatasetError(f"{path}: field {within + key!r} is missing; {_PREPARE} again")
        value = fields[key]
        if type(value) is not wanted or (wanted is int and value < 0):  # a bool is no number here
            raise _wrong(path, within + key, value, "a whole number from 0 on" if wanted is int else wanted.__name__)


def _fingerprint(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_sizes(shard: Path, entry: dict[str, Any]) -> None:
    """Compare the sizes of a shard and its index with what dataset.json says of them, without opening either.

    Raises:
        CorruptShardError: missing or truncated shard or index.
    """
    for kind, place, expected in (("shard", shard, entry["bytes"]), ("index", index_path(shard), entry["index_bytes"])):
        try:
            actual = os.stat(place).st_size
        except OSError as error:
            state = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise CorruptShardError(f"{kind} {place} {state}, expected {expected} bytes; {_REMEDY}") from None
        if actual != expected:
            raise CorruptShardError(f"{kind} {place} has {actual} bytes, {MANIFEST} says {expected}; {_REMEDY}")


def read_index(shard: Path, entry: dict[str, Any]) -> bytes:
    """The bytes of a shard's index, which are the very ones that dataset.json lists.

    Raises:
        CorruptShardError: missing, truncated, damaged, or made for another shard.
    """
    check_sizes(shard, entry)
    place = index_path(shard)
    try:
        content = place.read_bytes()
    except OSError as error:
        raise CorruptShardError(f"index {place} cannot be read: {error.strerror}; {_REMEDY}") from None
    if hashlib.sha256(content).hexdigest() != entry["index_sha256"]:
        raise CorruptShardError(
            f"index {place} is damaged, or stale: made for another shard than {MANIFEST} lists; {_REMEDY}"
        )
    return content


def open_index(shard: Path, entry: dict[str, Any], manifest: Manifest) -> ShardIndex:
    """Read the index of one shard of layout ``chunks`` and check it against dataset.json, without a scan of the shard.

    Raises:
        CorruptShardError: missing or truncated shard or index, or an index that says other than dataset.json.
    """
    index = ShardIndex.from_bytes(read_index(shard, entry), str(index_path(shard)))
    tokens, full = index.chunks["tokens"], manifest.chunk_tokens + 1
    agrees = (
        (index.tar_bytes, index.tar_sha256, index.dtype) == (entry["bytes"], entry["sha256"], manifest.dtype)
        and (len(tokens), int(tokens.sum())) == (entry["chunks"], entry["tokens"])
        and bool((tokens[:-1] == full).all())  # rows are numbered without the index
    )
    if not agrees:
        raise CorruptShardError(
            f"index {index_path(shard)} does not describe the shard that {MANIFEST} lists; {_REMEDY}"
        )
    return index


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` looked at and every problem it found."""

    path: Path
    deep: bool
    shards: int = 0
    chunks: int = 0
    tokens: int = 0
    problems: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: str | os.PathLike[str], deep: bool = False) -> VerifyReport:
    """Check a dataset: manifest, sizes and indexes; with ``deep`` also every byte of every shard.

    Damage is reported, not raised.
    """
    folder = Path(path)
    try:
        manifest = read_manifest(folder)
    except DatasetError as error:
        return VerifyReport(folder, deep, problems=(str(error),))
    problems: list[str] = []
    chunks = tokens = 0
    for part in manifest.parts:
        walk = _Walk()
        for entry in part["shards"]:
            try:
                _verify_shard(folder / entry["name"], entry, manifest, walk if deep else None)
                chunks, tokens = chunks + entry.get("chunks", 0), tokens + entry.get("tokens", 0)
            except DatasetError as error:
                problems.append(str(error))
                walk = _Walk(known=False)  # a sound shard after a damaged one is no problem of its own
        if walk.last_token is not None:
            problems += _verify_end(folder, part, manifest, walk)
    known = {entry["name"] for entry in manifest.shards}
    problems += [
        f"shard {extra} is not listed in {MANIFEST}; remove it"
        for extra in sorted(folder.glob("*.tar"))
        if extra.name not in known and manifest.layout == "chunks"  # what lies beside foreign tars is their owner's
    ]
    return VerifyReport(folder, deep, len(manifest.shards), chunks, tokens, tuple(problems))


@dataclass
class _Walk:
    """Where the chunks of a part have come to: document and place of the token that the next chunk repeats."""

    document: int = 0
    position: int = 0
    last_token: int | None = None
    known: bool = True  # False after a damaged shard


def _verify_shard(shard: Path, entry: dict[str, Any], manifest: Manifest, walk: _Walk | None) -> None:
    """Check one shard; with ``walk`` compare it with its index byte for byte, and its ids with what was promised."""
    if manifest.layout != "chunks":  # foreign tars: nobody promised more than these bytes
        from potamos.data.foreign import verify_shard

        end_of_document = manifest.tokenizer["end_of_document"] if manifest.layout == "members" else None
        return verify_shard(shard, entry, end_of_document, deep=walk is not None)
    index = open_index(shard, entry, manifest)
    if walk is None:
        return
    rebuilt = build_index(shard)
    content = rebuilt.to_bytes()
    if shard_entry(shard.name, rebuilt, content) != entry or content != index.to_bytes():
        wrong = np.flatnonzero(rebuilt.crcs != index.crcs) if rebuilt.crcs.shape == index.crcs.shape else []
        where = f", first in chunk {_chunk_of_block(index, int(wrong[0]))} of the shard" if len(wrong) else ""
        raise CorruptShardError(f"shard {shard} differs from its index{where}; copy or prepare the dataset again")
    data = np.memmap(shard, np.uint8, mode="r")
    for number, chunk in enumerate(index.chunks):
        size = int(chunk["tokens"]) * index.dtype.itemsize
        tokens = data[chunk["token_offset"] : chunk["token_offset"] + size].view(index.dtype)
        ends = data[chunk["end_offset"] : chunk["end_offset"] + 4 * chunk["documents"]].view("<i4")
        _verify_chunk(tokens, ends, chunk, f"shard {shard}, chunk {number}", manifest, walk)


def _verify_chunk(
    tokens: np.ndarray, ends: np.ndarray, chunk: np.void, place: str, manifest: Manifest, walk: _Walk
) -> None:
    """Compare a chunk with its document ends and with the chunk before it; moves ``walk`` past it."""
    if tokens.max(initial=0) > manifest.max_token:
        raise CorruptShardError(f"{place}: token {tokens.max()} is above the promised {manifest.max_token}")
    closing = np.flatnonzero(tokens == manifest.tokenizer["end_of_document"]) + 1
    if not np.array_equal(closing, ends):
        raise CorruptShardError(f"{place}: document ends do not match the end-of-document tokens")
    document, position = int(chunk["first_document"]), int(chunk["first_position"])
    if walk.known and (document, position) != (walk.document, walk.position):
        raise CorruptShardError(
            f"{place}: begins with token {position} of document {document}, not {walk.position} of {walk.document}"
        )
    if walk.known and walk.last_token not in (None, int(tokens[0])):
        raise CorruptShardError(f"{place}: begins with token id {tokens[0]}, the chunk before ends with another")
    inner = ends[ends < len(tokens)]  # a document that ends with the chunk goes on, as its last token is repeated
    walk.document = document + len(inner)
    walk.position = len(tokens) - 1 - int(inner[-1]) if len(inner) else position + len(tokens) - 1
    walk.last_token, walk.known = int(tokens[-1]), True


def _verify_end(folder: Path, part: dict[str, Any], manifest: Manifest, walk: _Walk) -> list[str]:
    """What is wrong with where the last chunk of a part leaves off."""
    if walk.last_token != manifest.tokenizer["end_of_document"]:
        return [f"{folder}: the last shard of part {part['name']} ends inside a document"]
    if walk.document + 1 != part["documents"]:  # the last token closes one more
        held = f"{walk.document + 1} documents, {MANIFEST} says {part['documents']}"
        return [f"{folder}: the shards of part {part['name']} hold {held}"]
    return []


def _chunk_of_block(index: ShardIndex, block: int) -> int:
    return int(np.searchsorted(index.chunks["first_block"], block, side="right")) - 1
