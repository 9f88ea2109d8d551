"""An opened dataset: shards mapped into memory, blocks checked once on first touch, rows cut at any place."""

from __future__ import annotations

import bisect
import itertools
import mmap
import os
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potamos.data.errors import CorruptShardError, DatasetError, TokenizerMismatchError
from potamos.data.manifest import Manifest, open_index, read_manifest
from potamos.data.shards import CRC_BLOCK, ShardIndex

MAX_OPEN_SHARDS = 256  # each mapped shard holds a file descriptor


class _Shard:
    """One mapped shard."""

    def __init__(self, path: Path, index: ShardIndex, checked: bytearray):
        self.path, self.index, self._checked = path, index, checked
        with open(path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if len(self.bytes) != index.tar_bytes:
            raise CorruptShardError(f"shard {path} has {len(self.bytes)} bytes, {index.tar_bytes} when the run began")
        # Payloads follow a 512-byte tar header and a padded .npy header, so they are aligned and one view serves all.
        self.tokens = np.frombuffer(self.bytes, index.dtype)
        self.ends = np.frombuffer(self.bytes, "<i4")
        self.itemsize = index.dtype.itemsize
        self.chunks = index.chunks.tolist()  # tuples: reading fields of a NumPy record costs more than cutting a row

    def check(self, chunk: int, offset: int, begin: int, end: int, payload: int, block: int) -> None:
        """Check the crc32 of the not yet checked blocks under bytes [begin, end) of a payload of ``payload`` bytes."""
        first, last = block + begin // CRC_BLOCK, block - -end // CRC_BLOCK
        while (first := self._checked.find(0, first, last)) >= 0:
            start = (first - block) * CRC_BLOCK
            place = offset + start
            with memoryview(self.bytes)[place : offset + min(start + CRC_BLOCK, payload)] as view:
                if zlib.crc32(view) != self.index.crcs[first]:
                    raise CorruptShardError(
                        f"shard {self.path}, chunk {chunk} of the shard, bytes {place} to {place + len(view)}: crc32 "
                        f"does not match the index: the data changed on disk; copy or prepare the dataset again"
                    )
            self._checked[first] = 1


class TokenDataset:
    """A dataset opened for reading rows; everything that can be checked without reading tokens is checked here.

    Args:
        path: the dataset's folder.
        tokenizer_sha256: refuse data of another tokenizer.
        vocabulary: refuse ids this model has no embedding for.

    Raises:
        DatasetError: not a finished dataset, or ids beyond the vocabulary.
        CorruptShardError: a shard or index is missing, truncated or stale.
        TokenizerMismatchError: prepared with another tokenizer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer_sha256: str | None = None,
        vocabulary: int | None = None,
    ):
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        self._check_fit(tokenizer_sha256, vocabulary)
        self._indexes = [open_index(self.path, entry) for entry in self.manifest.shards]
        for entry, index in zip(self.manifest.shards, self._indexes, strict=True):
            self._check_index(entry, index)
        self._first_chunk = list(itertools.accumulate((len(index.chunks) for index in self._indexes), initial=0))
        self._checked: list[bytearray | None] = [None] * len(self._indexes)
        self._open: dict[int, _Shard] = {}
        self._lock = threading.Lock()

    def _check_fit(self, tokenizer_sha256: str | None, vocabulary: int | None) -> None:
        theirs = self.manifest.tokenizer["sha256"]
        if tokenizer_sha256 is not None and theirs != tokenizer_sha256:
            raise TokenizerMismatchError(
                f"dataset {self.path} was prepared with tokenizer {theirs[:12]}, the run uses {tokenizer_sha256[:12]}; "
                f"prepare the dataset again or use its tokenizer"
            )
        if vocabulary is not None and self.manifest.max_token >= vocabulary:
            raise DatasetError(
                f"dataset {self.path} holds token id {self.manifest.max_token}, the model's vocabulary ends at "
                f"{vocabulary - 1}; set the vocabulary to at least {self.manifest.max_token + 1}"
            )
        if self.manifest.documents >= 2**31:
            raise DatasetError(f"dataset {self.path} has {self.manifest.documents} documents; split it below 2**31")

    def _check_index(self, entry: dict[str, Any], index: ShardIndex) -> None:
        if index.dtype != self.manifest.dtype:
            raise CorruptShardError(
                f"shard {self.path / entry['name']} stores {index.dtype}, dataset.json says {self.manifest.dtype}"
            )
        full = self.manifest.chunk_tokens + 1
        short = index.chunks["tokens"] != full
        is_last = entry is self.manifest.shards[-1]
        if short[:-1].any() or (short[-1] and not is_last) or len(index.chunks) != entry["chunks"]:
            raise CorruptShardError(
                f"shard {self.path / entry['name']}: a chunk in the middle does not have {full} tokens"
            )

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def chunks(self) -> int:
        return self._first_chunk[-1]

    @property
    def last_chunk_tokens(self) -> int:
        """Tokens stored in the last chunk; every other holds ``chunk_tokens`` + 1."""
        return int(self._indexes[-1].chunks["tokens"][-1])

    def rows(self, length: int) -> int:
        """Whole rows of ``length`` inputs and targets; rows never cross a chunk."""
        return (self.chunks - 1) * (self.manifest.chunk_tokens // length) + (self.last_chunk_tokens - 1) // length

    def tail(self, length: int) -> int:
        """Targets that no row of this length reads."""
        return self.manifest.tokens - 1 - self.rows(length) * length

    def place(self, row: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(chunk, first token in the chunk) of rows numbered along the stream."""
        per_chunk = self.manifest.chunk_tokens // length
        assert per_chunk > 0, "a dataset without a whole row has none to place"
        return row // per_chunk, row % per_chunk * length

    def locate(self, chunk: int) -> tuple[_Shard, int, Any]:
        """The mapped shard of a chunk, the chunk's number in it, and its index record as a tuple."""
        number = bisect.bisect_right(self._first_chunk, chunk) - 1
        shard = self._open.get(number) or self._map(number)
        local = chunk - self._first_chunk[number]
        return shard, local, shard.chunks[local]

    def _map(self, number: int) -> _Shard:
        with self._lock:
            index = self._indexes[number]
            checked = self._checked[number]
            if checked is None:
                checked = self._checked[number] = bytearray(len(index.crcs))
            shard = self._open[number] = _Shard(self.path / self.manifest.shards[number]["name"], index, checked)
            while len(self._open) > MAX_OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))
        return shard


