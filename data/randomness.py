"""Random numbers of rows as a pure function of (seed, purpose, epoch, global sample index, position).

No state is carried from row to row, so a row draws the same numbers in every batch, on every rank, in every world size
and after every resume. The generator is SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
generators"), whose i-th output is a hash of its seed and i and can be computed alone: every row has a generator of its
own, seeded by a hash of what the row is. A word of 64 bits takes nine NumPy operations, of Philox4x32-10 about fifty.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from potamos.data.errors import DataError
from potamos.data.order import derive_key

GAMMA = 0x9E3779B97F4A7C15
CACHED_WORDS = 32_768  # hashed at a time: words and scratch together stay in a core's second-level cache


def mix64(words: np.ndarray) -> np.ndarray:
    """Hash uint64 words in place (the finalizer of SplitMix64, a bijection of 64 bits) and return them."""
    assert words.dtype == np.uint64
    scratch = np.empty_like(words)
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(words, np.uint64(shift), out=scratch)
        np.bitwise_xor(words, scratch, out=words)
        np.multiply(words, np.uint64(multiplier), out=words)
    np.right_shift(words, np.uint64(31), out=scratch)
    return np.bitwise_xor(words, scratch, out=words)


@dataclass(frozen=True, eq=False)
class RowRandom:
    """The random numbers of n rows. Streams of different names, and other seeds, purposes and epochs, are unrelated.

    Attributes:
        seed: the run's, any integer.
        purpose: what is drawn, such as "mlm"; one name for each place of a run that draws.
        samples: (n,) integers, 0 <= sample < 2**63: the rows' global sample indices (`Rows.samples`).
        epoch: tells apart visits of rows whose indices come again, as a validation set's do. A training stream's
            sample indices never do, so there it stays 0.

    Raises:
        DataError: samples are no vector of such integers.
    """

    seed: int
    purpose: str
    samples: np.ndarray
    epoch: int = 0

    def __post_init__(self) -> None:
        samples = np.asarray(self.samples)
        if samples.ndim != 1 or samples.dtype.kind not in "iu" or (samples.size and samples.min() < 0):
            raise DataError(
                f"random numbers of {self.purpose!r}: samples must be a vector of global sample indices >= 0, got "
                f"{samples.dtype} of shape {samples.shape}; pass Rows.samples"
            )
        object.__setattr__(self, "samples", samples)

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, rows: np.ndarray | slice) -> RowRandom:
        """The same numbers for some of the rows."""
        return RowRandom(self.seed, self.purpose, self.samples[rows], self.epoch)

    def words(self, stream: str, width: int, first: int = 0) -> np.ndarray:
        """(n, width) uint64, uniform: the words of positions ``first`` to ``first + width - 1`` of every row."""
        steps = np.arange(first + 1, first + width + 1, dtype=np.uint64) * np.uint64(GAMMA)
        result = self._keys(stream)[:, None] + steps
        flat = result.reshape(-1)
        for begin in range(0, flat.size, CACHED_WORDS):
            mix64(flat[begin : begin + CACHED_WORDS])
        return result

    def halves(self, stream: str, width: int, first: int = 0) -> np.ndarray:
        """(n, width) uint32, uniform, at half the price: position p is half p % 2 (0 the low one) of word p // 2.

        A stream is read in words or in halves, not both: they are the same bits.
        """
        words = self.words(stream, (first + width + 1) // 2 - first // 2, first // 2)
        halves = words.astype("<u8", copy=False).view("<u4")
        return halves[:, first % 2 : first % 2 + width]

    def at(self, stream: str, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """uint64 of the shape of ``rows``: the word of one position of one row each, equal to ``words(...)[row, p]``.

        rows: integers in [0, n), numbers of rows here, not sample indices.
        """
        return mix64(self._keys(stream)[rows] + _steps(positions))

    def _keys(self, stream: str) -> np.ndarray:
        """(n,) uint64: the seed of each row's generator, itself an output of a generator seeded by all but the row."""
        key = derive_key("row", self.seed, self.purpose, self.epoch, stream)
        return mix64(_steps(self.samples) + np.uint64(key))


def _steps(index: np.ndarray) -> np.ndarray:
    """What SplitMix64 has added to its seed when it gives output number ``index``, counted from 0 (see `words`)."""
    return (index.astype(np.uint64) + np.uint64(1)) * np.uint64(GAMMA)


