"""The functions behind ``potamos data ...``: plain arguments in, dataclasses out.

``tokenizer``: `train`; ``prepare``: `prepare_parts` and `finalize_datasets`, or `prepare_dataset` in one call for one
process; ``finalize``: `finalize_datasets`; ``inspect``: `summarize` and `sample`; ``verify``: `verify`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.errors import DatasetError, SourceError
from potamos.data.finalize import read_datasets, read_groups
from potamos.data.manifest import Manifest, VerifyReport, verify
from potamos.data.parts import REJECTS
from potamos.data.prepare import WAIT, Progress, Share, finalize, prepare
from potamos.data.shards import CHUNK_TOKENS
from potamos.data.sources import MAX_BAD_RATIO, MAX_LINE_BYTES, Counts, documents, open_source
from potamos.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

__all__ = [
    "DatasetSummary",
    "Excerpt",
    "LeftOut",
    "Progress",
    "Share",
    "TokenizerSummary",
    "VerifyReport",
    "finalize_datasets",
    "left_out",
    "place_of_row",
    "prepare_dataset",
    "sample",
    "summarize",
    "train",
    "verify",
]


@dataclass(frozen=True)
class TokenizerSummary:
    """A freshly trained tokenizer."""

    path: Path
    vocabulary: int
    sha256: str
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class DatasetSummary:
    """What a dataset holds."""

    path: Path
    source: dict[str, object]
    tokenizer: dict[str, object]
    parts: int
    shards: int
    chunks: int
    chunk_tokens: int
    tokens: int
    documents: int
    text_bytes: int
    blank: int
    rejected: int
    mended: int
    duplicates: int  # left out; 0 also where nobody looked for them
    deduplicated: bool
    fingerprint: str

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / self.tokens


@dataclass(frozen=True)
class LeftOut:
    """What of a corpus did not become part of its dataset, or of the datasets of its groups."""

    blank: int
    duplicates: int
    rejected: int
    rejects: Path  # where the rejected records are listed, if there are any


@dataclass(frozen=True)
class Excerpt:
    """Part of one document of a dataset, as ids and as text."""

    document: int
    begins: bool  # the document's first token is here
    ends: bool  # its end-of-document token is here
    tokens: tuple[int, ...]
    text: str


def train(
    source: str,
    vocabulary: int,
    out: str | os.PathLike[str],
    *,
    split: str = "all",
    special_tokens: Sequence[str] = (),
    sentinels: int = 0,
    max_bad_ratio: float = MAX_BAD_RATIO,
) -> tuple[Tokenizer, TokenizerSummary]:
    """Train a byte-level BPE tokenizer on a corpus (`train_bpe`); hold-out text stays out where ``split`` is ``train``.

    Raises:
        SourceError: the corpus cannot be read, too much of it is bad, or it holds no text.
    """
    corpus, counts, size = open_source(source, split), Counts(), 0

    def texts() -> Iterator[str]:
        nonlocal size
        for document in documents(corpus, max_bad_ratio=max_bad_ratio, counts=counts):
            size += len(document.text.encode())
            yield document.text

    read = texts()
    first = next(read, None)
    if first is None:
        raise SourceError(
            f"source {source!r}: no document with text ({counts.blank} blank), so there is nothing to "
            f"train a tokenizer on; choose another source"
        )
    texts_read = itertools.chain([first], read)
    tokenizer = train_bpe(texts_read, vocabulary, out, special_tokens=special_tokens, sentinels=sentinels)
    return tokenizer, TokenizerSummary(Path(out), tokenizer.vocabulary, tokenizer.sha256, counts.documents, size)


def prepare_dataset(
    source: str,
    out: str | os.PathLike[str],
    *,
    tokenizer_path: str | os.PathLike[str],
    tokenizer_kind: str = "json",
    split: str = "all",
    chunk_tokens: int = CHUNK_TOKENS,
    shard_chunks: int | None = None,
    max_bad_ratio: float = MAX_BAD_RATIO,
    max_line_bytes: int = MAX_LINE_BYTES,
    deduplicate: bool = False,
    force: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> DatasetSummary:
    """Load a tokenizer and `prepare` a dataset with it in this process."""
    tokenizer = load_tokenizer(tokenizer_kind, tokenizer_path)
    manifest = prepare(
        source, split, tokenizer, out, chunk_tokens=chunk_tokens, shard_chunks=shard_chunks,
        max_bad_ratio=max_bad_ratio, max_line_bytes=max_line_bytes, deduplicate=deduplicate, force=force,
        progress=progress,
    )  # fmt: skip
    return _summary(Path(out), manifest)


def finalize_datasets(
    out: str | os.PathLike[str], *, force: bool = False, wait: float = WAIT
) -> tuple[DatasetSummary, ...]:
    """Make the dataset, or one a group, of the parts of all processes (`finalize`)."""
    return tuple(_summary(path, manifest) for path, manifest in finalize(out, force=force, wait=wait).items())


def left_out(out: str | os.PathLike[str]) -> LeftOut:
    """Count what `finalize_datasets` left out of the dataset ``out``, or of the groups in it."""
    out = Path(out)
    groups, datasets = read_groups(out), read_datasets(out)
    inputs = groups["inputs"] if groups else [part for manifest in datasets.values() for part in manifest.parts]
    return LeftOut(
        blank=sum(part["blank"] for part in inputs),
        duplicates=sum(manifest.fields["duplicates"] for manifest in datasets.values())
        + sum(part["duplicates"] for part in (groups["empty"] if groups else ())),
        rejected=sum(part["rejected"] for part in inputs),
        rejects=out.with_name(f"{out.name}.{REJECTS}"),
    )


def summarize(path: str | os.PathLike[str]) -> DatasetSummary:
    """Read a dataset's description; shards and indexes are checked as at the start of a run."""
    dataset = TokenDataset(path)
    return _summary(dataset.path, dataset.manifest)


