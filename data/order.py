"""Which sample comes when: pure functions of a seed and an index, with no state and no tables over the data.

A permutation of n items costs nothing to set up and O(1) to read at any place, so a run may start at any sample. A
mixture of sources is laid out in blocks of `BLOCK` samples, each holding every source's share to within one sample.

Error of a mixture, samples of a source drawn so far less its share of all samples so far: under one at every block's
end. Inside a block the samples are arranged at random, without replacement, so that its course there is that of a
Brownian bridge: a standard deviation of at most sqrt(BLOCK p (1 - p)) / 2 in the block's middle, 64 samples at
p = 1/2, and beyond 2.5 sqrt(BLOCK p (1 - p)) anywhere inside (320 samples) in one block of 10^5 (Smirnov 1939). No
arrangement can exceed BLOCK p (1 - p) + 2.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from potamos.data.errors import MixtureError

BLOCK = 65_536
ROUNDS = 4


@functools.lru_cache(maxsize=1024, typed=True)  # small batches ask for the same few keys again and again
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
    return _walk(value.ravel(), np.array([_domain(n, key)], np.uint64).T).reshape(value.shape)


def _domain(n: int, key: int) -> tuple[int, int, int, int]:
    """What one permutation is made of: n, a, b, key."""
    a = math.isqrt(n - 1) + 1
    return n, a, -(-n // a), key


def _walk(value: np.ndarray, domains: np.ndarray) -> np.ndarray:
    """Images of ``value`` (m,) under one permutation, or each under its own: ``domains`` (4, 1) or (4, m) uint64."""
    result = _feistel(value.astype(np.uint64), *domains[1:])
    while (outside := np.flatnonzero(result >= domains[0])).size:
        theirs = domains[1:, outside] if domains.shape[1] > 1 else domains[1:]
        result[outside] = _feistel(result[outside], *theirs)
    return result.astype(np.int64)


def _feistel(value: np.ndarray, wide: np.ndarray, narrow: np.ndarray, key: np.ndarray) -> np.ndarray:
    left, right = value // narrow, value % narrow
    for pair in range(ROUNDS // 2):
        left = (left + _scramble(right, key, 2 * pair) % wide) % wide
        right = (right + _scramble(left, key, 2 * pair + 1) % narrow) % narrow
    return left * narrow + right


def _scramble(value: np.ndarray, key: np.ndarray, round_number: int) -> np.ndarray:
    """A keyed 64-bit hash: the finaliser of splitmix64 (Steele et al. 2014) of value + round key."""
    mixed = value + (key + np.uint64((round_number + 1) * 0x9E3779B97F4A7C15 % 2**64))  # arrays wrap modulo 2**64
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
        if len(self.shares) == 1:
            return [samples]
        whole, rest = divmod(samples, BLOCK)
        counts = quota(whole * BLOCK, self.shares)
        if rest:
            begun = np.bincount(_block(self, whole)[0][:rest], minlength=len(counts)).tolist()
            counts = [count + more for count, more in zip(counts, begun, strict=True)]
        return counts


@functools.lru_cache(maxsize=8)
def _block(mixture: Mixture, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and draw of the `BLOCK` samples of one block: its quotas laid end to end, then permuted."""
    before, after = quota(number * BLOCK, mixture.shares), quota((number + 1) * BLOCK, mixture.shares)
    counts = np.subtract(after, before)
    place = permute(np.arange(BLOCK), BLOCK, derive_key("block", mixture.key, number))
    laid_out = np.repeat(np.arange(len(counts), dtype=np.int16), counts)  # 16 bits sort by radix; 2**15 sources fit
    sources = laid_out[place]
    order = np.argsort(sources, kind="stable")  # within a source, draws follow the order of the samples
    draws = np.empty(BLOCK, np.int64)
    draws[order] = np.arange(BLOCK) + np.repeat(before - (np.cumsum(counts) - counts), counts)
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


class Window(NamedTuple):
    """Draws ``begin`` to ``end`` - 1 of a source read these shards and no other."""

    shards: np.ndarray
    begin: int
    end: int


