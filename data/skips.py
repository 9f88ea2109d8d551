"""Sample ranges that a run leaves out: arithmetic on places in the unending order of samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from potamos.data.errors import MixtureError


class SkipList:
    """Ranges [a, b) of global samples that are left out, as asked for after a loss spike.

    Ranges may be given in any order and may overlap. Places keep their numbers: leaving out a range changes no row, it
    only takes samples out of the sequence. Everything costs one search, however far the place.

    Attributes:
        ranges: disjoint, ascending, no two of them touching.

    Raises:
        MixtureError: a bound that is negative or no whole number, or an empty range.
    """

    def __init__(self, ranges: Sequence[Sequence[int]] = ()):
        merged: list[tuple[int, int]] = []
        for begin, end in sorted(_check(number, given) for number, given in enumerate(ranges)):
            if merged and begin <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            else:
                merged.append((begin, end))
        self.ranges = tuple(merged)
        self._begins = np.array([begin for begin, _ in merged], np.int64)
        self._lengths = np.array([end - begin for begin, end in merged], np.int64)
        self._left_out = np.concatenate([[0], np.cumsum(self._lengths)])  # before each range, and in all
        self._kept = self._begins - self._left_out[:-1]  # samples kept before each range

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def after(self, sample: int, count: int) -> int:
        """The place after ``count`` kept samples from place ``sample`` on.

        It is right behind the last of them: where a range begins there, the range is still ahead.
        """
        if not self.ranges or count == 0:
            return sample + count
        return int(self._place(self._kept_before(sample) + count - 1)) + 1

    def samples(self, first: int, count: int) -> np.ndarray:
        """The next ``count`` kept samples from place ``first`` on, (count,) int64."""
        numbers = np.arange(count, dtype=np.int64)
        return numbers + first if not self.ranges else self._place(numbers + self._kept_before(first))

    def runs(self, begin: int, end: int) -> list[tuple[int, int]]:
        """What is kept of the places [begin, end), as ranges."""
        if not self.ranges:
            return [(begin, end)] if begin < end else []
        kept = []
        low, high = np.searchsorted(self._begins, [begin, end]).tolist()
        for skip_begin, skip_end in self.ranges[max(low - 1, 0) : high]:
            if begin < skip_begin:
                kept.append((begin, skip_begin))
            begin = max(begin, skip_end)
        return [*kept, (begin, end)] if begin < end else kept

    def before(self, sample: int) -> list[list[int]]:
        """The ranges as far as they lie before ``sample``: what a run that got there has left out."""
        return [[begin, min(end, sample)] for begin, end in self.ranges if begin < sample]

    def _kept_before(self, sample: int) -> int:
        """How many samples before a place are kept."""
        number = int(np.searchsorted(self._begins, sample))  # ranges that begin before it
        if number == 0:
            return sample
        inside = min(sample - int(self._begins[number - 1]), int(self._lengths[number - 1]))
        return sample - int(self._left_out[number - 1]) - inside

    def _place(self, number: np.ndarray | int) -> np.ndarray:
        """Place of the kept samples of these numbers."""
        return number + self._left_out[np.searchsorted(self._kept, number, side="right")]


def _check(number: int, given: Sequence[int]) -> tuple[int, int]:
    bounds = list(given)
    if len(bounds) != 2 or any(type(bound) is not int for bound in bounds):
        raise MixtureError(f"skip range {number} is {given!r}; write two whole numbers, first and one past the last")
    begin, end = bounds
    if not 0 <= begin < end < 2**62:
        raise MixtureError(f"skip range {number} is {given!r}; it needs 0 <= first < end, the end itself being read")
    return begin, end
