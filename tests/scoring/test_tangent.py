"""Tangent kernels against Jacobians and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.models.ctrnn import CTRNN
from jaxlm.scoring import (
    kernel_alignment,
    representation_alignment,
    sign_similarity,
    tangent_kernel,
    weight_change,
)
from jaxlm.testing import tiny_decoder


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def recurrent(path):
    return path == "recurrent/kernel"


@pytest.mark.parametrize("block", [5, 64])
def test_kernel_is_that_of_the_jacobian_by_the_chosen_parameters(block):
    network = CTRNN(2, 5, 3, alpha=0.7)
    params = network.init(jax.random.key(0))["params"]
    inputs = normal(2, 4, 2)
    found = tangent_kernel(lambda p: network.apply({"params": p}, inputs), params, recurrent, block=block)
    jacobian = jax.jacrev(lambda p: jnp.ravel(network.apply({"params": p}, inputs)))(params)
    by_recurrent = np.asarray(jacobian["recurrent"]["kernel"]).reshape(24, -1)
    np.testing.assert_allclose(found, by_recurrent @ by_recurrent.T, rtol=1e-4, atol=1e-6)
    assert (found == found.T).all()
    assert np.linalg.eigvalsh(np.asarray(found)).min() > -1e-4 * np.linalg.norm(found)
    whole = tangent_kernel(lambda p: network.apply({"params": p}, inputs), params)
    rows = np.concatenate([np.asarray(x).reshape(24, -1) for x in jax.tree.leaves(jacobian)], axis=1)
    np.testing.assert_allclose(whole, rows @ rows.T, rtol=1e-4, atol=1e-5)


def test_a_linear_model_is_always_lazy():
    x = normal(6, 3)
    before, after = (tangent_kernel(lambda w: x @ w["w"], {"w": normal(3, seed=s)}) for s in (1, 2))
    np.testing.assert_allclose(before, x @ x.T, rtol=1e-5, atol=1e-6)
    assert kernel_alignment(before, after) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_kernel_of_a_transformer(family):
    model, params = tiny_decoder(family, num_layers=2)
    tokens = jnp.arange(10).reshape(2, 5)

    def f(p):
        return model.apply({"params": p}, tokens)[:, -2:, :3]

    found = jax.jit(lambda p: tangent_kernel(f, p, lambda path: "mlp/up/kernel" in path))(params)
    jacobian = dict(trees.named_leaves(jax.jacrev(f)(params)))["blocks/0/mlp/up/kernel"].reshape(12, -1)
    np.testing.assert_allclose(found, jacobian @ jacobian.T, rtol=1e-3, atol=1e-4 * np.abs(found).max())


def test_alignments_are_cosines_of_similarities():
    a, b = normal(5, 8), normal(5, 3, seed=1)
    ka, kb = np.asarray(a @ a.T), np.asarray(b @ b.T)
    expected = (ka * kb).sum() / np.sqrt((ka**2).sum() * (kb**2).sum())
    assert representation_alignment(a, b) == pytest.approx(expected, rel=1e-5)
    assert kernel_alignment(jnp.asarray(ka), jnp.asarray(kb)) == pytest.approx(expected, rel=1e-5)
    assert 0 < expected < 1
    assert kernel_alignment(jnp.asarray(ka), 1e18 * jnp.asarray(ka)) == pytest.approx(1, abs=1e-6)
    apart = jnp.zeros((5, 2)).at[0, 0].set(1.0)
    assert representation_alignment(apart, jnp.roll(apart, 1, axis=0)) == 0


def test_weight_change_and_signs():
    before = {"a": jnp.zeros((2, 3, 4)), "b": jnp.zeros(5)}
    after = {"a": jnp.ones((2, 3, 4)) * jnp.array([1.0, 2.0])[:, None, None], "b": jnp.ones(5)}
    found = weight_change(before, after)
    np.testing.assert_allclose(found["a"], np.sqrt(12) * np.array([1, 2]), rtol=1e-6)
    assert found["b"] == pytest.approx(np.sqrt(5))
    assert list(weight_change(before, after, lambda path: path == "a")) == ["a"]
    narrow = {"w": jnp.ones((7, 9), jnp.bfloat16)}
    change = weight_change(narrow, {"w": jnp.zeros((7, 9), jnp.bfloat16)})["w"]
    assert change == pytest.approx(np.sqrt(63), rel=1e-6)  # bfloat16 has three digits
    assert sign_similarity(jnp.array([0.0, 2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 0.0, 3.0])) == 0.5


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ConfigError, match="no parameter is chosen of w"):
        tangent_kernel(lambda p: p["w"], {"w": jnp.ones(2)}, lambda path: False)
    with pytest.raises(ConfigError, match="expected the same outputs"):
        kernel_alignment(jnp.eye(2), jnp.eye(3))
    with pytest.raises(ConfigError, match="parameters differ: b"):
        weight_change({"a": jnp.ones(2)}, {"a": jnp.ones(2), "b": jnp.ones(2)})
    with pytest.raises(ConfigError, match="expected the same"):
        sign_similarity(jnp.ones(2), jnp.ones(3))
