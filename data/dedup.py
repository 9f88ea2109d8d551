"""Exact duplicates over all inputs: hash every document, compare by hash, keep the first.

A document is known by the 128-bit BLAKE2b hash of its text's UTF-8 bytes (RFC 7693): among a billion documents two
different ones share it with a probability of about 1.5e-21. First means first in (input order, document order),
whoever hashed what and when.

Each input's hashes are sorted and written by whoever reads it. The comparison then takes one range of hash values after
the other from all inputs, so that memory is bounded by one range, not by the corpus, and what it finds takes one bit a
document: 46 MB for the 365 million of C4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from potamos.files import written_atomically

HASH_BYTES = 16
RANGE_DOCUMENTS = 4_000_000  # compared at a time; 24 bytes each, and as much again to sort them


class DocumentHashes:
    """Collects the hashes of one input's documents in their order."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def __len__(self) -> int:
        return len(self._digests) // HASH_BYTES

    def add(self, text: str) -> None:
        self._digests += hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()

    def table(self) -> np.ndarray:
        """Shape (3, documents), uint64: high and low half of each hash, the number of its document; sorted."""
        halves = np.frombuffer(self._digests, ">u8").reshape(-1, 2).astype("<u8")
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal hashes stay in the order of documents
        table = np.empty((3, len(order)), "<u8")
        np.take(halves[:, 0], order, out=table[0])
        np.take(halves[:, 1], order, out=table[1])
        table[2] = order
        return table


def find_duplicates(tables: Sequence[Path], counts: Sequence[int], at_a_time: int = RANGE_DOCUMENTS) -> np.ndarray:
    """Which documents repeat an earlier one.

    Args:
        tables: the files of `DocumentHashes.table`, in the order of the inputs.
        counts: documents in each.
        at_a_time: about how many documents to compare at once.

    Returns:
        One bit a document, shape (bytes,), uint8; each input begins with a byte of its own, see `bits_of`.
    """
    first = _first_bytes(counts)
    found = np.zeros(first[-1], np.uint8)
    ranges = max(1, -(-sum(counts) // at_a_time))
    edges = np.array([(number << 64) // ranges for number in range(1, ranges)], np.uint64)
    opened = [_Table(path, edges) for path in tables]
    for number in range(ranges):
        slices = [table.read(number) for table in opened]
        place = np.concatenate([part[2] + np.uint64(8 * first[i]) for i, part in enumerate(slices)])
        repeated = _repeated(
            np.concatenate([part[0] for part in slices]), np.concatenate([part[1] for part in slices]), place
        )
        # each document is in one range once, so adding its bit sets it
        np.add.at(found, repeated >> 3, np.left_shift(1, repeated & 7).astype(np.uint8))
    return found


def bits_of(found: np.ndarray, counts: Sequence[int], number: int) -> np.ndarray:
    """Whether each document of input ``number`` is to be left out, shape (documents,), bool."""
    first = _first_bytes(counts)[number]
    packed = np.asarray(found[first : first + -(-counts[number] // 8)])
    return np.unpackbits(packed, count=counts[number], bitorder="little").astype(bool)


def _repeated(high: np.ndarray, low: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Places (int64) of all but the first among equal hashes."""
    if not len(high):
        return np.empty(0, np.int64)
    order = np.argsort(high, kind="stable")  # of sorted runs, which this sort merges
    same = high[order][1:] == high[order][:-1]
    some = order[np.append(same, False) | np.insert(same, 0, False)]
    some = some[np.lexsort((place[some], low[some], high[some]))]
    again = (high[some][1:] == high[some][:-1]) & (low[some][1:] == low[some][:-1])
    return place[some[1:][again]].astype(np.int64)


class _Table:
    """A file of sorted hashes, of which one range after the other is read."""

    def __init__(self, path: Path, edges: np.ndarray):
        table = np.load(path, mmap_mode="r", allow_pickle=False)
        assert table.flags.c_contiguous, f"{path} was not written by DocumentHashes"
        self._path, self._start, self._documents = path, table.offset, table.shape[1]
        self._edges = [0, *np.searchsorted(table[0], edges).tolist(), self._documents]

    def read(self, number: int) -> np.ndarray:
        begin, end = self._edges[number : number + 2]
        part = np.empty((3, end - begin), "<u8")
        with open(self._path, "rb", buffering=0) as file:  # not kept open: inputs can be more than files may be
            for row in range(3):
                file.seek(self._start + 8 * (row * self._documents + begin))
                read = file.readinto(memoryview(part[row]).cast("B")) if end > begin else 0
                assert read == 8 * (end - begin), f"{self._path} is shorter than its header says"
        return part


def _first_bytes(counts: Sequence[int]) -> list[int]:
    return [0, *np.cumsum([-(-count // 8) for count in counts], dtype=np.int64).tolist()]


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file of which nothing partial ever has its name."""
    with written_atomically(path) as file:
        np.save(file, array, allow_pickle=False)
