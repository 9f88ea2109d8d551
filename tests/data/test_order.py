"""The order against slow plain-Python definitions."""

from __future__ import annotations

import hashlib
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data.errors import MixtureError
from potamos.data.mixtures import PILE
from potamos.data.order import (
    BLOCK,
    Mixture,
    check_weights,
    contiguous,
    derive_key,
    laps,
    permute,
    quota,
    shuffled,
    window_shards,
    windowed,
)

keys = st.integers(0, 2**64 - 1)


def slow_permute(value: int, n: int, key: int) -> int:
    """The same Feistel network in Python's integers."""

    def scramble(x: int, round_number: int) -> int:
        x = (x + key + (round_number + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    a = math.ceil(math.sqrt(n))
    b = math.ceil(n / a)
    while True:
        left, right = divmod(value, b)
        for round_number in (0, 2):
            left = (left + scramble(right, round_number) % a) % a
            right = (right + scramble(left, round_number + 1) % b) % b
        value = left * b + right
        if value < n:
            return value


@given(st.integers(1, 3000), keys)
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection_equal_to_the_slow_one(n: int, key: int) -> None:
    image = permute(np.arange(n), n, key)
    assert np.array_equal(np.sort(image), np.arange(n))
    for i in {0, n // 2, n - 1}:
        assert image[i] == slow_permute(i, n, key)


@given(st.integers(10**9, 2**61), keys)
@settings(max_examples=30, deadline=None)
def test_permutation_of_huge_ranges(n: int, key: int) -> None:
    window = np.arange(n // 3, n // 3 + 500)
    image = permute(window, n, key)
    assert len(np.unique(image)) == 500
    assert image.min() >= 0
    assert image.max() < n
    assert np.array_equal(permute(window[::-7], n, key), image[::-7])  # no element depends on its neighbors


SQUARES = [s * s + d for s in (2, 3, 10, 31, 256, 1000) for d in (-1, 0, 1)]
PRIMES = [2, 3, 5, 7, 97, 251, 257, 65_537, 99_991]


@pytest.mark.parametrize("n", sorted({1, 2, 6, *SQUARES, *PRIMES, 2**16, 2**17 + 1}))
def test_permutation_is_a_bijection_of_awkward_sizes(n: int) -> None:
    for key in (0, derive_key("awkward", n)):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize("n", [2**40, 2**40 - 1, 2**40 + 1, 2**61 - 1])
def test_permutation_of_more_than_can_be_listed_sends_no_two_to_one(n: int) -> None:
    """A collision among 2 * 10^5 of 2^40 images of a random map has a chance of 2 %: many keys, none may have one."""
    for key in range(8):
        index = np.concatenate([np.arange(100_000), n - 1 - np.arange(100_000)])
        image = permute(index, n, key)
        assert len(np.unique(image)) == len(index)
        assert 0 <= image.min() <= image.max() < n
        assert abs(image.mean() / n - 0.5) < 0.01
        assert image[3] == slow_permute(3, n, key)


def test_permutation_looks_random() -> None:
    n = 10_000
    base = permute(np.arange(n), n, derive_key("a", 1))
    other = permute(np.arange(n), n, derive_key("a", 2))
    noise = 5 / math.sqrt(n)
    assert abs(np.corrcoef(base, np.arange(n))[0, 1]) < noise
    assert abs(np.corrcoef(base[1:], base[:-1])[0, 1]) < noise
    assert abs(np.corrcoef(base, other)[0, 1]) < noise
    # where item 3 of 10 lands over many keys: chi-square with 9 degrees of freedom stays under 33 (p = 1e-4)
    landed = np.bincount([permute(np.array([3]), 10, derive_key("b", k))[0] for k in range(2000)], minlength=10)
    assert ((landed - 200) ** 2 / 200).sum() < 33
    # neighbors of the input are not neighbors of the output: mean distance of a random permutation is n / 3
    assert abs(np.abs(np.diff(base)).mean() / (n / 3) - 1) < 0.05


def test_permutation_refuses_what_is_outside() -> None:
    with pytest.raises(ValueError, match="outside"):
        permute(np.array([5]), 5, 0)
    with pytest.raises(ValueError, match="0 items"):
        permute(np.array([], np.int64), 0, 0)


weights = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=12)


@given(weights, st.integers(0, 2_000))
@settings(max_examples=100, deadline=None)
def test_quota_is_exact_within_one_and_never_takes_back(values: list[float], block: int) -> None:
    shares = check_weights(values, [str(i) for i in range(len(values))])
    before, after = quota(block * BLOCK, shares), quota((block + 1) * BLOCK, shares)
    assert sum(before) == block * BLOCK
    assert all(abs(part - block * BLOCK * share) < 1 for part, share in zip(before, shares, strict=True))
    assert all(b >= a for a, b in zip(before, after, strict=True))


def test_quota_gives_what_is_left_to_the_largest_remainders() -> None:
    sixths = [Fraction(1, 6), Fraction(2, 6), Fraction(3, 6)]
    assert [quota(total, sixths) for total in (10, 11, 12)] == [[2, 3, 5], [2, 4, 5], [2, 4, 6]]
    assert quota(1, [Fraction(1, 2), Fraction(1, 2)]) == [1, 0], "the first of equals"


def test_smallest_weight_never_goes_backwards() -> None:
    shares = check_weights([1.0, 2.0 / BLOCK * 1.01], ["a", "b"])
    previous = [0, 0]
    for block in range(400):
        now = quota(block * BLOCK, shares)
        assert all(n >= p for n, p in zip(now, previous, strict=True))
        previous = now


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e-6])
def test_bad_weights_are_refused_by_name(bad: float) -> None:
    with pytest.raises(MixtureError, match="source pile"):
        check_weights([1.0, bad], ["web", "pile"])
    with pytest.raises(MixtureError, match="at least one"):
        check_weights([], [])


def test_the_smallest_share_is_two_samples_a_block() -> None:
    assert check_weights([BLOCK - 2, 2], ["web", "pile"])[1] == Fraction(2, BLOCK)
    with pytest.raises(MixtureError, match=r"source pile is 2\.3e-05 of the total"):
        check_weights([BLOCK - 1.5, 1.5], ["web", "pile"])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), keys)
