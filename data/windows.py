"""A held-out dataset as non-overlapping windows."""

from __future__ import annotations

import os

import numpy as np

from potamos.data.dataset import TokenDataset, read_rows
from potamos.data.errors import DatasetError, MixtureError
from potamos.data.fetch import shown
from potamos.data.remote import is_url
from potamos.data.rows import Rows, crossing


class Windows:
    """A whole dataset as non-overlapping windows in order, every token but the first a target exactly once.

    Rows have the shape of `TokenStream`'s. A chunk's last window is filled up with padding (document id -1).
    Positions of a document cut by a window's start count from the window's start.

    Args:
        path: a prepared dataset, a local folder.
        sequence_length: L; each row holds L + 1 tokens.
        boundaries: ``isolate``, or ``cross`` for document id 0 wherever there is no padding.
        tokenizer_sha256, vocabulary: see `TokenDataset`.

    Raises:
        DatasetError, MixtureError: a URL, settings that are unknown, or what `TokenDataset` raises.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sequence_length: int,
        boundaries: str = "isolate",
        tokenizer_sha256: str | None = None,
        vocabulary: int | None = None,
    ):
        if sequence_length < 1:
            raise MixtureError(f"sequence_length {sequence_length} must be at least 1")
        if boundaries not in ("isolate", "cross"):
            raise MixtureError(f"boundaries {boundaries!r} is unknown; known: isolate, cross")
        if is_url(path):
            raise DatasetError(
                f"dataset {shown(os.fspath(path))} is behind a URL; held-out data are read whole again and again: copy "
                f"them to a local folder"
            )
        self.dataset = TokenDataset(path, tokenizer_sha256=tokenizer_sha256, vocabulary=vocabulary)
        self.sequence_length, self.boundaries = sequence_length, boundaries
        self._cut = self.dataset.cut(sequence_length, rest=True)

    def __len__(self) -> int:
        return self._cut.total

    def read(self, start: int, count: int) -> Rows:
        """Windows ``start`` to ``start + count - 1``; fewer at the end of the dataset."""
        numbers = np.arange(start, min(start + count, self._cut.total))
        chunk, place = self._cut.place(numbers)
        source = np.zeros(len(numbers), np.int32)
        width = self.sequence_length + 1
        tokens, document_ids, positions = read_rows([self.dataset], source, chunk, place, width)
        if self.boundaries == "cross":
            padding = document_ids < 0
            ids, places = crossing(len(numbers), width)
            document_ids, positions = np.where(padding, -1, ids), np.where(padding, 0, places)
        return Rows(tokens, document_ids, positions, numbers, source)
