"""Stacks of matrices against NumPy's decompositions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.core.linalg import (
    CONVERGENT,
    QUINTIC,
    balanced_factors,
    effective_ranks,
    leading_singular_vectors,
    orthogonalize,
    random_orthonormal,
    solve_positive,
    truncate_rank,
)

SHAPES = [(4, 7), (7, 4), (5, 5), (2, 3, 4, 7)]


def normal(shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalizing_moves_singular_values_to_one_and_keeps_the_vectors(shape):
    u, s, vt = np.linalg.svd(normal(shape), full_matrices=False)
    s = np.linspace(1.0, 0.1, s.shape[-1], dtype=np.float32) * np.ones_like(s)  # none is lost among the smallest
    x = jnp.asarray((u * s[..., None, :]) @ vt)
    np.testing.assert_allclose(orthogonalize(x, CONVERGENT), u @ vt, atol=1e-3)
    rough = np.linalg.svd(orthogonalize(x, QUINTIC), compute_uv=False)
    assert (rough > 0.6).all()
    assert (rough < 1.3).all()
    np.testing.assert_allclose(orthogonalize(1e-6 * x, CONVERGENT), u @ vt, atol=2e-2)
    assert not np.any(orthogonalize(0 * x))


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_singular_vectors_have_a_positive_largest_entry(shape):
    x = normal(shape)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    left, right = leading_singular_vectors(jnp.asarray(x), 3, "both")
    for found, exact in ((left, u[..., :3]), (right, np.swapaxes(vt, -1, -2)[..., :3])):
        np.testing.assert_allclose(np.abs(np.sum(found * exact, axis=-2)), 1.0, rtol=1e-4)
        assert (np.max(found, -2) >= np.max(-found, -2)).all()
    assert leading_singular_vectors(jnp.asarray(x), 3, "rows")[1] is None
    assert leading_singular_vectors(jnp.asarray(x), 3, "columns")[0] is None


def test_balanced_factors_have_the_same_product_and_equal_singular_values():
    a, b = jnp.asarray(normal((2, 9, 3))), jnp.asarray(normal((2, 3, 5)))
    new_a, new_b = balanced_factors(a, b)
    np.testing.assert_allclose(new_a @ new_b, a @ b, rtol=1e-4, atol=1e-4)
    singular = np.linalg.svd(np.asarray(a @ b), compute_uv=False)[:, :3]
    for factor in (new_a, new_b):
        np.testing.assert_allclose(np.linalg.svd(factor, compute_uv=False) ** 2, singular, rtol=1e-4)


def test_random_orthonormal_is_orthonormal_and_has_no_preferred_direction():
    q = random_orthonormal(jax.random.key(0), (2000, 4, 2))
    np.testing.assert_allclose(q.mT @ q, np.broadcast_to(np.eye(2), (2000, 2, 2)), atol=1e-5)
    np.testing.assert_allclose(np.mean(q, axis=0), 0.0, atol=0.05)
    np.testing.assert_allclose(np.mean(q @ q.mT, axis=0), np.eye(4) / 2, atol=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_is_the_best_approximation_at_the_wanted_norm(shape):
    x = normal(shape)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    best = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
    np.testing.assert_allclose(truncate_rank(jnp.asarray(x), 2, None), best, atol=1e-5)
    found = truncate_rank(jnp.asarray(x), 2)
    np.testing.assert_allclose(np.linalg.norm(found, axis=(-2, -1)), np.linalg.norm(x, axis=(-2, -1)), rtol=1e-6)
    assert (np.linalg.matrix_rank(np.asarray(found), tol=1e-4) == 2).all()
    spectral = np.linalg.norm(truncate_rank(jnp.asarray(x), 2, "spectral"), 2, axis=(-2, -1))
    np.testing.assert_allclose(spectral, s[..., 0], rtol=1e-5)
    traced = jax.jit(truncate_rank)(jnp.asarray(x), jnp.asarray(2))
    np.testing.assert_allclose(traced, found, atol=1e-5)
    np.testing.assert_allclose(truncate_rank(jnp.asarray(x), min(shape[-2:])), x, atol=1e-5)


def test_effective_ranks_of_known_singular_values():
    u, v = np.linalg.qr(normal((8, 4)))[0], np.linalg.qr(normal((6, 4)))[0]
    found = effective_ranks(jnp.asarray((u * np.array([4.0, 2.0, 0.4, 0.0], np.float32)) @ v.T))
    p = np.array([4.0, 2.0, 0.4]) / 6.4
    assert found["numerical"] == 3
    assert found["large"] == 2
    assert found["participation"] == pytest.approx(6.4**2 / (16 + 4 + 0.16), rel=1e-5)
    assert found["entropy"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    same = effective_ranks(jnp.asarray(np.stack([u.T @ u, 0 * u.T @ u]).astype(np.float32)))
    for values in same.values():
        np.testing.assert_allclose(values, [4.0, 0.0], atol=1e-4)


def test_ranks_that_cannot_be_are_refused():
    for rank in (0, 5):
        with pytest.raises(ConfigError, match=f"rank is {rank}, expected 1 to 4"):
            truncate_rank(jnp.ones((4, 7)), rank)
    with pytest.raises(ConfigError, match="match is 'nuclear'"):
        truncate_rank(jnp.ones((4, 7)), 1, "nuclear")


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_positive_systems_are_solved(batch):
    x, vector = normal((*batch, 5, 9)), normal((*batch, 5))
    matrix = x @ np.swapaxes(x, -1, -2)
    expected = np.linalg.solve(matrix.astype(np.float64), vector[..., None])[..., 0]
    np.testing.assert_allclose(solve_positive(matrix, vector), expected, rtol=2e-3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: leading_singular_vectors(x, 2, "both"),
        lambda x: balanced_factors(x, x.mT),
        lambda x: truncate_rank(x, 2),
        effective_ranks,
        lambda x: random_orthonormal(jax.random.key(0), x.shape),
        lambda x: solve_positive(x @ x.mT, x[..., 0]),
    ],
)
def test_cpus_decompose_one_matrix_at_a_time(function):
    # Two calls for several matrices each can take all threads of two cores, and wait for more of them for good.
    text = jax.jit(function).lower(jnp.asarray(normal((2, 3, 7, 4)))).as_text()
    calls = [line for line in text.splitlines() if "@lapack_" in line]
    assert calls
    assert not [line for line in calls if re.search(r"tensor<\d+x\d+x\d+x", line)]
