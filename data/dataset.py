"""An opened dataset: shards mapped when first read, blocks checked once on first touch, rows cut at any place."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import logging
import mmap
import os
import resource
import struct
import threading
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potamos.data.errors import CorruptShardError, DatasetError, TokenizerMismatchError
from potamos.data.files import LocalFiles, ShardFiles
from potamos.data.manifest import Manifest, check_sizes, open_index, read_manifest
from potamos.data.shards import CHUNK, CRC_BLOCK, ShardIndex

if TYPE_CHECKING:
    from potamos.data.members import MemberShard

_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
# Of all datasets of the process: each mapped shard holds a file descriptor, and others need theirs too.
MAX_OPEN_SHARDS = 4096 if _FILES == resource.RLIM_INFINITY else min(4096, max(16, _FILES // 4))
_RECORD = struct.Struct("<qiiqqqq")  # one CHUNK; a tuple of Python numbers costs a third of reading a NumPy record
assert _RECORD.size == CHUNK.itemsize
MANY_DOCUMENTS = 24  # in a row, from which on numbering them by arrays is faster than one by one
_log = logging.getLogger(__name__)
_opened: weakref.WeakSet[TokenDataset] = weakref.WeakSet()
_opening = threading.Lock()


class _Known:
    """What is known of a shard's file, kept while it is not mapped: its index and which blocks were found sound.

    About 0.2 MB for a shard of 256 MiB; with it, mapping the shard again reads and hashes nothing.
    """

    def __init__(self, identity: tuple[int, ...], index: ShardIndex):
        self.identity, self.index = identity, index
        self.checked = bytearray(len(index.crcs))
        self.sound = False  # all blocks


class _Shard:
    """One mapped shard of chunks."""

    def __init__(self, path: Path, content: mmap.mmap, known: _Known, first_document: int):
        self.path, self.bytes, self._known, self.first_document = path, content, known, first_document
        self._records = known.index.chunks.view(np.uint8).data
        # Payloads follow a 512-byte tar header and a padded .npy header, so they are aligned and one view serves all.
        self.tokens = np.frombuffer(content, known.index.dtype)
        self.ends = memoryview(content).cast("i")  # searched and read one by one, which costs less than with an array
        self.itemsize = known.index.dtype.itemsize
        self.sound = known.sound

    def read_row(self, chunk: int, start: int, stop: int, out: np.ndarray) -> tuple[int, int, list[int], int]:
        """Copy tokens [start, stop) of a chunk, or fewer where it ends before, to the first places of ``out``.

        Returns:
            The first token's document and place in it, where documents end in (start, stop), and the stop reached.
        """
        at = chunk * _RECORD.size
        offset, count, documents, end_offset, document, position, block = _RECORD.unpack_from(self._records, at)
        size = self.itemsize
        if stop > count:
            stop = count
        if not self.sound:
            self.check(chunk, offset, start * size, stop * size, count * size, block)
            self.check(chunk, end_offset, 0, 4 * documents, 4 * documents, block - -count * size // CRC_BLOCK)
        at = offset // size
        out[: stop - start] = self.tokens[at + start : at + stop]
        document += self.first_document
        position += start
        first = end_offset // 4
        low = bisect.bisect_right(self.ends, start, first, first + documents)
        high = bisect.bisect_right(self.ends, stop - 1, low, first + documents)
        if low > first:
            document += low - first
            position = start - self.ends[low - 1]
        return document, position, self.ends[low:high].tolist(), stop

    def check(self, chunk: int, offset: int, begin: int, end: int, payload: int, block: int) -> None:
        """Check the crc32 of the not yet checked blocks under bytes [begin, end) of a payload of ``payload`` bytes."""
        blocks = self._known.checked
        first, last = block + begin // CRC_BLOCK, block - -end // CRC_BLOCK
        found = blocks.find(0, first, last)
        while found >= 0:
            start = (found - block) * CRC_BLOCK
            place = offset + start
            with memoryview(self.bytes)[place : offset + min(start + CRC_BLOCK, payload)] as view:
                if zlib.crc32(view) != self._known.index.crcs[found]:
                    raise CorruptShardError(
                        f"shard {self.path}, chunk {chunk} of the shard, bytes {place} to {place + len(view)}: crc32 "
                        f"does not match the index: the data changed on disk; copy or prepare the dataset again"
                    )
            blocks[found] = 1
            found = blocks.find(0, found + 1, last)
            if found < 0 and blocks.find(0) < 0:
                self.sound = self._known.sound = True


class _Members:
    """One mapped shard of foreign members, read as one long chunk."""

    def __init__(self, shard: MemberShard):
        self._shard = shard

    def read_row(self, chunk: int, start: int, stop: int, out: np.ndarray) -> tuple[int, int, list[int], int]:
        """See `_Shard.read_row`."""
        assert chunk == 0, "a shard of members is one chunk"
        stop = min(stop, self._shard.tokens)
        document, position, ends = self._shard.read_row(start, stop, out[: stop - start])
        return self._shard.first_document + document, position, (ends + start).tolist(), stop


@dataclass(frozen=True, eq=False)
class Cut:
    """A dataset cut into rows of one length, numbered along its parts, shards and chunks.

    Attributes:
        total: rows.
        per_shard: (shards,) int64, rows of each shard of dataset.json; 0 for a dropped one.
    """

    total: int
    per_shard: np.ndarray
    _length: int
    _per_chunk: int
    _first_row: np.ndarray  # of each shard
    _first_chunk: np.ndarray

    def place(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(chunk, first token in the chunk) of rows, int64 of their shape."""
        shard = np.searchsorted(self._first_row, row, side="right") - 1
        chunk, within = np.divmod(row - self._first_row[shard], self._per_chunk)
        return self._first_chunk[shard] + chunk, within * self._length


