"""Rows made to find mistakes: what a loader could hand out at its worst, from (recipe, step) alone.

Documents have random lengths and cross every border at which a layout cuts a row. Rows, micro-batches, data ranks and
slices have unequal numbers of targets, so that a mean of means differs from the mean, and some have none at all: there
a division by an own count divides by zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from potamos.data.loader import Rows

STEPS = 3


@dataclass(frozen=True)
class RowSource:
    """Rows of ``STEPS`` steps, ``count`` each, of ``length`` tokens and one more.

    Step 0: the first half of the rows, and so the first data rank, has no target. Step 1: no row has one outside its
    second quarter, so that a rank of a split sequence has none. Step 2: row 0 has none. In ``contiguous`` order each
    row goes on in the next step; with ``isolate`` False documents are not told apart.
    """

    count: int
    length: int
    vocabulary: int
    isolate: bool = True
    contiguous: bool = False
    seed: int = 0

    def rows(self, step: int) -> Rows:
        """The rows of a step; the same for every layout and in every process."""
        documents, positions, tokens = self._documents(step)
        self._drop_targets(documents, step)
        return Rows(
            tokens=tokens,
            document_ids=documents,
            positions=positions,
            samples=np.arange(self.count, dtype=np.int64) + step * self.count,
            source=np.zeros(self.count, np.int32),
        )

    def _documents(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document ids, positions, tokens), (count, length + 1) each, before targets are taken away."""
        text = self.length * STEPS + 1 if self.contiguous else self.length + 1
        random = np.random.default_rng([self.seed, 0 if self.contiguous else step])
        tokens = random.integers(0, self.vocabulary, (self.count, text)).astype(np.int32)
        documents = np.zeros((self.count, text), np.int32)
        positions = np.tile(np.arange(text, dtype=np.int32), (self.count, 1))
        for row in range(self.count if self.isolate else 0):
            most = min(text - 1, 6 if not self.contiguous else 6 * STEPS)
            starts = np.sort(random.choice(np.arange(1, text), random.integers(1, most + 1), replace=False))
            documents[row, starts] = 1
            documents[row] = documents[row].cumsum() + row * text
            begun = np.zeros(text, np.int32)
            begun[starts] = starts
            positions[row] -= np.maximum.accumulate(begun)
        first = step * self.length if self.contiguous else 0
        part = slice(first, first + self.length + 1)
        return documents[:, part].copy(), positions[:, part].copy(), tokens[:, part].copy()

    def _drop_targets(self, documents: np.ndarray, step: int) -> None:
        """By padding to a row's end, and by documents of one token, which predict nothing."""
        random = np.random.default_rng([self.seed, step, 1])
        alone = self.count * documents.shape[1] * STEPS + np.arange(documents.shape[1], dtype=np.int32)
        for row in range(self.count):
            if row % 2:
                documents[row, self.length - random.integers(0, self.length // 2) :] = -1
            if row % 3 == 2 and self.isolate:
                begin = random.integers(1, self.length // 2)
                stretch = slice(begin, begin + self.length // 4)
                documents[row, stretch] = np.where(documents[row, stretch] < 0, -1, alone[stretch])
        if step == 0:
            documents[: self.count // 2] = -1
        elif step == 1:
            documents[:, self.length // 2 :] = -1
            if self.isolate:
                documents[:, : self.length // 4] = alone[: self.length // 4]
        else:
            documents[0] = -1
