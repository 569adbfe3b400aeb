"""Keyed permutations are permutations at every size, uniform, and never change."""

import numpy as np
import pytest

from jaxlm.data.permutation import permutation_key, permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 1000, 2**16 - 1, 2**16, 2**16 + 1])
def test_every_size_is_permuted(size):
    for key in (0, 1, permutation_key(3), 2**64 - 1):
        order = permuted(np.arange(size), size, key)
        np.testing.assert_array_equal(np.sort(order), np.arange(size))
        some = np.array([size - 1, 0, size // 2])
        np.testing.assert_array_equal(permuted(some, size, key), order[some])
    if size >= 1000:
        assert (permuted(np.arange(size), size, 1) != permuted(np.arange(size), size, 2)).mean() > 0.99
        assert (order != np.arange(size)).mean() > 0.99


def test_sizes_and_keys_may_differ_by_index():
    rng = np.random.default_rng(0)
    size = rng.integers(1, 10**12, 200)
    index = rng.integers(0, size)
    key = rng.integers(0, 2**63, 200).astype(np.uint64)
    together = permuted(index, size, key)
    assert together.tolist() == [
        int(permuted(i[None], int(s), int(k))[0]) for i, s, k in zip(index, size, key)
    ]
    assert (together < size).all()
    assert permuted(np.array([], np.int64), 5, 0).shape == (0,)
    with pytest.raises(IndexError, match="index 5 in a permutation of 5"):
        permuted(np.array([0, 5]), 5, 0)


@pytest.mark.parametrize("size", [2, 3, 5, 13, 100])
def test_each_index_goes_everywhere_equally_often(size):
    trials = 200 * size
    keys = np.array([permutation_key("trial", t) for t in range(trials)], dtype=np.uint64)
    for index in {0, size // 2, size - 1}:
        hits = np.bincount(permuted(np.full(trials, index), size, keys), minlength=size)
        # Chi-square has mean size - 1 and variance 2 (size - 1); five deviations never occur by chance.
        chi_square = ((hits - 200) ** 2 / 200).sum()
        assert chi_square < size - 1 + 5 * np.sqrt(2 * size)


def test_neighbors_are_separated():
    size = 10_000
    order = permuted(np.arange(size), size, permutation_key(0))
    steps = np.diff(order) % size
    # Differences of neighbors would cluster if the halves were mixed too little.
    counts, _ = np.histogram(steps, bins=50, range=(0, size))
    assert ((counts - 199.98) ** 2 / 199.98).sum() < 49 + 5 * np.sqrt(98)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.05


def test_orders_never_change():
    """A run that is resumed under newer versions of everything must go on in the same order."""
    assert permutation_key(0, "a", 2) == 5905230012979443589
    assert permuted(np.arange(5), 5, 0).tolist() == [1, 4, 3, 2, 0]
    assert permuted(np.arange(3), 10**9, 2**64 - 1).tolist() == [406560691, 919152393, 27859435]
