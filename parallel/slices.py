"""Which slices of a row a rank holds."""

from __future__ import annotations

from typing import Literal


def held_slices(order: Literal["contiguous", "zigzag"], rank: int, ranks: int) -> list[int]:
    """The slices that a rank holds, by their place in the sequence, in that order.

    Contiguous: ``ranks`` slices, one each. Zigzag: ``2 ranks`` slices, rank r the r-th from both ends, so that causal
    attention costs every rank the same. Raises ValueError for another order.
    """
    if order == "contiguous":
        return [rank]
    if order == "zigzag":
        return [rank, 2 * ranks - 1 - rank]
    raise ValueError(f"unknown order of slices {order!r}; choose 'contiguous' or 'zigzag'")
