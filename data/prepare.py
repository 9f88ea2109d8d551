"""Documents to token shards: read, tokenize in batches, close each document, cut into chunks, describe.

Everything is written into a hidden folder beside the target, which takes the target's name in one rename at the end.
The bytes are a function of the documents, the tokenizer and the sizes alone.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.errors import DatasetError, SourceError, TokenizerError
from potamos.data.files import flush_names, write_atomically
from potamos.data.manifest import MANIFEST, Manifest, make_manifest, read_manifest, totals, verify
from potamos.data.shards import CHUNK_TOKENS, ShardWriter, token_dtype
from potamos.data.sources import MAX_BAD_RATIO, Counts, Document, Record, Source, open_source
from potamos.data.tokenizer import Tokenizer

BATCH_CHARACTERS = 2_000_000


@dataclass(frozen=True)
class Progress:
    """How far `prepare` has come; handed to its ``progress`` callback after every batch."""

    documents: int
    tokens: int
    text_bytes: int


def prepare(
    source: str | os.PathLike[str] | Source,
    split: str,
    tokenizer: Tokenizer,
    out: str | os.PathLike[str],
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    shard_chunks: int | None = None,
    max_bad_ratio: float = MAX_BAD_RATIO,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Write the dataset ``out`` from a corpus.

    Args:
        source: what `open_source` understands, or a source of your own.
        split: ``train``, ``validation`` or ``all``.
        tokenizer: its end-of-document id closes every document.
        out: the dataset's folder. An equal dataset there is kept; another one is replaced only with ``force``.
        chunk_tokens: stride of the chunks; a row never crosses one.
        shard_chunks: chunks a shard, by default what suits the source.
        max_bad_ratio: share of bad lines of a JSON-lines source above which it fails.

    Rejected lines are listed in ``<out>.rejects.jsonl``, those of later inputs in ``<out>.rejects-N.jsonl``.

    Raises:
        SourceError: nothing to read, or too much of it bad.
        TokenizerError: the tokenizer loses text or writes its own end-of-document id.
        DatasetError: ``out`` holds something else.
    """
    out = Path(out)
    documents = open_source(source, split) if isinstance(source, (str, os.PathLike)) else source
    per_shard = shard_chunks or documents.shard_chunks
    settings = {
        "source": documents.description,
        "split": split,
        "tokenizer": {
            "kind": tokenizer.kind,
            "sha256": tokenizer.sha256,
            "vocabulary": tokenizer.vocabulary,
            "end_of_document": tokenizer.end_of_document,
        },
        "dtype": token_dtype(tokenizer.vocabulary).str,
        "chunk_tokens": chunk_tokens,
        "shard_chunks": per_shard,
    }
    _refuse_other(out, settings, force)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    _remove_stale(out)
    partial.mkdir(parents=True)
    try:
        writer = ShardWriter(
            partial, token_dtype(tokenizer.vocabulary), chunk_tokens=chunk_tokens, shard_chunks=per_shard,
            source=str(documents.description.get("name", documents.description["kind"])),
        )  # fmt: skip
        counts = Counts()
        text_bytes = _write(_read(documents, out, max_bad_ratio, counts), tokenizer, writer, progress)
        part = {
            "name": "all",
            "files": [],
            "shards": writer.shards,
            "tokens": writer.tokens,
            "documents": writer.documents,
            "text_bytes": text_bytes,
            "max_token": writer.max_token,
            "blank": counts.blank,
            "rejected": counts.rejected,
            "mended": counts.mended,
            "duplicates": 0,
        }
        manifest = make_manifest(
            {
                **settings,
                "layout": "chunks",
                "deduplicated": False,
                "parts": [part],
                **totals([part]),
            }
        )
        write_atomically(partial / MANIFEST, manifest.to_bytes())
        _publish(partial, out, manifest, force)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _read(source: Source, out: Path, max_bad_ratio: float, counts: Counts) -> Iterator[Document]:
    for number, input in enumerate(source.inputs()):
        record = Record(out.with_name(f"{out.name}.rejects{f'-{number}' if number else ''}.jsonl"), max_bad_ratio)
        yield from source.read(input, record)
        counts.add(record.counts)


def _write(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    writer: ShardWriter,
    progress: Callable[[Progress], None] | None,
) -> int:
    """Tokenize all documents into the writer; returns the bytes of their texts."""
    sizes = tokenizer.token_bytes()
    end = np.array([tokenizer.end_of_document], np.int32)
    text_bytes = 0
    for batch in _batches(documents):
        for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
            length = len(document.text.encode())
            if tokenizer.exact_bytes and int(sizes[ids].sum()) != length:
                raise TokenizerError(f"document {document.name}: {length} bytes of text, but its ids stand for others")
            if (ids == tokenizer.end_of_document).any():
                raise TokenizerError(f"document {document.name}: the tokenizer put an end of document into its text")
            text_bytes += length
            writer.add(np.concatenate([ids, end]))
        if progress is not None:
            progress(Progress(writer.documents, writer.tokens, text_bytes))
    writer.finish()
    if writer.tokens < 2:
        raise SourceError("the source gave no document with text; nothing to prepare")
    return text_bytes


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _refuse_other(out: Path, settings: dict[str, Any], force: bool) -> None:
    """Fail before the work where the target cannot be, or cannot be made, this dataset."""
    if not out.exists():
        return
    if not (out / MANIFEST).is_file():
        if not out.is_dir() or any(out.iterdir()):
            raise DatasetError(f"{out} exists and is no dataset; choose another place or remove it yourself")
        return
    if force:
        return
    fields = read_manifest(out).fields
    different = [
        f"{key} {fields.get(key)!r} there, {value!r} here"
        for key, value in settings.items()
        if fields.get(key) != value
    ]
    if different:
        raise DatasetError(
            f"{out} already holds another dataset ({'; '.join(different)}); choose another place or force"
        )


def _publish(partial: Path, out: Path, manifest: Manifest, force: bool) -> None:
    """Give the finished folder its name; an equal, sound dataset already there stays as it is.

    The names in the folder reached the disk with its last file, dataset.json (see `write_atomically`), before its own
    does, so that a power cut leaves no final name without files.
    """
    if (out / MANIFEST).is_file():
        if not force and read_manifest(out).fingerprint != manifest.fingerprint:
            raise DatasetError(f"{out} already holds a dataset of other texts; choose another place or force")
        if verify(out, deep=True).ok and read_manifest(out).fingerprint == manifest.fingerprint:
            return
        old = out.with_name(f".{out.name}.partial-old-{os.getpid()}")
        os.replace(out, old)
        os.replace(partial, out)
        flush_names(out.parent)
        shutil.rmtree(old)
        return
    os.replace(partial, out)
    flush_names(out.parent)


def _remove_stale(out: Path) -> None:
    """Remove what a killed run of the same target left behind, if its process is gone."""
    for stale in out.parent.glob(f".{out.name}.partial-*"):
        process = stale.name.rpartition("-")[2]
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(stale, ignore_errors=True)
