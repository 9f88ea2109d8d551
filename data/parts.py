"""One input becomes one part: its documents tokenized into shards of its own, in a folder that appears when whole.

A part is a function of the input, the tokenizer and the settings alone (and of the other inputs' texts where exact
duplicates are removed), so it does not matter which process writes it, or how often one was killed before.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.dedup import DocumentHashes, save_array
from potamos.data.errors import DatasetError, TokenizerError
from potamos.data.job import Groups, Job, Meter, is_unchanged, stamp
from potamos.data.shards import ShardWriter, index_path, token_dtype
from potamos.data.sources import Document, Input, Record
from potamos.data.workfolder import WorkFolder, read_json, rename_durably, to_json
from potamos.files import write_atomically

BATCH_CHARACTERS = 2_000_000
PART = "part.json"
REJECTS = "rejects.jsonl"


@dataclass
class _Group:
    """What one part holds of one group."""

    writer: ShardWriter
    text_bytes: int = 0
    duplicates: int = 0

    def entry(self, value: str) -> dict[str, Any]:
        writer = self.writer
        return {
            "value": value,
            "shards": writer.shards,
            "tokens": writer.tokens,
            "documents": writer.documents,
            "text_bytes": self.text_bytes,
            "max_token": max(writer.max_token, 0),
            "duplicates": self.duplicates,
        }


# --- hashing -----------------------------------------------------------------------------------------------------


def hash_input(job: Job, work: WorkFolder, number: int, meter: Meter) -> None:
    """Write the sorted hashes of an input's documents; the caller holds the input's lock."""
    input = job.inputs[number]
    seen = stamp(input)
    record = Record(work.rejects(number), job.max_bad_ratio)
    hashes, groups, characters = DocumentHashes(), Groups(job.by), 0
    for document, _ in job.accepted(input, record, groups):
        hashes.add(document.text)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            meter.tell(record.bytes_read)
            characters = 0
    save_array(hash_table(work, number), hashes.table())
    about = {"input": input.name, "stamp": seen, "files": record.files, "documents": len(hashes)}
    write_atomically(hash_entry(work, number), to_json(about))
    work.rejects(number).unlink(missing_ok=True)  # they are met again when the part is written


def hash_table(work: WorkFolder, number: int) -> Path:
    return work.hashes / f"{number:05d}.npy"


def hash_entry(work: WorkFolder, number: int) -> Path:
    return work.hashes / f"{number:05d}.json"


def is_hashed(job: Job, work: WorkFolder, number: int) -> bool:
    """Whether an input's hashes are there and the input is still what it was.

    Raises:
        DatasetError: it changed after all inputs were compared.
    """
    about = read_json(hash_entry(work, number))
    if about is None:
        return False
    if is_unchanged(job, job.inputs[number], about):
        return True
    if work.duplicates.exists():
        raise _changed(job.inputs[number], work)
    return False


def _changed(input: Input, work: WorkFolder) -> DatasetError:
    return DatasetError(
        f"input {input.name} changed after its documents were compared with those of the others; remove {work.path} "
        f"and begin again"
    )


# --- the part ----------------------------------------------------------------------------------------------------


def write_part(
    job: Job, work: WorkFolder, number: int, meter: Meter, left_out: np.ndarray | None, hashed: dict[str, Any] | None
) -> None:
    """Read, tokenize and write one input; the caller holds the part's lock.

    Args:
        left_out: whether each accepted document is left out, shape (documents,); None to keep all.
        hashed: what `hash_input` wrote of the input that ``left_out`` was made from.

    Raises:
        SourceError: the input cannot be read, or too much of it is bad.
        TokenizerError: the tokenizer loses text or writes its own end-of-document id.
        DatasetError: the input changed after it was hashed.
    """
    input, target = job.inputs[number], work.part(number)
    temporary, old = (target.with_name(f".{target.name}.{kind}") for kind in ("tmp", "old"))
    for stale in (temporary, old):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        seen = stamp(input)
        record = Record(work.rejects(number), job.max_bad_ratio)
        part = _PartWriter(job, temporary, number, meter)
        ordinal = part.write(input, record, left_out)
        if hashed is not None and (ordinal, record.files) != (hashed["documents"], hashed["files"]):
            raise _changed(input, work)
        if work.rejects(number).exists():
            os.replace(work.rejects(number), temporary / REJECTS)
        write_atomically(
            temporary / PART,
            to_json(
                {
                    "input": input.name,
                    "stamp": seen,
                    "files": record.files,
                    "blank": record.counts.blank + part.empty,
                    "rejected": record.counts.rejected,
                    "mended": record.counts.mended,
                    "groups": part.entries(),
                }
            ),
        )
        if target.exists():
            os.replace(target, old)
        rename_durably(temporary, target)
    finally:
        for stale in (temporary, old):
            shutil.rmtree(stale, ignore_errors=True)


class _PartWriter:
    """Tokenizes documents in batches into the shards of their groups."""

    def __init__(self, job: Job, folder: Path, number: int, meter: Meter):
        self._job, self._folder, self._number, self._meter = job, folder, number, meter
        self._sizes = job.tokenizer.token_bytes() if job.tokenizer.exact_bytes else None
        self._names = Groups(job.by)
        self._groups: dict[str, _Group] = {}
        self.empty = 0  # documents of which the tokenizer makes nothing

    def write(self, input: Input, record: Record, left_out: np.ndarray | None) -> int:
        """All documents of the input; returns how many there were, those left out included."""
        ordinal, characters = 0, 0
        batch: list[tuple[Document, _Group]] = []
        for document, slug in self._job.accepted(input, record, self._names):
            group = self._groups.get(slug) or self._open(slug)
            ordinal += 1
            if left_out is not None and (ordinal > len(left_out) or left_out[ordinal - 1]):
                group.duplicates += 1
                continue
            batch.append((document, group))
            characters += len(document.text)
            if characters >= BATCH_CHARACTERS:
                self._tokenize(batch)
                self._meter.tell(record.bytes_read)
                batch, characters = [], 0
        if batch:
            self._tokenize(batch)
            self._meter.tell(record.bytes_read)
        for group in self._groups.values():
            group.writer.finish()
        return ordinal

    def entries(self) -> dict[str, dict[str, Any]]:
        """What part.json says of each group, by slug."""
        if self._job.by is None and not self._groups:
            self._open("")
        return {slug: group.entry(self._names.values[slug]) for slug, group in sorted(self._groups.items())}

    def _open(self, slug: str) -> _Group:
        job, folder = self._job, self._folder / slug
        folder.mkdir(exist_ok=True)
        description = job.source.description
        writer = ShardWriter(
            folder, token_dtype(job.tokenizer.vocabulary), chunk_tokens=job.chunk_tokens,
            shard_chunks=job.shard_chunks, part=self._number,
            source=self._names.values[slug] or str(description.get("name", description["kind"])),
        )  # fmt: skip
        self._groups[slug] = _Group(writer)
        return self._groups[slug]

    def _tokenize(self, batch: list[tuple[Document, _Group]]) -> None:
        tokenizer = self._job.tokenizer
        end = tokenizer.end_of_document
        encoded = tokenizer.encode_batch([document.text for document, _ in batch])
        counts = np.array([len(ids) for ids in encoded], np.int64)
        lengths = np.array([_utf8_length(document.text) for document, _ in batch], np.int64)
        # One array for the whole batch, each document with its end behind it.
        after = np.cumsum(counts + 1)
        joined = np.empty(int(after[-1]), np.int32)
        joined[after - 1] = end
        for ids, stop in zip(encoded, after.tolist(), strict=True):
            joined[stop - 1 - len(ids) : stop - 1] = ids
        self._check(batch, joined, after, lengths)
        first = 0
        for (_, group), stop, length in zip(batch, after.tolist(), lengths.tolist(), strict=True):
            if stop - first > 1:
                group.writer.add(joined[first:stop])
                group.text_bytes += length
            else:
                self.empty += 1
            first = stop
        self._meter.add(len(joined), len(batch), int(lengths.sum()))

    def _check(
        self, batch: list[tuple[Document, _Group]], joined: np.ndarray, after: np.ndarray, lengths: np.ndarray
    ) -> None:
        """Ids must stand for as many bytes as their text has, and only the last one of a document may close it."""
        first = np.concatenate([[0], after[:-1]])
        ends = np.add.reduceat(joined == self._job.tokenizer.end_of_document, first, dtype=np.int64)
        if (ends != 1).any():
            name = batch[int(np.argmax(ends != 1))][0].name
            raise TokenizerError(f"document {name}: the tokenizer put an end of document into its text")
        if self._sizes is not None:
            wrong = np.add.reduceat(self._sizes[joined], first, dtype=np.int64) != lengths
            if wrong.any():
                at = int(np.argmax(wrong))
                raise TokenizerError(
                    f"document {batch[at][0].name}: {lengths[at]} bytes of text, but its ids stand for others"
                )


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def read_part(work: WorkFolder, number: int) -> dict[str, Any] | None:
    """What a finished part says of itself, None where there is none."""
    return read_json(work.part(number) / PART)


def missing_shard(work: WorkFolder, number: int, part: dict[str, Any]) -> Path | None:
    """The first file of a part that is not there in its full size, neither in its own folder nor moved on."""
    for slug, group in part["groups"].items():
        for shard in group["shards"]:
            for name, size in ((shard["name"], "bytes"), (index_path(Path(shard["name"])).name, "index_bytes")):
                places = (work.part(number) / slug / name, work.dataset / slug / name)
                if not any(path.exists() and path.stat().st_size == shard[size] for path in places):
                    return places[0]
    return None


def is_written(job: Job, work: WorkFolder, number: int) -> bool:
    """Whether a part is there with all its files, and its input is still what it was."""
    part = read_part(work, number)
    if part is None or missing_shard(work, number, part) is not None:
        return False
    return is_unchanged(job, job.inputs[number], part)