class TokenDataset:
    """A dataset opened for reading rows.

    Opening reads dataset.json and compares the files' sizes with it. A shard's index is read and checked when the shard
    is first touched, a block's checksum when the block is.

    Args:
        path: the dataset's folder.
        tokenizer_sha256: refuse data of another tokenizer.
        vocabulary: refuse ids this model has no embedding for.
        on_bad_shard: ``error``, or ``skip`` to leave out every shard that is missing, has another size, or whose index
            is not the one listed (for which opening reads all indexes). The rows of other shards keep their order and
            documents their numbers.
        files: where the shards are; by default beside dataset.json. Others check sizes when they fetch.

    Attributes:
        dropped: names of the shards that were left out.

    Raises:
        DatasetError: not a finished dataset of tokens, ids beyond the vocabulary, or no shard is left.
        CorruptShardError: a shard or index is missing or truncated; from `read_rows` also: stale or damaged.
        TokenizerMismatchError: prepared with another tokenizer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tokenizer_sha256: str | None = None,
        vocabulary: int | None = None,
        on_bad_shard: str = "error",
        files: ShardFiles | None = None,
    ):
        if on_bad_shard not in ("error", "skip"):
            raise DatasetError(f"data.on_bad_shard {on_bad_shard!r} is unknown; known: error, skip")
        if on_bad_shard == "skip" and files is not None:
            raise DatasetError(
                f"data.on_bad_shard: skip with the shards of {path} elsewhere: which of them are bad is not known "
                f"before they are fetched; use data.on_bad_shard: error"
            )
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        self._check_fit(tokenizer_sha256, vocabulary)
        shards = self.manifest.shards
        self.files: ShardFiles = files or LocalFiles(self.path, [entry["name"] for entry in shards])
        bad = [] if files else self._check_files(skip=on_bad_shard == "skip")
        self.dropped: tuple[str, ...] = tuple(shards[number]["name"] for number in bad)
        self._lost = np.zeros(len(shards), bool)
        self._lost[bad] = True
        self._chunks_of = np.array([entry["chunks"] for entry in shards], np.int64)
        self._tokens_of = np.array([entry["tokens"] for entry in shards], np.int64)
        self._first_chunk = [0, *itertools.accumulate(self._chunks_of.tolist())]
        documents = itertools.accumulate((part["documents"] for part in self.manifest.parts), initial=0)
        self._first_document = [
            first for part, first in zip(self.manifest.parts, documents, strict=False) for _ in part["shards"]
        ]
        self._known: dict[int, _Known] = {}
        self._open: dict[int, _Shard | _Members] = {}
        with _opening:
            _opened.add(self)

    def _check_fit(self, tokenizer_sha256: str | None, vocabulary: int | None) -> None:
        if self.manifest.layout == "text":
            raise DatasetError(f"dataset {self.path} holds text: prepare it with `potamos data prepare`")
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

    def _check_files(self, skip: bool) -> list[int]:
        """Numbers of the shards that cannot be used."""
        bad = []
        for number, entry in enumerate(self.manifest.shards):
            try:
                if skip:
                    self._open_index(self.files.path(number), entry)
                else:
                    check_sizes(self.files.path(number), entry)
            except CorruptShardError as error:
                if not skip:
                    raise
                _log.warning("left out: %s", error)
                bad.append(number)
        if len(bad) == len(self.manifest.shards):
            raise DatasetError(f"dataset {self.path} has no usable shard among {len(bad)}; copy or prepare it again")
        return bad

    def _open_index(self, path: Path, entry: dict[str, Any]) -> None:
        if self.manifest.layout == "chunks":
            open_index(path, entry, self.manifest)
        else:
            from potamos.data.members import open_member_index

            open_member_index(path, entry, self.manifest.tokenizer["end_of_document"])

    @property
    def fingerprint(self) -> str:
        """Stands for every token that can be read: of dataset.json, and of the shards left out."""
        if not self.dropped:
            return self.manifest.fingerprint
        return hashlib.sha256(json.dumps([self.manifest.fingerprint, self.dropped]).encode()).hexdigest()

    @property
    def chunks(self) -> int:
        """Chunks of all shards, those of dropped shards included."""
        return self._first_chunk[-1]

    @property
    def targets(self) -> int:
        """Tokens that follow another: what rows of one token would read."""
        return int((self._tokens_of - self._chunks_of)[~self._lost].sum())

    def chunk_size(self, chunk: int) -> int:
        """Tokens stored in a chunk, the one that it shares with the next included."""
        number = bisect.bisect_right(self._first_chunk, chunk) - 1
        if chunk + 1 < self._first_chunk[number + 1]:
            return self.manifest.chunk_tokens + 1
        return self._last_chunk_sizes()[number].item()

    def _last_chunk_sizes(self) -> np.ndarray:
        return self._tokens_of - (self._chunks_of - 1) * (self.manifest.chunk_tokens + 1)

    def cut(self, length: int, *, rest: bool = False) -> Cut:
        """Number the rows of ``length`` inputs and targets, which never cross a chunk.

        Args:
            length: at least 1.
            rest: also count the shorter row at each chunk's end that holds what whole rows leave.
        """
        extra = length - 1 if rest else 0
        per_chunk = (self.manifest.chunk_tokens + extra) // length
        rows = (self._chunks_of - 1) * per_chunk + (self._last_chunk_sizes() - 1 + extra) // length
        rows[self._lost] = 0
        first = np.cumsum(rows) - rows
        if self.manifest.layout == "members":
            per_chunk = max(1, int(rows.max()))  # each shard is one chunk
        return Cut(int(rows.sum()), rows, length, max(1, per_chunk), first, np.array(self._first_chunk[:-1]))

    def locate(self, chunk: int) -> tuple[_Shard | _Members, int]:
        """The mapped shard of a chunk, and the chunk's number in it."""
        number = bisect.bisect_right(self._first_chunk, chunk) - 1
        return self._open.get(number) or self._map(number), chunk - self._first_chunk[number]

    def keep(self, shards: Sequence[int]) -> None:
        """Let go of all shards but these, until others are read; see `ShardFiles.keep`.

        What was found sound is forgotten too: a shard that comes again an epoch later comes from the disk again, or was
        fetched again, and its bytes are checked as they were then. In memory, too, only these shards then count.
        """
        with _opening:
            for number in self._open.keys() - set(shards):
                del self._open[number]
            self._known = {number: known for number, known in self._known.items() if number in self._open}
        self.files.keep(shards)

    def _map(self, number: int) -> _Shard | _Members:
        assert not self._lost[number], "rows of dropped shards are never numbered"
        path = self.files.path(number)
        with _opening:
            shard = self._open.get(number)
            if shard is None:  # or another thread was faster
                shard = self._open[number] = self._map_file(number, path)
                _close_oldest()
        return shard

    def _map_file(self, number: int, path: Path) -> _Shard | _Members:
        entry = self.manifest.shards[number]
        if self.manifest.layout == "members":
            from potamos.data.members import MemberShard

            return _Members(MemberShard(path, entry, self.manifest, self._first_document[number]))
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_size != entry["bytes"]:
                    check_sizes(path, entry)
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CorruptShardError(f"shard {path} cannot be read: {error.strerror}; copy the dataset again") from None
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._known.get(number)
        if known is None or known.identity != identity:  # first touch, or the file was replaced since
            known = self._known[number] = _Known(identity, open_index(path, entry, self.manifest))
        return _Shard(path, content, known, self._first_document[number])


