"""Decoding through the TPU kernel: interpreted against the reference, and compiled for chips that are not here."""

import dataclasses
import functools
import importlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError
from jaxlm.core.precision import BFLOAT16, Precision
from jaxlm.decoding import DecoderStepper
from jaxlm.layers import Filled, KeyValues, Visible, attend
from jaxlm.models import Decoder
from jaxlm.testing import tiny_config, tiny_decoder
from pallas_kernels.attention import flash_decode
from tests.pallas_kernels import absent_tpu

PROMPTS = np.random.default_rng(0).integers(0, 64, (3, 9)).astype(np.int32)
LENGTHS = np.array([9, 1, 6], np.int32)


@pytest.fixture
def interpreted(monkeypatch):
    # `jaxlm.layers.attend` as an attribute is the function.
    module = importlib.import_module("jaxlm.layers.attend")
    monkeypatch.setattr(module, "flash_decode", functools.partial(flash_decode, interpret=True, block=128))


@pytest.mark.parametrize(
    ("family", "count", "shared", "precision", "tolerance"),
    [
        ("llama", 1, False, Precision(), 2e-5),
        ("gemma2", 3, False, Precision(), 2e-5),  # windows and soft caps
        ("gemma2", 1, True, Precision(), 2e-5),
        ("llama", 3, True, Precision(activations="bfloat16", matmul="float32"), 3e-2),  # the kernel casts the cache
    ],
)
def test_the_kernel_continues_as_the_reference_does(interpreted, family, count, shared, precision, tolerance):
    model, params = tiny_decoder(family, num_layers=2, head_dim=32, attention="reference", precision=precision)
    forced = Decoder(dataclasses.replace(model.config, attention="tpu"))
    more = np.random.default_rng(1).integers(0, 64, (3, count)).astype(np.int32)

    def run(decoder):
        start, stepper = DecoderStepper(model, shared), DecoderStepper(decoder, shared)

        @jax.jit
        def continued(params):
            carry = start.init(params, 3, 24)
            _, carry = start.step(params, carry, PROMPTS, LENGTHS)
            return stepper.step(params, carry, more)[0]

        return str(continued.trace(params).jaxpr), continued(params)

    (text, got), (plain, expected) = run(forced), run(model)
    assert "decode_kernel" in text
    assert "decode_kernel" not in plain
    np.testing.assert_allclose(got, expected, atol=tolerance)


def test_gradients_through_the_kernel_are_the_references(interpreted):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 2, heads, 32)), jnp.float32) for heads in (4, 2, 2))
    cache = [jnp.asarray(rng.normal(size=(3, 2, 9, 32)), jnp.float32) for _ in range(2)]
    ends = jnp.asarray(LENGTHS)
    filled = Filled(jnp.broadcast_to(np.arange(9) < LENGTHS[:, None, None], (3, 2, 9)), ends)

    def gradients(implementation):
        def loss(q, k, v, cache):
            sources = KeyValues(*cache, filled, heads_first=True), KeyValues(k, v, Visible())
            return jnp.sum(jnp.sin(attend(q, sources, scale=0.3, implementation=implementation)))

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, cache)

    chex.assert_trees_all_close(gradients("tpu"), gradients("reference"), atol=1e-5)


def step_for(config, batch, capacity, tokens=1):
    """A decode step of a model, and the shapes of its arguments."""
    model = Decoder(config)
    stepper = DecoderStepper(model)
    params = model.abstract_params()
    carry = jax.eval_shape(lambda: stepper.init(None, batch, capacity))
    carry = dataclasses.replace(carry, empty=False)
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32)
    return model, (lambda params, carry, ids: stepper.step(params, carry, ids, last_only=True)), (params, carry, ids)


SMALL = {"num_layers": 2, "embed_dim": 256, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "precision": BFLOAT16}


def test_a_decode_step_compiles_for_a_tpu_with_the_kernel_in_it():
    _, step, shapes = step_for(tiny_config("gemma2", **SMALL), batch=8, capacity=1024)
    mesh = sharding.make_mesh(devices=absent_tpu.devices("v5e")[:1])
    with sharding.use_mesh(mesh), absent_tpu.no_disk_cache():
        whole = NamedSharding(mesh, PartitionSpec())
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
        text = jax.jit(step).lower(*shapes).compile().as_text()
    assert "decode_kernel" in text
    assert 'custom_call_target="tpu_custom_call"' in text


def test_on_a_mesh_each_chip_reads_its_rows_and_heads():
    model, step, shapes = step_for(tiny_config("llama", **SMALL), batch=8, capacity=1024)
    config = sharding.MeshConfig(data=2, tensor=2)
    mesh = sharding.make_mesh(config, absent_tpu.devices("v5e"))
    params, carry, ids = shapes
    where = sharding.shardings(mesh, model.axes(), params)
    cache = NamedSharding(mesh, PartitionSpec(None, "data", "tensor"))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def place(tree, where):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            where if not isinstance(where, NamedSharding) else jax.tree.map(lambda _: where, tree),
        )

    with sharding.use_mesh(mesh), absent_tpu.no_disk_cache():
        carry = dataclasses.replace(
            carry, k=place(carry.k, cache), v=place(carry.v, cache), index=place(carry.index, rows)
        )
        text = jax.jit(step).lower(place(params, where), carry, place(ids, rows)).compile().as_text()
    kernel = next(line for line in text.splitlines() if "decode_kernel" in line and "custom-call(" in line)
    assert "[4,2,1024,64]" in kernel.replace("bf16", "")  # half the rows, half the heads of a layer's cache


def test_a_cpu_keeps_the_plain_step():
    _, step, shapes = step_for(tiny_config("gemma2", **SMALL), batch=2, capacity=64)
    assert "pallas_call" not in str(jax.make_jaxpr(step)(*shapes))


def test_forced_where_it_cannot_run_says_why():
    model, _, (params, carry, ids) = step_for(tiny_config("llama", num_layers=1), batch=2, capacity=64)
    forced = DecoderStepper(Decoder(dataclasses.replace(model.config, attention="tpu")))
    with pytest.raises(ConfigError, match="'tpu' cannot compute this: its kernels are for tpu, and the arrays are on"):
        jax.eval_shape(forced.step, params, carry, ids)
