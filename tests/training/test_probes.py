import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.objectives import CausalLM
from jaxlm.testing import tiny_decoder
from jaxlm.training.probes import gradient_variance


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


def test_one_batch_has_no_variance():
    model, params = tiny_decoder("llama")
    with pytest.raises(ConfigError, match="1 batches"):
        gradient_variance(CausalLM(model), params, {"inputs": jnp.zeros((1, 2, 8), jnp.int32)})