def _close_oldest() -> None:
    """Keep the process within MAX_OPEN_SHARDS; a mapping goes when the last row being cut from it is done."""
    while sum(len(dataset._open) for dataset in _opened) > MAX_OPEN_SHARDS:
        fullest = max(_opened, key=lambda dataset: len(dataset._open))
        del fullest._open[next(iter(fullest._open))]


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
        CorruptShardError: a shard touched for the first time is not the one listed, or a block does not match its
            crc32.
    """
    n = len(chunk)
    tokens, document_ids, positions = (np.empty((n, width), np.int32) for _ in range(3))
    ramp = _ramp(width)
    for i, (which, c, s) in enumerate(zip(source.tolist(), chunk.tolist(), start.tolist(), strict=True)):
        shard, local = datasets[which].locate(c)
        document, position, ends, stop = shard.read_row(local, s, s + width, tokens[i])
        if not true_positions:
            position = 0
        if stop == s + width:
            _number(document_ids[i], positions[i], ends, s, document, position, ramp)
            continue
        kept = stop - s
        tokens[i, kept:] = datasets[which].manifest.tokenizer["end_of_document"]
        document_ids[i, kept:] = -1
        positions[i, kept:] = 0
        _number(document_ids[i, :kept], positions[i, :kept], ends, s, document, position, ramp[:kept])
    return tokens, document_ids, positions


def _number(
    ids: np.ndarray, positions: np.ndarray, ends: list[int], start: int, document: int, position: int, ramp: np.ndarray
) -> None:
    """Write one row's document ids and positions.

    Args:
        ids, positions: (width,) int32, written.
        ends: where documents end inside the row, ascending, counted from ``start`` before it.
        document, position: of the row's first token.
        ramp: 0 to width - 1, int32.
    """
    if len(ends) > MANY_DOCUMENTS:
        begins = np.array([0, *ends])
        begins[1:] -= start
        lengths = np.diff(begins, append=len(ids))
        ids[:] = np.repeat(np.arange(document, document + len(lengths), dtype=np.int32), lengths)
        begins[0] = -position
        np.subtract(ramp, np.repeat(begins.astype(np.int32), lengths), out=positions)
        return
    begin = 0
    for end in ends:
        end -= start
        ids[begin:end] = document
        positions[begin:end] = ramp[: end - begin]
        begin, document = end, document + 1
    ids[begin:] = document
    positions[begin:] = ramp[: len(ids) - begin]
    if position:
        positions[: ends[0] - start if ends else len(ids)] += position


@functools.lru_cache(4)
def _ramp(width: int) -> np.ndarray:
    return np.arange(width, dtype=np.int32)
