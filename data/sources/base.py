"""What a corpus is to the rest of the room: inputs, each read by one process into a stream of documents.

A source lists its inputs in a fixed order; each becomes one part of a dataset. What was met while one input was read
(counts, bad records, bytes, the sha256 of its files) is kept in a `Record` of its own, so that inputs can be read by
different processes, in any order, and again after a kill. A new corpus is a class with the four members of `Source`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from potamos.data.errors import SourceError
from potamos.data.tokenizer import replace_surrogates

SPLITS = ("train", "validation", "all")
MAX_BAD_RATIO = 1e-4
BLOCK_BYTES = 2**20
# With so many bad records the ratio is judged at once: a corpus of another format need not be read to its end.
MANY_BAD = 1000
START_BYTES = 200


class Document(NamedTuple):
    """One text, without lone surrogates and not blank, where it comes from, and what its source says about it."""

    text: str
    name: str
    meta: dict[str, Any] = {}  # noqa: RUF012 (a default that nobody writes to)


@dataclass
class Counts:
    """Documents given out, blank ones dropped, bad ones rejected, texts with surrogates mended, duplicates removed."""

    documents: int = 0
    blank: int = 0
    rejected: int = 0
    mended: int = 0
    duplicates: int = 0

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Input:
    """What one process reads: a name that is unique in its source and relative to its root, files, bytes on disk."""

    name: str
    files: tuple[Path, ...]
    bytes: int


class Source(Protocol):
    """What `prepare` reads: ``description`` goes into dataset.json, so it holds no absolute path and no date.

    ``shard_chunks`` is how many chunks a shard suit the corpus. ``inputs()`` is the same list in every process.
    ``read`` gives the documents of one input and fails with `SourceError`, never with a part of them: what it gave out
    counts only once it has ended.
    """

    shard_chunks: int

    @property
    def description(self) -> dict[str, Any]: ...
    def inputs(self) -> list[Input]: ...
    def read(self, input: Input, record: Record) -> Iterator[Document]: ...


@dataclass
class Record:
    """What one reading of one input met. Attributes grow while documents are drawn and are complete at the end.

    A bad record is appended to the file ``rejects`` as {"place", "reason", "start"}; one left there by an earlier
    reading is removed. ``files`` names each raw file read to its end with its size and sha256, computed on the way; an
    input of several files has one entry for all, whose sha256 is that of the lines ``sha256sum`` prints for them.
    """

    rejects: Path | None = None
    max_bad_ratio: float = MAX_BAD_RATIO
    counts: Counts = field(default_factory=Counts)
    lines: int = 0  # records met, good or bad; empty lines are none
    bytes_read: int = 0  # of the files as they are on the disk
    files: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_ratio(self.max_bad_ratio)
        self._name, self._unit, self._last_reject = "", "lines", ""
        if self.rejects is not None:
            self.rejects.unlink(missing_ok=True)

    def start(self, input: Input, unit: str = "lines") -> None:
        """Called by a source as its reading begins; ``unit`` is what it calls its records in messages."""
        assert not self._name, "a record belongs to one reading of one input"
        self._name, self._unit = input.name, unit

    def blocks(self, path: Path, name: str, size: int = BLOCK_BYTES) -> Iterator[bytes]:
        """The raw bytes of a file in blocks of ``size``, hashed and counted as they pass.

        Raises:
            SourceError: the file cannot be read, or changed its size meanwhile.
        """
        digest, total = hashlib.sha256(), 0
        try:
            with open(path, "rb", buffering=0) as file:
                expected = os.fstat(file.fileno()).st_size
                while block := file.read(size):
                    digest.update(block)
                    total += len(block)
                    self.bytes_read += len(block)
                    yield block
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}; mend or leave out the file") from None
        if total != expected:
            raise SourceError(
                f"{path}: had {expected} bytes when opened and {total} at its end; read it when it is written no more"
            )
        self.files.append({"name": name, "bytes": total, "sha256": digest.hexdigest()})

    def admit(self, text: str, name: str, meta: dict[str, Any] | None = None) -> Document | None:
        """Count one text: a document with lone surrogates mended, or None for a blank one."""
        if not text or text.isspace():
            self.counts.blank += 1
            return None
        if not text.isascii():
            try:
                text.encode()  # several times as fast as a search for surrogates
            except UnicodeEncodeError:
                text = replace_surrogates(text)
                self.counts.mended += 1
        self.counts.documents += 1
        return Document(text, name, meta or {})

    def reject(self, place: str, reason: str, start: bytes) -> None:
        """Count one bad record and list it.

        Raises:
            SourceError: there are many, and more than ``max_bad_ratio`` of those read so far.
        """
        self.counts.rejected += 1
        self._last_reject = f"{place}: {reason}"
        if self.rejects is not None:
            self.rejects.parent.mkdir(parents=True, exist_ok=True)
            entry = {"place": place, "reason": reason, "start": start[:START_BYTES].decode("utf-8", "replace")}
            with open(self.rejects, "a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
        if self.counts.rejected >= MANY_BAD:
            self.judge()

    def judge(self) -> None:
        """Fail if more than ``max_bad_ratio`` of the input's records are bad.

        Raises:
            SourceError: with both numbers and the last bad one.
        """
        if self.counts.rejected > self.max_bad_ratio * self.lines:
            where = f"; all are listed in {self.rejects}" if self.rejects is not None else ""
            raise SourceError(
                f"{self._name}: {self.counts.rejected} of {self.lines} {self._unit} are bad, more than the allowed "
                f"ratio {self.max_bad_ratio:g} (the last is {self._last_reject}){where}; mend them or raise "
                f"--max-bad-ratio"
            )

    def finish(self) -> None:
        """Called by a source as its reading ends: judge, and give an input of several files its one entry."""
        self.judge()
        if len(self.files) > 1:
            listing = "".join(f"{file['sha256']}  {file['name']}\n" for file in self.files)
            size = sum(file["bytes"] for file in self.files)
            digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
            self.files[:] = [{"name": f"{self._name} ({len(self.files)} files)", "bytes": size, "sha256": digest}]


def documents(
    source: Source, *, max_bad_ratio: float = MAX_BAD_RATIO, counts: Counts | None = None
) -> Iterator[Document]:
    """All documents of all inputs; what was met in each is added to ``counts`` at its end.

    Raises:
        SourceError: as the source's ``read``.
    """
    for input in source.inputs():
        record = Record(max_bad_ratio=max_bad_ratio)
        yield from source.read(input, record)
        if counts is not None:
            counts.add(record.counts)


def meta_value(document: Document, key: str) -> Any:
    """The value at a dotted path of a document's meta, for instance ``meta.pile_set_name``; None if there is none."""
    value: Any = document.meta
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


