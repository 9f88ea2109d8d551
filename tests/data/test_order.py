"""The order against slow plain-Python definitions."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from potamos.data.errors import MixtureError
from potamos.data.order import BLOCK, Mixture, check_weights, contiguous, derive_key, laps, permute, quota, shuffled

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


def test_every_epoch_reads_every_row_once_in_a_new_order() -> None:
    rows = shuffled(np.arange(4 * 97), 97, 5).reshape(4, 97)
    assert all(np.array_equal(np.sort(epoch), np.arange(97)) for epoch in rows)
    assert len({tuple(epoch) for epoch in rows.tolist()}) == 4
    assert np.array_equal(shuffled(np.array([100, 3, 350]), 97, 5), rows.ravel()[[100, 3, 350]])


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
