"""The rate network against a loop, linear networks against their closed forms, ranks of initial kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.models import linear_network as linear
from jaxlm.models.ctrnn import CTRNN
from jaxlm.models.initialization import low_rank_init, reduce_kernels
from jaxlm.optim.roles import roles
from jaxlm.scoring import tangent_kernel
from jaxlm.testing import tiny_decoder


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_rates_follow_the_difference_equation(alpha):
    network = CTRNN(3, 6, 2, alpha)
    params = network.init(jax.random.key(0), rank=2)["params"]
    inputs = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    outputs, hidden = network.run(params, jnp.asarray(inputs))
    w = {name: np.asarray(p["kernel"]) for name, p in params.items()}
    h = np.zeros((2, 6))
    for t in range(5):
        h = np.maximum((1 - alpha) * h + alpha * (inputs[:, t] @ w["input"] + h @ w["recurrent"]), 0)
        np.testing.assert_allclose(hidden[:, t], h, atol=1e-5)
        np.testing.assert_allclose(outputs[:, t], h @ w["output"], atol=1e-5)
    np.testing.assert_array_equal(network.apply({"params": params}, jnp.asarray(inputs)), outputs)
    assert set(jax.tree.leaves(roles(network.axes()))) == {"matrix"}


def test_initial_weights_have_rank_and_scale():
    params = CTRNN(10, 200, 4).init(jax.random.key(1))["params"]
    assert np.std(params["recurrent"]["kernel"]) == pytest.approx(1.25 / 200**0.5, rel=0.02)
    assert np.abs(params["input"]["kernel"]).max() == pytest.approx(10**-0.5, rel=0.01)
    assert np.abs(params["output"]["kernel"]).max() == pytest.approx(200**-0.5, rel=0.01)
    whole, low = (low_rank_init(jax.random.key(2), (3, 20, 30), rank) for rank in (None, 4))
    assert (np.linalg.matrix_rank(np.asarray(low), tol=1e-4) == 4).all()
    np.testing.assert_allclose(np.linalg.norm(low, axis=(1, 2)), np.linalg.norm(whole, axis=(1, 2)), rtol=1e-6)


def test_kernels_of_a_transformer_are_reduced_matrix_by_matrix():
    model, params = tiny_decoder("qwen2", num_layers=2)
    found = reduce_kernels(params, model.axes(), 3, lambda path: "attention" in path)
    old, new = params["blocks"][0], found["blocks"][0]
    assert (np.linalg.matrix_rank(np.asarray(new["attention"]["query"]["kernel"]), tol=1e-4) == 3).all()
    for path in (("mlp", "up", "kernel"), ("attention", "query", "bias")):
        a, b = old, new
        for part in path:
            a, b = a[part], b[part]
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(found["embedding"]["table"], params["embedding"]["table"])
    whole = reduce_kernels(params, model.axes(), 1000)
    np.testing.assert_allclose(whole["blocks"][0]["mlp"]["up"]["kernel"], old["mlp"]["up"]["kernel"], atol=1e-5)


def test_linear_networks_have_the_exact_kernel_and_conserve_balance():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32))
    target = jnp.arange(7.0) / 7
    params = linear.init_linear_network(jax.random.key(0), 5, 6, rank=2, norm=1.5)
    assert np.linalg.norm(params["first"]["kernel"]) == pytest.approx(1.5, rel=1e-5)
    start = linear.conserved(params)

    def loss(p):
        return jnp.mean(jnp.square(linear.linear_network(p, x) - target))

    drifts = []
    for rate in (0.02, 0.002):
        p = params
        grad = jax.jit(jax.grad(loss))
        for _ in range(round(2 / rate)):
            p = jax.tree.map(lambda w, g: w - rate * g, p, grad(p))  # noqa: B023
        drifts.append(float(jnp.max(jnp.abs(linear.conserved(p) - start))))
    assert drifts[0] < 0.05
    assert drifts[1] < 0.2 * drifts[0]  # of the order of the step: gradient flow conserves it
    found = tangent_kernel(lambda p: linear.linear_network(p, x), p)
    np.testing.assert_allclose(found, linear.exact_tangent_kernel(p, x), rtol=1e-4, atol=1e-5)


def test_an_aligned_network_needs_only_its_second_layer():
    teacher = jnp.zeros(5).at[1].set(1.0)
    params = linear.init_aligned_network(jax.random.key(0), teacher, 6, norm=3.0)
    kernel = np.asarray(params["first"]["kernel"])
    assert np.linalg.matrix_rank(kernel) == 1
    assert np.linalg.norm(kernel) == pytest.approx(3, rel=1e-5)
    assert not np.any(np.delete(kernel, 1, axis=0))
    np.testing.assert_array_equal(linear.hidden_units(params, jnp.eye(5)), kernel)


def test_what_cannot_be_built_is_refused():
    model, params = tiny_decoder("llama", num_layers=2)
    with pytest.raises(ConfigError, match="alpha is 0"):
        CTRNN(1, 1, 1, 0.0)
    with pytest.raises(ConfigError, match="num_hidden is 0"):
        CTRNN(1, 0, 1)
    with pytest.raises(ConfigError, match="rank is 0, expected at least 1"):
        reduce_kernels(params, model.axes(), 0)
    with pytest.raises(ConfigError, match="no matrix is chosen"):
        reduce_kernels(params, model.axes(), 2, lambda path: "norm" in path)
    with pytest.raises(ConfigError, match="norm is 0"):
        linear.init_linear_network(jax.random.key(0), 2, 2, norm=0.0)
