"""Low-rank and sparse kernels: what is drawn, balanced factors, merged adapters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import weights
from jaxlm.core.errors import ConfigError
from jaxlm.weights import (
    Quantized,
    add_low_rank,
    factored_kernel,
    merge_and_restart,
    refactorize,
    sparse_low_rank_kernel,
)

KEY = jax.random.key(0)


def trained(w):
    return dataclasses.replace(w, b=0.3 * jax.random.normal(jax.random.key(1), w.b.shape))


def test_kernels_are_drawn_as_in_the_papers():
    w = factored_kernel(KEY, (2, 400, 300), 100)
    assert w.shape == (2, 400, 300)
    assert w.scale == 0.32
    for factor, bound in ((w.a, 1 / 20), (w.b, 1 / 10)):
        assert np.max(np.abs(factor)) <= bound
        np.testing.assert_allclose(np.std(factor), bound / np.sqrt(3), rtol=0.02)
    s = sparse_low_rank_kernel(KEY, (2, 400, 300), 100, density=0.01)
    assert s.base.values.shape == s.base.indices.shape == (2, 1200)
    assert not np.any(s.b)
    np.testing.assert_allclose(np.std(s.base.values), (1 / 20) / np.sqrt(3), rtol=0.05)


def test_the_places_of_a_sparse_kernel_are_distinct_sorted_and_differ_by_layer():
    sparse = sparse_low_rank_kernel(KEY, (2, 3, 10, 20), 2, density=0.1).base
    flat = np.asarray(sparse.indices).reshape(6, 20)
    assert (np.diff(flat, axis=-1) > 0).all()
    assert len({tuple(row) for row in flat}) == 6
    dense = np.asarray(sparse.dense())
    assert dense.shape == (2, 3, 10, 20)
    expected = np.zeros((6, 200), np.float32)
    np.put_along_axis(expected, flat, np.asarray(sparse.values).reshape(6, 20), -1)
    np.testing.assert_array_equal(dense.reshape(6, 200), expected)


def test_gradients_are_those_of_the_dense_matrix_seen_through_each_part():
    w = trained(sparse_low_rank_kernel(KEY, (6, 8), 2, density=0.2))
    x = jax.random.normal(jax.random.key(2), (5, 6))

    def loss(kernel):
        return jnp.sum(jnp.sin(weights.matmul(x, kernel)))

    def of_parts(a, b, values):
        base = dataclasses.replace(w.base, values=values)
        return loss(dataclasses.replace(w, a=a, b=b, base=base))

    da, db, dvalues = jax.grad(of_parts, argnums=(0, 1, 2))(w.a, w.b, w.base.values)
    dense = jax.grad(loss)(w.dense())
    np.testing.assert_allclose(da, w.scale * dense @ w.b.T, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(db, w.scale * w.a.T @ dense, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(dvalues, dense.ravel()[w.base.indices], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "w",
    [
        factored_kernel(KEY, (2, 12, 8), 3),
        trained(sparse_low_rank_kernel(KEY, (2, 12, 8), 3, density=0.1)),
    ],
)
def test_refactorizing_keeps_the_function_and_balances_the_factors(w):
    new = refactorize({"kernel": w})["kernel"]
    np.testing.assert_allclose(weights.dense(new), weights.dense(w), rtol=1e-5, atol=1e-5)
    singular = np.linalg.svd(np.asarray(w.a @ w.b), compute_uv=False)[:, :3]
    expected = singular[:, :, None] * np.eye(3)
    np.testing.assert_allclose(new.a.mT @ new.a, expected, atol=1e-5)
    np.testing.assert_allclose(new.b @ new.b.mT, expected, atol=1e-5)
    size = lambda k: float(jnp.sum(k.a**2) + jnp.sum(k.b**2))  # noqa: E731
    assert size(new) == pytest.approx(2 * singular.sum(), rel=1e-5)
    assert size(new) < size(w)
    again = refactorize({"kernel": new})["kernel"]
    np.testing.assert_allclose(np.abs(again.a), np.abs(new.a), atol=1e-5)
    assert new.scale == w.scale


def test_refactorizing_a_product_of_zero_is_refused():
    with pytest.raises(ConfigError, match="blocks/up: the product of its factors is zero"):
        refactorize({"blocks": {"up": sparse_low_rank_kernel(KEY, (2, 12, 8), 3, density=0.1)}})


def test_merging_and_restarting_keeps_the_function_and_what_else_there_is():
    w = trained(add_low_rank(KEY, jax.random.normal(KEY, (2, 6, 8)), 3, alpha=6.0))
    params = {"kernel": w, "norm": jnp.ones(6)}
    new = merge_and_restart(jax.random.key(5), params)
    np.testing.assert_allclose(weights.dense(new["kernel"]), weights.dense(w), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["kernel"].base, weights.dense(w), rtol=1e-6)
    assert not np.any(new["kernel"].b)
    assert new["kernel"].scale == w.scale
    assert np.any(new["kernel"].a != w.a)
    assert new["norm"] is params["norm"]


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="rank is 9, expected 1 to 8"):
        factored_kernel(KEY, (12, 8), 9)
    with pytest.raises(ConfigError, match="density is 0.0"):
        sparse_low_rank_kernel(KEY, (12, 8), 2, density=0.0)
    packed = Quantized(jnp.zeros((6, 8), jnp.int8), jnp.ones((1, 8)))
    with pytest.raises(ConfigError, match="w: its base is Quantized"):
        merge_and_restart(KEY, {"w": add_low_rank(KEY, packed, 2)})
