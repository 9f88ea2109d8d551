"""dataset.json: what a prepared dataset holds, and the fingerprint that stands for all of it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.errors import CorruptShardError, DatasetError
from potamos.data.shards import ShardIndex, build_index, index_path, shard_entry

FORMAT = "potamos-tokens"
VERSION = 1
MANIFEST = "dataset.json"
_PREPARE = "prepare it with `potamos data prepare`"
# What readers rely on: the type of each field, numbers being whole and not negative.
_FIELDS = {
    "source": dict,
    "tokenizer": dict,
    "dtype": str,
    "chunk_tokens": int,
    "shards": list,
    "tokens": int,
    "documents": int,
    "text_bytes": int,
    "max_token": int,
    "blank": int,
    "rejected": int,
    "mended": int,
}
_TOKENIZER_FIELDS = {"kind": str, "sha256": str, "vocabulary": int, "end_of_document": int}
_SHARD_FIELDS = {"name": str, "bytes": int, "sha256": str, "index_sha256": str, "chunks": int, "tokens": int}


@dataclass(frozen=True)
class Manifest:
    """A parsed dataset.json. ``fingerprint`` is the sha256 of every other field."""

    fields: dict[str, Any]
    fingerprint: str

    @property
    def shards(self) -> list[dict[str, Any]]:
        return self.fields["shards"]

    @property
    def chunk_tokens(self) -> int:
        """The stride of chunks; each full chunk stores one token more."""
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
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {error}; {_PREPARE}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise DatasetError(f"{path} does not describe a token dataset; {_PREPARE}")
    if fields.get("version") != VERSION:
        raise DatasetError(
            f"{path} has format version {fields.get('version')}; this program reads {VERSION}; {_PREPARE}"
        )
    _check_fields(fields, path)
    stored = fields.pop("fingerprint", None)
    if stored != _fingerprint(fields):
        raise DatasetError(f"{path} was changed after it was written (its fingerprint does not hold); {_PREPARE} again")
    return Manifest(fields, stored)


def _check_fields(fields: dict[str, Any], path: Path) -> None:
    _check_types(fields, _FIELDS, path)
    _check_types(fields["tokenizer"], _TOKENIZER_FIELDS, path, "tokenizer.")
    for number, shard in enumerate(fields["shards"]):
        _check_types(shard, _SHARD_FIELDS, path, f"shards[{number}].")
    for key, sound, wanted in [
        ("dtype", fields["dtype"] in ("<u2", "<u4"), "'<u2' or '<u4'"),
        ("chunk_tokens", fields["chunk_tokens"] >= 1, "at least 1"),
        ("shards", len(fields["shards"]) >= 1, "at least one shard"),
    ]:
        if not sound:
            raise DatasetError(f"{path}: field {key!r} is {fields[key]!r}, not {wanted}; {_PREPARE} again")
    for number, shard in enumerate(fields["shards"]):
        if Path(shard["name"]).name != shard["name"]:  # a shard lies in its dataset's folder
            raise DatasetError(
                f"{path}: field 'shards[{number}].name' is {shard['name']!r}, not a file name; {_PREPARE} again"
            )


def _check_types(fields: Any, types: dict[str, type], path: Path, within: str = "") -> None:
    if not isinstance(fields, dict):
        raise DatasetError(f"{path}: field {within[:-1]!r} is {fields!r}, not a table; {_PREPARE} again")
    for key, wanted in types.items():
        if key not in fields:
            raise DatasetError(f"{path}: field {within + key!r} is missing; {_PREPARE} again")
        value = fields[key]
        if type(value) is not wanted or (wanted is int and value < 0):  # a bool is no number here
            kind = "a whole number from 0 on" if wanted is int else wanted.__name__
            raise DatasetError(f"{path}: field {within + key!r} is {value!r}, not {kind}; {_PREPARE} again")


def _fingerprint(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def open_index(folder: Path, entry: dict[str, Any]) -> ShardIndex:
    """Read the index of one shard of dataset.json and check shard and index against each other, without a scan.

    Raises:
        CorruptShardError: missing or truncated shard or index, or an index that belongs to another shard.
    """
    shard = folder / entry["name"]
    again = "copy the dataset again or prepare it again"
    try:
        actual = shard.stat().st_size
    except FileNotFoundError:
        raise CorruptShardError(f"shard {shard} is missing; {again}") from None
    if actual != entry["bytes"]:
        raise CorruptShardError(f"shard {shard} has {actual} bytes, {MANIFEST} says {entry['bytes']}; {again}")
    place = index_path(shard)
    try:
        content = place.read_bytes()
    except FileNotFoundError:
        raise CorruptShardError(f"index {place} is missing; {again}") from None
    index = ShardIndex.from_bytes(content, str(place))
    if hashlib.sha256(content).hexdigest() != entry["index_sha256"] or index.tar_sha256 != entry["sha256"]:
        raise CorruptShardError(f"index {place} is stale: it was made for another shard than {MANIFEST} lists; {again}")
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
    next_document: int | None = 0
    for entry in manifest.shards:
        try:
            index = open_index(folder, entry)
            if deep:
                next_document = _verify_shard(folder / entry["name"], index, entry, manifest, next_document)
            chunks, tokens = chunks + len(index.chunks), tokens + int(index.chunks["tokens"].sum())
        except CorruptShardError as error:
            problems.append(str(error))
            next_document = None  # a sound shard after a damaged one is no problem of its own
    known = {entry["name"] for entry in manifest.shards}
    problems += [
        f"shard {extra} is not listed in {MANIFEST}; remove it"
        for extra in sorted(folder.glob("*.tar"))
        if extra.name not in known
    ]
    if not problems and tokens - (chunks - 1) != manifest.tokens:
        problems.append(f"{folder}: shards hold {tokens - chunks + 1} tokens, {MANIFEST} says {manifest.tokens}")
    return VerifyReport(folder, deep, len(manifest.shards), chunks, tokens, tuple(problems))


def _verify_shard(
    shard: Path, index: ShardIndex, entry: dict[str, Any], manifest: Manifest, next_document: int | None
) -> int | None:
    """Compare a shard with its index byte for byte, and its ids with what the manifest promises of them.

    ``next_document`` is what the shard should begin with, None where that is not known; the next one's is returned.
    """
    rebuilt = build_index(shard)
    content = rebuilt.to_bytes()
    if shard_entry(shard.name, rebuilt, content) != entry or content != index.to_bytes():
        wrong = np.flatnonzero(rebuilt.crcs != index.crcs) if rebuilt.crcs.shape == index.crcs.shape else []
        where = f", first in chunk {_chunk_of_block(index, int(wrong[0]))} of the shard" if len(wrong) else ""
        raise CorruptShardError(f"shard {shard} differs from its index{where}; copy or prepare the dataset again")
    data = np.memmap(shard, np.uint8, mode="r")
    for number, chunk in enumerate(index.chunks):
        place = f"shard {shard}, chunk {number}"
        size = int(chunk["tokens"]) * index.dtype.itemsize
        tokens = data[chunk["token_offset"] : chunk["token_offset"] + size].view(index.dtype)
        ends = data[chunk["end_offset"] : chunk["end_offset"] + 4 * chunk["documents"]].view("<i4")
        if tokens.max(initial=0) > manifest.max_token:
            raise CorruptShardError(f"{place}: token {tokens.max()} is above the promised {manifest.max_token}")
        closing = np.flatnonzero(tokens == manifest.tokenizer["end_of_document"]) + 1
        if not np.array_equal(closing, ends):
            raise CorruptShardError(f"{place}: document ends do not match the end-of-document tokens")
        if next_document is not None and chunk["first_document"] != next_document:
            raise CorruptShardError(f"{place}: begins with document {chunk['first_document']}, not {next_document}")
        next_document = int(chunk["first_document"]) + int((ends < len(tokens)).sum())
    return next_document


def _chunk_of_block(index: ShardIndex, block: int) -> int:
    return int(np.searchsorted(index.chunks["first_block"], block, side="right")) - 1
