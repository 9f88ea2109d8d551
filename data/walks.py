"""How a stream goes through the rows of one dataset: shuffled, in windows of shards, or on and on in slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from potamos.data.dataset import Cut, TokenDataset
from potamos.data.errors import DatasetError
from potamos.data.order import Window, contiguous, laps, shuffled, window_shards, windowed

SETS = 2  # of document ids that a dataset has in contiguous order; the stretches of a slot take them in turn


class Walk(Protocol):
    """From the number of a draw to a row."""

    @property
    def epoch(self) -> int:
        """Draws after which every row that is ever read has been read once."""
        ...

    def rows(self, draw: np.ndarray) -> np.ndarray:
        """Row read at each draw."""
        ...

    def shift(self, draw: np.ndarray) -> np.ndarray | int:
        """What is added to the document numbers of the row read at each draw."""
        ...


class Shuffled:
    """Every epoch a fresh permutation of all rows."""

    def __init__(self, cut: Cut, key: int):
        self.epoch, self._key = cut.total, key

    def rows(self, draw: np.ndarray) -> np.ndarray:
        return shuffled(draw, self.epoch, self._key)

    def shift(self, draw: np.ndarray) -> int:
        del draw
        return 0


class Windowed:
    """Rows shuffled within windows of shards; see `order.windowed`."""

    def __init__(self, cut: Cut, window: int, key: int):
        self.epoch = cut.total
        self._per_shard, self._window, self._key = cut.per_shard, window, key

    def rows(self, draw: np.ndarray) -> np.ndarray:
        return windowed(draw, self._per_shard, self._window, self._key)

    def shift(self, draw: np.ndarray) -> int:
        del draw
        return 0

    def window(self, draw: int) -> Window:
        """The window that a draw lies in."""
        return window_shards(draw, self._per_shard, self._window, self._key)


class Contiguous:
    """Slot = draw mod slots walks its own share of the rows, over and over.

    Ids of documents come in `SETS` sets. A slot takes the next set wherever the row it reads does not follow the row it
    read before: where its share begins again, and behind skipped draws. Ids of its rows are then equal exactly where
    the text goes on.

    Args:
        cut: of the dataset.
        slots: how many walks.
        first_id: where the dataset's ids begin.
        documents: how many ids a set has.
        skipped: disjoint ascending ranges of draws that are left out, bounds being multiples of ``slots``.
    """

    def __init__(self, cut: Cut, slots: int, first_id: int, documents: int, skipped: Sequence[tuple[int, int]]):
        self.epoch = cut.total - cut.total % slots
        self._rows, self._slots, self._first_id, self._documents = cut.total, slots, first_id, documents
        share = cut.total // slots
        # A skipped stretch of steps [a, b) is one break at b, and takes the place of all laps that begin in a to b; it
        # is none where whole laps are skipped, so that the text goes on.
        steps = [(begin // slots, end // slots) for begin, end in skipped]
        breaks = [
            int((end - begin) % share > 0 or end % share == 0) - (end // share - (begin - 1) // share)
            for begin, end in steps
        ]
        self._skip_ends = np.array([end for _, end in steps], np.int64)
        self._breaks = np.concatenate([[0], np.cumsum(np.array(breaks, np.int64))])

    def rows(self, draw: np.ndarray) -> np.ndarray:
        return contiguous(draw, self._rows, self._slots)

    def shift(self, draw: np.ndarray) -> np.ndarray:
        breaks = laps(draw, self._rows, self._slots)
        if len(self._skip_ends):
            breaks = breaks + self._breaks[np.searchsorted(self._skip_ends, draw // self._slots, side="right")]
        return self._first_id + breaks % SETS * self._documents


def first_ids(datasets: Sequence[TokenDataset]) -> list[int]:
    """Where each dataset's document ids begin in contiguous order.

    Datasets count in the order in which stages first name them, so that a stage added later changes no id before it.

    Raises:
        DatasetError: ids would not fit in int32.
    """
    ends = np.cumsum([SETS * dataset.manifest.documents for dataset in datasets]).tolist()
    if ends[-1] > 2**31:
        raise DatasetError(
            f"contiguous order gives every document {SETS} int32 ids, and the {len(ends)} datasets from "
            f"{datasets[0].path} on hold {ends[-1] // SETS} documents, more than {2**31 // SETS}; "
            f"use fewer or smaller datasets, or shuffled order"
        )
    return [0, *ends[:-1]]


def check_contiguous(dataset: TokenDataset, rows: int, slots: int, length: int) -> None:
    """Make sure that rows of a slot follow each other with no token between them.

    Raises:
        DatasetError: rows do not fill chunks, there are fewer rows than slots, or shards were left out.
    """
    manifest = dataset.manifest
    if dataset.dropped:
        raise DatasetError(
            f"dataset {dataset.path} is read without {', '.join(dataset.dropped)}, so its text no longer goes on from "
            f"shard to shard, as contiguous order needs; mend the shards, or use order shuffled"
        )
    # A chunk that goes on in the next lies in a part of several; in foreign tars each shard is one chunk of its own.
    goes_on = any(sum(shard["chunks"] for shard in part["shards"]) > 1 for part in manifest.parts)
    if manifest.layout == "chunks" and goes_on and manifest.chunk_tokens % length:
        raise DatasetError(
            f"dataset {dataset.path}: sequence_length {length} does not divide its chunk_tokens "
            f"{manifest.chunk_tokens}, so contiguous order would skip {manifest.chunk_tokens % length} tokens at each "
            f"chunk's end; choose a divisor"
        )
    if rows < slots:
        raise DatasetError(f"dataset {dataset.path} has {rows} rows of {length} tokens, fewer than slots {slots}")