def threshold(probability: float) -> np.uint32 | None:
    """The largest half that counts as an event of this probability, rounded to a multiple of 2**-32; None for never."""
    count = round(probability * 2**32)
    return np.uint32(count - 1) if count else None


def happens(halves: np.ndarray, probability: float) -> np.ndarray:
    """bool of the shape of ``halves``: True with this probability."""
    largest = threshold(probability)
    return np.zeros(halves.shape, bool) if largest is None else halves <= largest


def below(halves: np.ndarray, n: int | np.ndarray) -> np.ndarray:
    """int64 in [0, n) from uniform 32-bit numbers, n <= 2**32 one number or an array.

    No value is likelier than another by more than n / 2**32 (Lemire 2019, "Fast random integer generation in an
    interval", without its rejection step).
    """
    return ((halves.astype(np.uint64) * np.asarray(n, np.uint64)) >> np.uint64(32)).astype(np.int64)


def smallest(words: np.ndarray, counts: np.ndarray | int, rank: np.ndarray | None = None) -> np.ndarray:
    """Choose ``counts`` columns of each row at random: a uniformly random subset within each rank.

    Args:
        words: (n, width) uint64, uniform. Equal words make a unit: its columns are chosen one after the other.
        counts: how many of each row, 0 <= count <= width, one number or (n,).
        rank: (n, width) integers 0 to 3; columns of rank 1 are chosen only when those of rank 0 are used up.

    Returns:
        (n, width) bool with ``counts`` True in each row.
    """
    return leading(sort_keys(words, rank), counts)


def sort_keys(words: np.ndarray, rank: np.ndarray | None = None) -> np.ndarray:
    """(n, width) uint64, different in each row, ordered by rank, then word, then column.

    The column takes the place of a word's lowest bits, and the rank moves it down by two, so of a word of width w all
    but 2 + log2(w) bits are compared.
    """
    width = words.shape[1]
    low = (1 << max(width - 1, 0).bit_length()) - 1
    keys = words >> np.uint64(2)
    keys &= np.uint64(~low & (2**64 - 1))
    keys |= np.arange(width, dtype=np.uint64)
    if rank is not None:
        keys |= rank.astype(np.uint64) << np.uint64(62)
    return keys


def leading(keys: np.ndarray, counts: np.ndarray | int) -> np.ndarray:
    """(n, width) bool: the ``counts`` (one number or (n,)) smallest keys of each row."""
    n, width = keys.shape
    counts = np.asarray(counts, np.int64)
    least, most = (int(counts.min()), int(counts.max())) if n else (0, 0)
    assert 0 <= least <= most <= width
    if least < most:
        last = np.take_along_axis(np.sort(keys, axis=1), np.maximum(counts - 1, 0)[:, None], axis=1)
        return (keys <= last) & (counts > 0)[:, None]
    if least in (0, width):
        return np.full(keys.shape, least > 0)
    return keys <= np.partition(keys, least - 1, axis=1)[:, least - 1 : least]


def distinct(random: RowRandom, stream: str, items: np.ndarray, count: int) -> np.ndarray:
    """(n, count) int64, ascending: ``count`` of 0..items-1 for each row, every subset equally likely.

    Draws with replacement until so many different ones have come: cheap while the count is well under the items.

    Args:
        items: (n,) integers, count <= items <= 2**32.
    """
    n, drawn = len(items), count + count // 4 + 8
    assert n == 0 or count <= items.min()
    while True:
        value = below(random.halves(stream, drawn), items[:, None].astype(np.uint64))
        turn = drawn.bit_length()
        order = np.sort(value << turn | np.arange(drawn), axis=1)
        fresh = np.ones(order.shape, bool)
        np.not_equal(order[:, 1:] >> turn, order[:, :-1] >> turn, out=fresh[:, 1:])
        if (np.count_nonzero(fresh, axis=1) >= count).all():
            break
        drawn *= 2  # what was drawn stays as it is, so the result does not depend on the other rows
    if not (n and count):
        return np.zeros((n, count), np.int64)
    first = np.where(fresh, order & ((1 << turn) - 1), drawn)
    chosen = first <= np.partition(first, count - 1, axis=1)[:, count - 1 : count]
    return (order[chosen] >> turn).reshape(n, count)
