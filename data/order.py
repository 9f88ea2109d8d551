"""Which sample comes when: pure functions of a seed and an index, with no state and no tables over the data.

A permutation of n items costs nothing to set up and O(1) to read at any place, so a run may start at any sample. A
mixture of sources is laid out in blocks of `BLOCK` samples, each holding every source's share to within one sample.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from potamos.data.errors import MixtureError

BLOCK = 65_536
ROUNDS = 4


def derive_key(*parts: int | str) -> int:
    """A 64-bit key from a seed and the purpose it serves; different parts give unrelated keys."""
    text = "\0".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a keyed permutation of 0..n-1 sends each index.

    A Feistel network over pairs (left, right) of Z_a x Z_b with a * b >= n just above n, walked until it falls below n
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). With a, b near sqrt(n) fewer than one walk in
    sqrt(n) / 2 takes a second step.

    Args:
        index: integers in [0, n), any shape.
        n: size of the permuted range, 1 <= n < 2**62.
        key: 64-bit key, see `derive_key`.

    Returns:
        int64 array of the shape of ``index``.
    """
    if not 1 <= n < 2**62:
        raise ValueError(f"cannot permute {n} items; the size must be in [1, 2**62)")
    value = np.asarray(index, np.int64)
    if value.size and (value.min() < 0 or value.max() >= n):
        raise ValueError(f"index outside [0, {n})")
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    result = _feistel(value.astype(np.uint64), a, b, key)
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], a, b, key)
    return result.astype(np.int64)


def _feistel(value: np.ndarray, a: int, b: int, key: int) -> np.ndarray:
    wide, narrow = np.uint64(a), np.uint64(b)
    left, right = value // narrow, value % narrow
    for pair in range(ROUNDS // 2):
        left = (left + _scramble(right, key, 2 * pair) % wide) % wide
        right = (right + _scramble(left, key, 2 * pair + 1) % narrow) % narrow
    return left * narrow + right


def _scramble(value: np.ndarray, key: int, round_number: int) -> np.ndarray:
    """A keyed 64-bit hash: the finaliser of splitmix64 (Steele et al. 2014) of value + round key."""
    add = np.uint64((key + (round_number + 1) * 0x9E3779B97F4A7C15) % 2**64)
    mixed = value + add  # arrays wrap modulo 2**64
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def check_weights(weights: Sequence[float], names: Sequence[str]) -> tuple[Fraction, ...]:
    """The weights as exact shares that sum to one.

    Raises:
        MixtureError: none, not finite, not positive, or under 2 / `BLOCK` of the total (largest-remainder rounding
            could then take a sample back from one block to the next).
    """
    if not weights:
        raise MixtureError("a mixture needs at least one source")
    for weight, name in zip(weights, names, strict=True):
        if not math.isfinite(weight) or weight <= 0:
            raise MixtureError(
                f"weight {weight} of source {name} is not a positive number; leave the source out instead"
            )
    exact = [Fraction(weight) for weight in weights]
    shares = tuple(weight / sum(exact) for weight in exact)
    for share, weight, name in zip(shares, weights, names, strict=True):
        if share < Fraction(2, BLOCK):
            raise MixtureError(
                f"weight {weight} of source {name} is {float(share):.2g} of the total; the least that can be mixed "
                f"evenly is {2 / BLOCK:.2g}; raise it or leave the source out"
            )
    return shares


def quota(total: int, shares: Sequence[Fraction]) -> list[int]:
    """Split ``total`` samples by largest remainder: the sum is exact, each part within one of its target."""
    targets = [total * share for share in shares]
    parts = [math.floor(target) for target in targets]
    by_remainder = sorted(range(len(parts)), key=lambda s: (parts[s] - targets[s], s))
    for source in by_remainder[: total - sum(parts)]:
        parts[source] += 1
    return parts


@dataclass(frozen=True)
class Mixture:
    """The order in which a stage draws from its sources: sample i of the stage is draw number k of source s."""

    shares: tuple[Fraction, ...]
    key: int

    def locate(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, draw) of each sample of the stage, both int64; draws of a source count 0, 1, 2, ... in order."""
        sample = np.asarray(sample, np.int64)
        if len(self.shares) == 1:
            return np.zeros_like(sample), sample
        source, draw = np.empty_like(sample), np.empty_like(sample)
        block = sample // BLOCK
        for number in np.unique(block):
            here = block == number
            sources, draws = _block(self, int(number))
            slot = sample[here] % BLOCK
            source[here], draw[here] = sources[slot], draws[slot]
        return source, draw

    def drawn(self, samples: int) -> list[int]:
        """How often each source is drawn among the first ``samples`` of the stage."""
        whole, rest = divmod(samples, BLOCK)
        counts = quota(whole * BLOCK, self.shares)
        if rest:
            sources, _ = _block(self, whole) if len(self.shares) > 1 else (np.zeros(BLOCK, np.int64), None)
            counts = [
                c + int(n) for c, n in zip(counts, np.bincount(sources[:rest], minlength=len(counts)), strict=True)
            ]
        return counts


@functools.lru_cache(maxsize=8)
def _block(mixture: Mixture, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and draw of the `BLOCK` samples of one block: its quotas laid end to end, then permuted."""
    before, after = quota(number * BLOCK, mixture.shares), quota((number + 1) * BLOCK, mixture.shares)
    edges = np.cumsum([b - a for a, b in zip(before, after, strict=True)])
    place = permute(np.arange(BLOCK), BLOCK, derive_key("block", mixture.key, number))
    sources = np.searchsorted(edges, place, side="right")
    order = np.argsort(sources, kind="stable")  # within a source, draws follow the order of the samples
    starts = edges - np.diff(edges, prepend=0)
    draws = np.empty(BLOCK, np.int64)
    draws[order] = np.arange(BLOCK) - np.repeat(starts - before, np.diff(edges, prepend=0))
    return sources, draws


def shuffled(draw: np.ndarray, n: int, key: int) -> np.ndarray:
    """Row read at each draw from a source of n rows: every epoch is a fresh permutation of all rows, shape kept."""
    draw = np.asarray(draw, np.int64)
    row = np.empty_like(draw)
    epochs = draw // n
    for epoch in np.unique(epochs):
        here = epochs == epoch
        row[here] = permute(draw[here] % n, n, derive_key("epoch", key, int(epoch)))
    return row


def contiguous(draw: np.ndarray, n: int, slots: int) -> np.ndarray:
    """Row read at each draw when slot = draw mod slots walks its own share of n // slots rows, over and over.

    For models that carry state from a row of one batch to the same row of the next. The last n mod slots rows are never
    read.
    """
    share = n // slots
    if share < 1:
        raise MixtureError(f"{slots} slots need at least as many rows; the source has {n}")
    draw = np.asarray(draw, np.int64)
    return draw % slots * share + draw // slots % share


def laps(draw: np.ndarray, n: int, slots: int) -> np.ndarray:
    """How often, at each draw of `contiguous`, its slot has walked its whole share before."""
    return np.asarray(draw, np.int64) // slots // (n // slots)