def sample(
    path: str | os.PathLike[str], tokenizer: Tokenizer, *, chunk: int = 0, start: int = 0, tokens: int = 256
) -> list[Excerpt]:
    """Decode ``tokens`` tokens of one chunk, cut at document boundaries.

    Raises:
        DatasetError: the chunk or the start lies outside the dataset.
        TokenizerMismatchError: the dataset was prepared with another tokenizer.
    """
    dataset = TokenDataset(path, tokenizer_sha256=tokenizer.sha256)
    if not 0 <= chunk < dataset.chunks:
        raise DatasetError(f"dataset {path} has chunks 0 to {dataset.chunks - 1}; there is no chunk {chunk}")
    stored = dataset.chunk_size(chunk)
    if not 0 <= start < stored or tokens < 1:
        raise DatasetError(f"chunk {chunk} of {path} holds tokens 0 to {stored - 1}; cannot read {tokens} from {start}")
    zero, width = np.zeros(1, np.int64), min(tokens, stored - start)
    at = (np.array([chunk]), np.array([start]))
    ids, documents, positions = read_rows([dataset], zero, *at, width, true_positions=True)
    excerpts = []
    for number in np.unique(documents[0]):
        part = ids[0][documents[0] == number]
        begins = bool(positions[0][documents[0] == number][0] == 0)
        ends = bool(part[-1] == tokenizer.end_of_document)
        excerpts.append(Excerpt(int(number), begins, ends, tuple(part.tolist()), tokenizer.decode(part)))
    return excerpts


def place_of_row(path: str | os.PathLike[str], row: int, length: int) -> tuple[int, int]:
    """(chunk, first token in it) of a row of ``length`` tokens, rows numbered as training numbers them.

    Raises:
        DatasetError: the dataset has no such row.
    """
    cut = TokenDataset(path).cut(length)
    if not 0 <= row < cut.total:
        raise DatasetError(f"dataset {path} has {cut.total} rows of {length} tokens; there is no row {row}")
    chunk, start = cut.place(np.array([row]))
    return int(chunk[0]), int(start[0])


def _summary(path: Path, manifest: Manifest) -> DatasetSummary:
    fields = manifest.fields
    return DatasetSummary(
        path=path,
        source=fields["source"],
        tokenizer=manifest.tokenizer,
        parts=len(manifest.parts),
        shards=len(manifest.shards),
        chunks=sum(entry["chunks"] for entry in manifest.shards),
        chunk_tokens=manifest.chunk_tokens,
        tokens=manifest.tokens,
        documents=manifest.documents,
        text_bytes=manifest.text_bytes,
        blank=fields["blank"],
        rejected=fields["rejected"],
        mended=fields["mended"],
        duplicates=fields["duplicates"],
        deduplicated=fields["deduplicated"],
        fingerprint=manifest.fingerprint,
    )
