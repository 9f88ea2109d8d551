"""What is done with every input of a corpus, the same in all processes, and how far one of them has come."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from potamos.data.errors import SourceError
from potamos.data.sources import Document, Input, Record, Source, meta_value
from potamos.data.tokenizer import Tokenizer

MAX_GROUPS = 500  # each has a file open and a chunk in memory


@dataclass(frozen=True)
class Progress:
    """How far this process has come, its finished inputs included; handed to ``progress`` after every batch."""

    bytes_read: int  # of the inputs' files as they are on the disk
    bytes_total: int  # of all inputs of this process; twice their bytes where they are hashed first
    documents: int
    tokens: int
    text_bytes: int
    part: int  # inputs finished in this stage
    parts: int  # inputs of this process
    stage: str = "tokenizing"  # or "hashing"


class Meter:
    """Adds up what `Progress` tells."""

    def __init__(self, inputs: Sequence[Input], passes: int, report: Callable[[Progress], None] | None):
        self._bytes = sum(input.bytes for input in inputs) * passes
        self._parts, self._report = len(inputs), report
        self._read = self._documents = self._tokens = self._text_bytes = self._part = 0
        self._stage = ""

    def begin(self, stage: str) -> None:
        self._stage, self._part = stage, 0

    def add(self, tokens: int, documents: int, text_bytes: int) -> None:
        self._tokens, self._documents = self._tokens + tokens, self._documents + documents
        self._text_bytes += text_bytes

    def finish(self, input: Input) -> None:
        """An input is done, by this process or before it."""
        self._read, self._part = self._read + input.bytes, self._part + 1
        self.tell(0)

    def tell(self, bytes_read: int) -> None:
        """Report, ``bytes_read`` bytes into the present input."""
        if self._report is not None:
            self._report(
                Progress(
                    self._read + bytes_read, self._bytes, self._documents, self._tokens, self._text_bytes,
                    self._part, self._parts, self._stage,
                )
            )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is done with every input, the same in all processes."""

    source: Source
    inputs: list[Input]
    tokenizer: Tokenizer
    chunk_tokens: int
    shard_chunks: int
    max_bad_ratio: float
    by: str | None

    def accepted(self, input: Input, record: Record, groups: Groups) -> Iterator[tuple[Document, str]]:
        """The documents of an input, each with the slug of its group, the empty one where nothing is grouped."""
        for document in self.source.read(input, record):
            slug = groups.slug(document)
            if slug is None:
                reason = f"no value for {self.by!r} to group by"
                record.reject(document.name, reason, document.text[:200].encode())
            else:
                yield document, slug


class Groups:
    """The values of the field that documents are grouped by, and the folder name of each."""

    def __init__(self, by: str | None):
        self._by = by
        self._slugs: dict[Any, str] = {}
        self.values: dict[str, str] = {} if by else {"": ""}

    def slug(self, document: Document) -> str | None:
        """None for a document without a value."""
        if self._by is None:
            return ""
        value = meta_value(document, self._by)
        if not isinstance(value, (str, int, float)) or isinstance(value, bool) or value == "":
            return None
        return self._slugs.get(value) or self._enter(value)

    def _enter(self, value: str | float) -> str:
        from potamos.data.mixtures import slug as slug_of

        name, slug = str(value), slug_of(str(value))
        other = self.values.setdefault(slug, name)
        if not slug or other != name:
            why = f"the same folder name {slug!r} as {other!r}" if slug else "no letter for a folder name"
            raise SourceError(f"the value {name!r} of {self._by!r} has {why}; rename it in the source")
        if len(self.values) > MAX_GROUPS:
            raise SourceError(f"{self._by!r} has more than {MAX_GROUPS} values: it names documents, not groups of them")
        self._slugs[value] = slug
        return slug


# --- whether an input is still the same --------------------------------------------------------------------------


def stamp(input: Input) -> list[list[int]]:
    """Bytes and time of the last change of every file: equal stamps are taken for equal files."""
    try:
        return [[status.st_size, status.st_mtime_ns] for status in map(os.stat, input.files)]
    except OSError as error:
        raise SourceError(f"{error.filename}: cannot be read: {error.strerror}; mend or leave out the file") from None


def is_unchanged(job: Job, input: Input, about: dict[str, Any]) -> bool:
    """Whether an input is the one that ``about`` was made from: by its stamp, else by its bytes."""
    if about["input"] != input.name or not input.files:  # texts that are in no file cannot be compared
        return False
    return about["stamp"] == stamp(input) or same_files(job.source, input, about["files"])


def same_files(source: Source, input: Input, files: list[dict[str, Any]]) -> bool:
    """Whether an input's files have the bytes that an earlier reading of it recorded."""
    if not input.files:
        return False
    if len(input.files) == 1:
        try:
            with open(input.files[0], "rb") as file:
                found = [(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())]
        except OSError as error:
            raise SourceError(f"{input.files[0]}: cannot be read: {error.strerror}; mend or leave it out") from None
    else:
        record = Record(max_bad_ratio=1.0)
        for _ in source.read(input, record):  # only the source knows how it sums several files up
            pass
        found = [(file["bytes"], file["sha256"]) for file in record.files]
    return found == [(file["bytes"], file["sha256"]) for file in files]
