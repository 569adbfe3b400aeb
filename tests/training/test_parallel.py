"""Losses and gradients of every decoder family on meshes of eight devices are those of one device.

Every family meets every mesh; the quick tests are a selection in which each family and each mesh occurs. All is
float32; what differs is the order of sums: losses agree to 1e-5 relative, each gradient leaf to 2e-5 of its largest
entry (or of a thousandth of the largest of all, where that is more).
"""

import functools

import jax
import numpy as np
import pytest

from jaxlm.core import sharding, trees
from jaxlm.core.sharding import MeshConfig, make_mesh, use_mesh
from jaxlm.models import Decoder
from jaxlm.objectives import CausalLM
from jaxlm.objectives.base import StepContext
from jaxlm.testing import FAMILIES, tiny_config, tiny_decoder

LENGTH, ROWS = 16, 8

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=2, tensor=4),
    "sequence": MeshConfig(data=2, sequence=4),
    "fsdp, tensor": MeshConfig(data=1, fsdp=4, tensor=2),
    "data, fsdp, tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp, sequence, tensor": MeshConfig(data=1, fsdp=2, sequence=2, tensor=2),
    "fsdp, sequence": MeshConfig(data=1, fsdp=2, sequence=4),
}

# Switches that no family has, or none together.
SWITCHES = {
    **{family: (family, {}) for family in FAMILIES},
    "one key/value head": ("llama", {"num_kv_heads": 1}),
    "no positions, window everywhere": ("llama", {"position": "none", "window": 5}),
    "all biases": ("gpt2", {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "tie_embeddings": False}),
}

QUICK = (
    ("llama", "fsdp, sequence, tensor"),
    ("smollm2", "data"),
    ("qwen2", "tensor"),
    ("qwen3", "fsdp, tensor"),
    ("neox", "fsdp"),
    ("gpt2", "data, fsdp, tensor"),
    ("gemma", "fsdp, sequence"),
    ("gemma2", "data, fsdp, tensor"),
    ("gemma3", "sequence"),
    ("one key/value head", "fsdp, sequence, tensor"),
)
EVERY = [(name, mesh) for name in SWITCHES for mesh in MESHES]


@functools.cache
def model_and_params(name: str):
    family, changes = SWITCHES[name]
    return tiny_decoder(family, num_layers=3 if family in ("gemma2", "gemma3") else 2, **changes)


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, (ROWS, LENGTH + 1)).astype(np.int32)
    cut = rng.integers(1, LENGTH, (ROWS, 1))
    places = np.arange(LENGTH, dtype=np.int32)[None]
    return {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "loss_weights": rng.random((ROWS, LENGTH)).astype(np.float32),
        "segment_ids": 1 + (places >= cut).astype(np.int32),
        "positions": np.where(places >= cut, places - cut, places).astype(np.int32),
    }


def loss_and_gradients(name: str, mesh):
    model, params = model_and_params(name)
    objective, rules = CausalLM(model, z_loss=1e-4, chunk_length=8), model.config.sharding_rules(mesh)
    places = sharding.shardings(mesh, model.axes(), params, rules)

    def loss(params, batch):
        ctx = StepContext(None, None, 0, None, {})
        return objective.loss(params, batch, ctx, objective.totals(params, batch, ctx))[0]

    with use_mesh(mesh, rules):
        function = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places))
        value, grads = function(jax.device_put(params, places), sharding.shard_batch(mesh, batch()))
    return float(value), jax.device_get(grads)


@functools.cache
def on_one_device(name: str):
    return loss_and_gradients(name, make_mesh(MeshConfig(), jax.devices()[:1]))


def check(name: str, mesh: str) -> None:
    value, grads = loss_and_gradients(name, make_mesh(MESHES[mesh]))
    expected, expected_grads = on_one_device(name)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Biases of keys have no gradient (a softmax does not see them): what is computed is rounding alone.
    noise = 1e-3 * max(np.abs(y).max() for y in jax.tree.leaves(expected_grads))
    for (path, x), y in zip(trees.named_leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * max(np.abs(y).max(), noise), err_msg=path)


def test_the_selection_has_every_family_and_mesh():
    assert {family for family, _ in QUICK} >= set(FAMILIES)
    assert {mesh for _, mesh in QUICK} == set(MESHES)


@pytest.mark.parametrize(("name", "mesh"), QUICK)
def test_a_mesh_gives_losses_and_gradients_of_one_device(name, mesh):
    check(name, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh"), [case for case in EVERY if case not in QUICK])
def test_every_family_on_every_mesh(name, mesh):
    check(name, mesh)


def test_a_length_that_does_not_divide_stays_whole():
    # Fifteen tokens on four parts: attention falls back to the reference, chunks to neighbors.
    model = Decoder(tiny_config("llama", num_layers=1))
    params = model.init(jax.random.key(0))
    tokens = batch()["inputs"][:, :15]
    mesh = make_mesh(MESHES["sequence"])
    with use_mesh(mesh):
        found = jax.jit(model.apply)(params, tokens)
    np.testing.assert_allclose(found, jax.jit(model.apply)(params, tokens), atol=1e-5)
