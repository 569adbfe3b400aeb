import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.objectives import CausalLM
from jaxlm.objectives.base import Aux
from jaxlm.testing import tiny_decoder
from jaxlm.training.probes import gradient_variance, trajectory_curvature


def test_variance_is_that_of_gradients_taken_one_by_one():
    model, params = tiny_decoder("llama")
    ids = np.random.default_rng(0).integers(0, 64, (3, 2, 9)).astype(np.int32)
    batches = {"inputs": ids[..., :-1], "targets": ids[..., 1:], "loss_weights": np.ones((3, 2, 8), np.float32)}
    batches = {name: jnp.asarray(x) for name, x in batches.items()}
    found = jax.jit(lambda p: gradient_variance(CausalLM(model), p, batches))(params)

    def mean_nll(p, batch):
        logp = jax.nn.log_softmax(model.apply({"params": p}, batch["inputs"]))
        return -jnp.mean(jnp.take_along_axis(logp, batch["targets"][..., None], -1))

    gradient = jax.jit(jax.grad(mean_nll))
    pieces = [{name: x[i] for name, x in batches.items()} for i in range(3)]
    each = [dict(trees.named_leaves(gradient(params, piece))) for piece in pieces]
    assert "final_norm/scale" not in found
    assert found["blocks/0/mlp/up/kernel"].shape == (4,)
    for path, values in found.items():
        expected = np.stack([g[path] for g in each]).var(axis=0, ddof=1).sum((-2, -1))
        np.testing.assert_allclose(values, expected, rtol=1e-3, err_msg=path)


class Pull:
    """`sum(batch * params)`: the gradient is the batch."""

    def totals(self, params, batch, ctx):
        return {}

    def loss(self, params, batch, ctx, totals):
        return jnp.sum(batch["pull"] * params["w"]), Aux()


def test_small_variances_of_large_gradients_are_not_rounded_away():
    pull = 1e4 + np.random.default_rng(0).normal(size=(8, 3, 5))
    found = gradient_variance(Pull(), {"w": jnp.ones((3, 5))}, {"pull": jnp.asarray(pull, jnp.float32)})
    np.testing.assert_allclose(found["w"], pull.astype(np.float32).var(axis=0, ddof=1).sum(), rtol=1e-2)


def test_one_batch_has_no_variance():
    model, params = tiny_decoder("llama")
    with pytest.raises(ConfigError, match="1 batches"):
        gradient_variance(CausalLM(model), params, {"inputs": jnp.zeros((1, 2, 8), jnp.int32)})


class Bowl:
    """`p^T H p / 2` of parameters in two leaves: its derivatives are known."""

    hessian = np.diag([1.0, 4.0, 9.0]) + 0.5

    def totals(self, params, batch, ctx):
        return {}

    def loss(self, params, batch, ctx, totals):
        p = jnp.concatenate([params["a"], params["b"]])
        return 0.5 * p @ jnp.asarray(self.hessian) @ p, Aux()


def test_curvature_along_an_update_of_a_quadratic():
    before, v = np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.1, -0.2])

    def tree(x):
        return {"a": jnp.asarray(x[:1], jnp.float32), "b": jnp.asarray(x[1:], jnp.float32)}

    found = jax.jit(lambda x, y: trajectory_curvature(Bowl(), x, y, {}))(tree(before), tree(before + v))
    old, new = Bowl.hessian @ before, Bowl.hessian @ (before + v)
    slope = new @ v / np.linalg.norm(v)
    second = v @ Bowl.hessian @ v / (v @ v)
    expected = {
        "grad_norm": np.linalg.norm(new),
        "cosine": old @ new / np.linalg.norm(old) / np.linalg.norm(new),
        "slope": slope,
        "second_derivative": second,
        "curvature": second / (1 + slope**2) ** 1.5,
    }
    assert {name: float(x) for name, x in found.items()} == pytest.approx(expected, rel=1e-4)