@settings(max_examples=15, deadline=None)
def test_mixture_draws_count_up_and_keep_their_shares(parts: list[int], key: int) -> None:
    shares = tuple(Fraction(part, sum(parts)) for part in parts)
    mixture = Mixture(shares, key)
    samples = np.arange(2 * BLOCK + 1000)
    source, draw = mixture.locate(samples)
    for s in range(len(parts)):
        assert np.array_equal(draw[source == s], np.arange((source == s).sum()))
    for samples_so_far in (0, 1, 777, BLOCK, BLOCK + 5, 2 * BLOCK + 999):
        assert mixture.drawn(samples_so_far) == np.bincount(source[:samples_so_far], minlength=len(parts)).tolist()
    assert np.bincount(source[:BLOCK], minlength=len(parts)).tolist() == quota(BLOCK, shares)
    some = np.array([2 * BLOCK + 3, 5, BLOCK, 0])
    assert np.array_equal(mixture.locate(some)[0], source[some])
    assert np.array_equal(mixture.locate(some)[1], draw[some])


def test_mixture_interleaves_sources() -> None:
    source, _ = Mixture((Fraction(1, 4), Fraction(3, 4)), derive_key("m")).locate(np.arange(BLOCK))
    per_window = (source.reshape(-1, 256) == 0).mean(1)
    assert per_window.std() < 2 * math.sqrt(0.25 * 0.75 / 256)
    assert abs(np.corrcoef(source[1:], source[:-1])[0, 1]) < 0.02


def test_every_block_of_a_mixture_is_arranged_anew() -> None:
    source, _ = Mixture((Fraction(1, 2), Fraction(1, 2)), derive_key("m")).locate(np.arange(2 * BLOCK))
    assert abs((source[:BLOCK] == source[BLOCK:]).mean() - 0.5) < 0.01


def course_of(mixture: Mixture, blocks: int) -> np.ndarray:
    """(blocks, BLOCK + 1, sources): draws of each source less its share, at every sample of each block."""
    source, _ = mixture.locate(np.arange(blocks * BLOCK))
    shares = np.array([float(share) for share in mixture.shares])
    one_hot = source[:, None] == np.arange(len(shares))
    drawn = np.concatenate([np.zeros((1, len(shares))), np.cumsum(one_hot, 0)])
    error = drawn - np.arange(len(drawn))[:, None] * shares
    return np.stack([error[block * BLOCK : (block + 1) * BLOCK + 1] for block in range(blocks)])