def windowed(draw: np.ndarray, per_shard: np.ndarray, window: int, key: int) -> np.ndarray:
    """Row read at each draw when rows are shuffled within windows of a few shards at a time, for shards that are not
    all at hand.

    Each epoch permutes the shards, cuts them into as few windows as hold ``window`` at most, equal to within one shard,
    and permutes the rows of each. Every row comes once in an epoch, and draws in succession that are no more than the
    smallest window touch two windows at most. All is a function of the draw alone; a draw anywhere costs one search.

    Args:
        draw: numbers of draws from the source, from 0 on, any shape.
        per_shard: (shards,) rows of each shard, in the order in which rows are numbered; some may hold none.
        window: most shards a window.
        key: 64-bit key, see `derive_key`.

    Returns:
        int64 array of the shape of ``draw``.
    """
    per_shard = _rows_of_shards(per_shard, window)
    first_row = np.cumsum(per_shard) - per_shard
    draw = np.asarray(draw, np.int64)
    row = np.empty(draw.size, np.int64)
    epochs, place = np.divmod(draw.ravel(), per_shard.sum())
    for epoch in np.unique(epochs).tolist():
        course = _course(per_shard.tobytes(), window, key, epoch)
        in_epoch = np.flatnonzero(epochs == epoch)
        inside = place[in_epoch]
        numbers, which = np.unique(course.window_of(inside), return_inverse=True)
        begin, size = course.edges[numbers], course.edges[numbers + 1] - course.edges[numbers]
        domains = [
            _domain(n, derive_key("window", key, epoch, number))
            for n, number in zip(size.tolist(), numbers.tolist(), strict=True)
        ]
        mixed = begin[which] + _walk(inside - begin[which], np.array(domains, np.uint64).T[:, which])
        turn = np.searchsorted(course.starts, mixed, side="right") - 1
        row[in_epoch] = first_row[course.shards[turn]] + mixed - course.starts[turn]
    return row.reshape(draw.shape)


def window_shards(draw: int, per_shard: np.ndarray, window: int, key: int) -> Window:
    """The window of `windowed` that a draw lies in, less shards without rows; the next begins at its ``end``."""
    per_shard = _rows_of_shards(per_shard, window)
    epoch, place = divmod(draw, int(per_shard.sum()))
    course = _course(per_shard.tobytes(), window, key, epoch)
    number = int(course.window_of(np.int64(place)))
    begin, end = course.edges[number : number + 2].tolist()
    shards = course.shards[course.cuts[number] : course.cuts[number + 1]]
    return Window(shards[per_shard[shards] > 0], draw - place + begin, draw - place + end)


class _Course(NamedTuple):
    """How one epoch goes through the shards."""

    shards: np.ndarray  # in the order in which they come
    starts: np.ndarray  # place in the epoch where each begins, and the epoch's end
    cuts: np.ndarray  # shards before each window, and all
    edges: np.ndarray  # place where each window begins, and the epoch's end

    def window_of(self, place: np.ndarray | np.int64) -> np.ndarray:
        # a window without rows begins where the next does: the last of equals is the one that holds the place
        return np.searchsorted(self.edges, place, side="right") - 1


def _rows_of_shards(per_shard: np.ndarray, window: int) -> np.ndarray:
    per_shard = np.ascontiguousarray(per_shard, np.int64)
    if window < 1 or per_shard.sum() < 1:
        raise ValueError(f"windows of {window} shards over {per_shard.sum()} rows: both must be at least 1")
    return per_shard


@functools.lru_cache(maxsize=256)
def _course(per_shard: bytes, window: int, key: int, epoch: int) -> _Course:
    rows = np.frombuffer(per_shard, np.int64)
    shards = permute(np.arange(len(rows)), len(rows), derive_key("shards", key, epoch))
    starts = np.concatenate([[0], np.cumsum(rows[shards])])
    windows = -(-len(rows) // window)
    cuts = np.arange(windows + 1) * len(rows) // windows
    return _Course(shards, starts, cuts, starts[cuts])


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