class TextList:
    """Texts in memory as a source of one input: for programs that make their text themselves, and for trials."""

    shard_chunks = 512

    def __init__(self, texts: Sequence[str], name: str = "memory"):
        self.texts, self._name = texts, name

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "memory", "name": self._name, "texts": len(self.texts)}

    def inputs(self) -> list[Input]:
        return [Input(self._name, (), 0)]

    def read(self, input: Input, record: Record) -> Iterator[Document]:
        record.start(input, "texts")
        for number, text in enumerate(self.texts):
            record.lines += 1
            if document := record.admit(text, str(number)):
                yield document
        record.finish()


def check_ratio(ratio: float) -> None:
    if not 0 <= ratio <= 1:
        raise SourceError(f"--max-bad-ratio {ratio} is no share of the lines; give a number from 0 to 1")


def check_split(split: str) -> str:
    if split not in SPLITS:
        raise SourceError(f"split {split!r} is unknown; known splits: {', '.join(SPLITS)}")
    return split


def held_out(group: str) -> bool:
    """Whether a group of documents (a service, a country) belongs to the validation split: about one in twenty.

    Decided by a hash of its name alone, so a group stays on its side when a corpus grows.
    """
    return int.from_bytes(hashlib.blake2b(group.encode(), digest_size=8).digest(), "big") % 20 == 7


def wanted(split: str, validation: bool) -> bool:
    return split == "all" or validation == (split == "validation")
