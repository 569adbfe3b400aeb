"""Masks of N:M sparsity against sorting by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.core.sparsity import check_nm, flip_rate, nm_mask, satisfies_nm


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("shape", [(16, 5), (3, 8, 2), (2, 3, 8, 1)])
def test_the_largest_of_each_group_are_kept(n, m, shape):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    groups = np.abs(w).reshape(*shape[:-2], shape[-2] // m, m, shape[-1])
    expected = np.zeros(groups.shape, bool)
    np.put_along_axis(expected, np.argsort(-groups, axis=-2)[..., :n, :], True, axis=-2)
    mask = nm_mask(jnp.abs(w), n, m)
    np.testing.assert_array_equal(mask, expected.reshape(shape))
    assert satisfies_nm(jnp.where(mask, w, 0), n, m)
    assert not satisfies_nm(w, n, m)


def test_of_equals_exactly_n_are_kept_the_first_ones():
    mask = nm_mask(jnp.ones((8, 3)))
    np.testing.assert_array_equal(mask[:, 0], [True, True, False, False] * 2)
    ties = nm_mask(jnp.array([[1.0], [2.0], [2.0], [2.0]]), 2, 4)
    np.testing.assert_array_equal(ties[:, 0], [False, True, True, False])


def test_flips_are_counted_over_a_tree():
    a = {"x": jnp.array([True, False]), "y": None, "z": jnp.array([[True, True]])}
    b = {"x": jnp.array([False, False]), "y": None, "z": jnp.array([[True, True]])}
    assert flip_rate(a, b) == 0.25
    with pytest.raises(ConfigError, match="no masks"):
        flip_rate({"y": None}, {"y": None})


@pytest.mark.parametrize(("shape", "n", "m"), [((6, 2), 2, 4), ((8, 2), 4, 4), ((8, 2), 0, 4), ((8,), 2, 4)])
def test_groups_that_do_not_divide_are_refused_by_name(shape, n, m):
    with pytest.raises(ConfigError, match="up/kernel of shape" if 1 <= n < m else f"{n}:{m} sparsity"):
        check_nm(shape, n, m, "up/kernel")