def read_rows(
    datasets: Sequence[TokenDataset],
    source: np.ndarray,
    chunk: np.ndarray,
    start: np.ndarray,
    width: int,
    *,
    true_positions: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut ``width`` tokens at each (dataset, chunk, first token in the chunk), arrays of shape (n,).

    Returns:
        tokens, document ids and positions, each (n, width) int32. Where a chunk ends before the width does, tokens are
        the end-of-document id, document ids -1 and positions 0. Positions of a document that began before the start
        count from the start, or with ``true_positions`` from the document's beginning.

    Raises:
        CorruptShardError: a block read for the first time does not match its crc32.
    """
    n = len(chunk)
    tokens = np.empty((n, width), np.int32)
    document = np.empty(n, np.int64)
    position = np.zeros(n, np.int64)
    inner: list[np.ndarray] = []
    inner_row: list[int] = []
    padded: list[tuple[int, int]] = []
    bounds = np.empty(2, np.int32)
    for i, (which, c, s) in enumerate(zip(source.tolist(), chunk.tolist(), start.tolist(), strict=True)):
        shard, local, record = datasets[which].locate(c)
        offset, count, documents, end_offset, first_document, first_position, block = record
        size = shard.itemsize
        stop = s + width
        if stop > count:
            padded.append((i, count - s))
            stop = count
        shard.check(local, offset, s * size, stop * size, count * size, block)
        at = offset // size
        tokens[i, : stop - s] = shard.tokens[at + s : at + stop]
        low, began = 0, -first_position
        if documents:
            shard.check(local, end_offset, 0, 4 * documents, 4 * documents, block - -count * size // CRC_BLOCK)
            ends = shard.ends[end_offset // 4 : end_offset // 4 + documents]
            bounds[0], bounds[1] = s, stop - 1
            low, high = ends.searchsorted(bounds, "right").tolist()
            if high > low:
                inner.append(ends[low:high] + (i * width - s))
                inner_row.append(i)
            if low:
                began = int(ends[low - 1])
        document[i] = first_document + low
        if true_positions:
            position[i] = s - began
    document_ids, positions = _segments(n, width, document, position, inner, inner_row)
    for i, kept in padded:
        tokens[i, kept:] = datasets[int(source[i])].manifest.tokenizer["end_of_document"]
        document_ids[i, kept:] = -1
        positions[i, kept:] = 0
    return tokens, document_ids, positions


def _segments(
    n: int, width: int, document: np.ndarray, position: np.ndarray, inner: list[np.ndarray], inner_row: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Document ids and positions of n rows from the first id and position of each and the boundaries inside.

    ``inner`` holds, for the rows of ``inner_row``, where new documents begin in the flattened (n * width) array.
    """
    if not inner:
        ids = np.repeat(document.astype(np.int32), width).reshape(n, width)
        return ids, np.arange(width, dtype=np.int32) + position.astype(np.int32)[:, None]
    segments = np.ones(n, np.int64)
    segments[inner_row] += [len(part) for part in inner]
    first = np.cumsum(segments) - segments  # each row's first segment
    row = np.repeat(np.arange(n), segments)
    begins = np.empty(len(row), np.int64)
    is_first = np.zeros(len(row), bool)
    is_first[first] = True
    begins[first] = np.arange(n) * width
    begins[~is_first] = np.concatenate(inner)
    lengths = np.diff(begins, append=n * width)
    ids = document[row] + np.arange(len(row)) - first[row]
    zero = begins.copy()  # where position 0 of each segment lies, or would lie
    zero[first] -= position
    document_ids = np.repeat(ids.astype(np.int32), lengths).reshape(n, width)
    # int32 differences are exact even if the flat indices wrap
    positions = np.arange(n * width, dtype=np.int32) - np.repeat(zero.astype(np.int32), lengths)
    return document_ids, positions.reshape(n, width)
