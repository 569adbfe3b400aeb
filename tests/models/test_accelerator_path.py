"""What is compiled for accelerators, run here: its own remat policy, no flattened products."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import sharding
from jaxlm.models import Decoder
from jaxlm.objectives import CausalLM, StepContext
from jaxlm.testing import tiny_config


@pytest.fixture
def as_on_a_tpu():
    token = sharding._ambient.set(dataclasses.replace(sharding._NO_MESH, platform="tpu"))
    yield
    sharding._ambient.reset(token)


def gradients(config):
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(0))["params"]
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 81)).astype(np.int32)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": np.ones((2, 80), np.float32)}
    batch["segment_ids"] = 1 + (np.arange(80)[None] >= np.array([[30], [60]])).astype(np.int32)
    objective = CausalLM(model, chunk_length=16)

    def loss(params):
        ctx = StepContext(None, None, jnp.zeros((), jnp.int32), jax.random.key(0), {})
        return objective.loss(params, batch, ctx, objective.totals(params, batch, ctx))[0]

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_values_and_gradients_are_those_of_the_cpu(family, request):
    config = tiny_config(family, num_layers=2, max_length=80)
    expected = gradients(dataclasses.replace(config, attention="reference"))
    request.getfixturevalue("as_on_a_tpu")
    for remat in ("dots", "full"):
        got = gradients(dataclasses.replace(config, remat=remat))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_dots_stores_what_the_backward_pass_needs_but_the_output_projection(as_on_a_tpu, capsys):
    config = tiny_config("llama", num_layers=3, max_length=80, remat="dots")
    model = Decoder(config)
    ids = jnp.zeros((2, 80), jnp.int32)

    def loss(params):
        return jnp.sum(model.trunk(params, model.embed(params, ids)).hidden)

    jax.ad_checkpoint.print_saved_residuals(loss, model.abstract_params())
    shapes = [line.split("[")[1].split("]")[0] for line in capsys.readouterr().out.splitlines() if "[" in line]
    stacks = [shape for shape in shapes if shape.startswith("3,2,")]
    wide, heads = f"3,2,80,{config.mlp_dim}", f"3,2,{config.kv_heads},"
    assert sum(shape == wide for shape in stacks) == 2  # gate and up
    assert sum(shape == f"3,2,80,{config.embed_dim}" for shape in stacks) == 1  # each layer's input
    assert sum(shape.startswith(heads) for shape in stacks) == 5  # queries, keys, values, result, norm