@pytest.mark.parametrize(
    "weights",
    [[1.0, 1.0], list(PILE.values()), [1.0, 2.02 / BLOCK, 2.02 / BLOCK], [0.7, 0.2, 0.1], [3.0] * 7],
    ids=["halves", "pile", "least", "three", "sevenths"],
)
def test_mixture_error_at_block_ends_and_inside_blocks(weights: list[float]) -> None:
    """Under one sample at each block's end; inside a block that of drawing at random without replacement."""
    shares = check_weights(weights, [str(i) for i in range(len(weights))])
    error = course_of(Mixture(shares, derive_key("course", len(weights))), 3)
    assert np.abs(error[:, [0, -1]]).max() < 1
    p = np.array([float(share) for share in shares])
    spread = np.sqrt(BLOCK * p * (1 - p))
    inside = np.abs(error).max((0, 1))
    assert (inside <= 2.5 * spread + 1).all()
    assert (inside <= BLOCK * p * (1 - p) + 2).all()
    assert (inside[spread > 5] > 0.3 * spread[spread > 5]).all(), "arranged in a pattern, not at random"


@pytest.mark.parametrize("weights", [list(PILE.values()), [1.0, 2.02 / BLOCK], [1e-4, 1e-3, 1.0]])
def test_mixture_error_stays_under_one_at_every_block_end_of_a_long_run(weights: list[float]) -> None:
    shares = check_weights(weights, [str(i) for i in range(len(weights))])
    mixture = Mixture(shares, 1)
    for block in [*range(1, 60), 10**3, 10**6 + 1, 10**9 + 7, 10**13 // BLOCK]:
        drawn = mixture.drawn(block * BLOCK)
        assert sum(drawn) == block * BLOCK
        assert max(abs(d - block * BLOCK * share) for d, share in zip(drawn, shares, strict=True)) < 1


def test_every_epoch_reads_every_row_once_in_a_new_order() -> None:
    rows = shuffled(np.arange(4 * 97), 97, 5).reshape(4, 97)
    assert all(np.array_equal(np.sort(epoch), np.arange(97)) for epoch in rows)
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 4
    assert np.array_equal(shuffled(np.array([100, 3, 350]), 97, 5), rows.ravel()[[100, 3, 350]])


def slow_windowed(draw: int, per_shard: list[int], window: int, key: int) -> tuple[int, set[int], int, int]:
    """Row of a draw, and shards, first draw and end of its window, by listing the whole epoch."""
    n = sum(per_shard)
    epoch, place = divmod(draw, n)
    rows = np.split(np.arange(n), np.cumsum(per_shard)[:-1])
    order = permute(np.arange(len(per_shard)), len(per_shard), derive_key("shards", key, epoch)).tolist()
    begin, windows = 0, math.ceil(len(order) / window)
    for number in range(windows):
        shards = order[number * len(order) // windows : (number + 1) * len(order) // windows]
        assert len(order) // windows <= len(shards) <= window
        listed = np.concatenate([rows[shard] for shard in shards])
        if begin <= place < begin + len(listed):
            turn = permute(np.array([place - begin]), len(listed), derive_key("window", key, epoch, number))[0]
            used = {shard for shard in shards if per_shard[shard]}
            return int(listed[turn]), used, epoch * n + begin, epoch * n + begin + len(listed)
        begin += len(listed)
    raise AssertionError("the windows of an epoch hold all its draws")


shard_sizes = st.lists(st.integers(0, 30), min_size=1, max_size=24).filter(any)


@given(shard_sizes, st.integers(1, 30), keys)
@settings(max_examples=60, deadline=None)
def test_windowed_equals_the_listed_epochs(per_shard: list[int], window: int, key: int) -> None:
    n, sizes = sum(per_shard), np.array(per_shard)
    draws = np.arange(3 * n)
    rows = windowed(draws, sizes, window, key)
    for draw in {0, n // 2, n - 1, n, 2 * n + n // 3, 3 * n - 1}:
        row, shards, begin, end = slow_windowed(draw, per_shard, window, key)
        assert rows[draw] == row
        found = window_shards(draw, sizes, window, key)
        assert (set(found.shards.tolist()), found.begin, found.end) == (shards, begin, end)
    for epoch in rows.reshape(3, n):
        assert np.array_equal(np.sort(epoch), np.arange(n)), "every row once in an epoch"
    picked = np.random.default_rng(0).permutation(3 * n).reshape(3, n)
    assert np.array_equal(windowed(picked, sizes, window, key), rows[picked])


@pytest.fixture(scope="module")
def uneven() -> np.ndarray:
    """Rows of 200 shards of unequal size."""
    return np.random.default_rng(3).integers(300, 700, 200)


def test_windows_touch_a_bounded_number_of_shards(uneven: np.ndarray) -> None:
    window, n = 16, int(uneven.sum())
    rows = windowed(np.arange(3 * n), uneven, window, 7)
    shard = np.searchsorted(np.cumsum(uneven), rows, side="right")
    assert len({tuple(epoch[:1000]) for epoch in rows.reshape(3, n)}) == 3
    smallest = np.sort(uneven)[: 200 // 13].sum()  # 13 windows hold 200 shards
    for run in (2000, int(smallest)):
        for first in range(0, 3 * n - run, 1501):
            assert len(np.unique(shard[first : first + run])) <= 2 * window
    # what a window names is what its draws read, and the windows of an epoch follow each other without a gap
    draw = 0
    while draw < 2 * n:
        found = window_shards(draw, uneven, window, 7)
        assert found.begin == draw < found.end
        assert set(shard[found.begin : found.end].tolist()) == set(found.shards.tolist())
        assert len(found.shards) <= window
        assert window_shards(found.end - 1, uneven, window, 7).begin == found.begin
        draw = found.end
    assert draw == 2 * n


def test_windows_look_random(uneven: np.ndarray) -> None:
    """Orders of epochs, of windows and within windows are unlike each other, and neighbors are far apart."""
    n = int(uneven.sum())
    rows = windowed(np.arange(2 * n), uneven, 16, 7)
    first, second = rows.reshape(2, n)
    noise = 5 / math.sqrt(n)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(len(uneven))
    assert abs((first == second).mean() - 1 / n) < 10 / n
    orders = [[], []]
    for epoch in range(2):
        draw = epoch * n
        while draw < (epoch + 1) * n:
            found = window_shards(draw, uneven, 16, 7)
            orders[epoch] += found.shards.tolist()
            inside = rows[found.begin : found.end]
            ranks = np.argsort(np.argsort(inside))
            assert abs(np.corrcoef(ranks[1:], ranks[:-1])[0, 1]) < 5 / math.sqrt(len(ranks))
            draw = found.end
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(200))
    assert sum(a == b for a, b in zip(*orders, strict=True)) < 8, "the shards come in the same order every epoch"
    assert noise < 0.02
    same_sizes = np.full(8, 50)
    turns = [np.argsort(windowed(np.arange(400) + e * 400, same_sizes, 8, 1)).tolist() for e in range(3)]
    assert len({tuple(turn) for turn in turns}) == 3


def test_windows_cost_little_anywhere() -> None:
    """A draw far out costs what the first costs: no walk, no table of rows."""
    sizes = np.full(2800, 65_536)
    far = 10**12
    row = windowed(np.array([far]), sizes, 16, 3)[0]
    found = window_shards(far, sizes, 16, 3)
    assert row // 65_536 in found.shards
    begin = time.process_time()
    windowed(np.arange(far + 10**9, far + 10**9 + 8), sizes, 16, 3)
    assert time.process_time() - begin < 0.05


def test_windows_refuse_what_is_empty() -> None:
    for sizes, window in (([0, 0], 1), ([5], 0)):
        with pytest.raises(ValueError, match="at least 1"):
            windowed(np.array([0]), np.array(sizes), window, 0)


def test_contiguous_slots_walk_their_share() -> None:
    rows = contiguous(np.arange(3 * 8), 14, 3).reshape(8, 3)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert rows[:, 2].tolist() == [8, 9, 10, 11, 8, 9, 10, 11]
    assert laps(np.arange(3 * 9), 14, 3).tolist() == 12 * [0] + 12 * [1] + 3 * [2]
    with pytest.raises(MixtureError, match="15 slots"):
        contiguous(np.arange(3), 14, 15)


def test_keys_depend_on_every_part_and_its_type() -> None:
    made = {derive_key(*parts) for parts in [("a", 1), ("a", "1"), ("a1",), ("a", 2), (1, "a")]}
    assert len(made) == 5
    # 1, True and NumPy's 1 are equal, and no key may depend on which of them was asked for first
    assert len({derive_key("b", 1), derive_key("b", True), derive_key("b", np.int64(1))}) == 3
    text = b"str:c\0int:1"
    assert derive_key("c", 1) == int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
