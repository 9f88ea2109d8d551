"""What the loader hands out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from potamos.data.dataset import TokenDataset


@dataclass(frozen=True, eq=False)
class Rows:
    """n packed rows of L + 1 tokens: inputs ``tokens[:, :-1]``, targets ``tokens[:, 1:]``.

    Attributes:
        tokens: (n, L + 1) int32.
        document_ids: (n, L + 1) int32, the number of the document in its source's stream; the end-of-document token
            belongs to the document it closes; -1 is padding. A target counts where its id equals its input's. In
            contiguous order an offset is added that keeps datasets, and a slot's lap and the next, apart: ids of rows
            that follow each other in a slot are equal exactly where the text goes on (see `TokenStream`).
        positions: (n, L + 1) int32, restart at 0 with each document. For a document cut by the row's start they count
            from the row's start; in contiguous order they are the true place in the document.
            With boundaries ``cross`` document ids and positions are read-only, one array for all batches of a size.
        samples: (n,) int64, global sample indices.
        source: (n,) int32, the source's number in the stream's list of distinct datasets.
    """

    tokens: np.ndarray
    document_ids: np.ndarray
    positions: np.ndarray
    samples: np.ndarray
    source: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def single_document(self) -> np.ndarray:
        """(n,) bool: True where the row has neither a document boundary nor padding."""
        return self.document_ids[:, 0] == self.document_ids[:, -1]  # ids only rise along a row, or end in -1

    def slice(self, begin: int, end: int) -> Rows:
        """Rows ``begin`` to ``end``, without a copy."""
        cut = slice(begin, end)
        return Rows(
            self.tokens[cut], self.document_ids[cut], self.positions[cut], self.samples[cut], self.source[cut]
        )  # fmt: skip


@functools.lru_cache(maxsize=8)
def crossing(n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Document ids and positions of n rows that ignore document boundaries: equal for all, so made once, read-only."""
    document_ids = np.zeros((n, width), np.int32)
    positions = np.tile(np.arange(width, dtype=np.int32), (n, 1))
    document_ids.flags.writeable = positions.flags.writeable = False
    return document_ids, positions


def read_tokens(
    datasets: Sequence[TokenDataset], source: np.ndarray, chunk: np.ndarray, start: np.ndarray, width: int
) -> np.ndarray:
    """The tokens of `read_rows` alone, (n, width) int32, for rows that end before their chunks do.

    Numbering documents would take most of the time. Checksums are compared all the same, and what is wrong raises a
    CorruptShardError.
    """
    tokens = np.empty((len(chunk), width), np.int32)
    for row, which, c, s in zip(tokens, source.tolist(), chunk.tolist(), start.tolist(), strict=True):
        shard, local = datasets[which].locate(c)
        stop = shard.read_row(local, s, s + width, row)[-1]
        assert stop == s + width, "rows of a stream are whole"
    return tokens
