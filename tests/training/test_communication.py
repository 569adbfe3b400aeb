"""Gradients added up in few bits over eight devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlm.core.errors import ConfigError
from jaxlm.core.policies import PrecisionConfig, PrecisionPolicy
from jaxlm.core.scaled import Quantizer
from jaxlm.core.sharding import MeshConfig, make_mesh, use_mesh
from jaxlm.models import Decoder
from jaxlm.objectives import CausalLM
from jaxlm.optim import adamw
from jaxlm.planning import hlo
from jaxlm.testing import tiny_config
from jaxlm.training import Program, init_state, make_step
from jaxlm.training.communication import accumulate_in_few_bits, all_reduce

MODEL = Decoder(tiny_config("llama", num_layers=1))


def reduced(x, quantizer):
    """`[devices, ...]` added up over devices; the result on each of them."""
    mesh = make_mesh(MeshConfig(data=8))
    spec = PartitionSpec("data")
    function = lambda x: all_reduce(x[0], "data", quantizer)[None]  # noqa: E731
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)), x


@pytest.mark.parametrize(("name", "error"), [("int8", 0.01), ("e4m3", 0.05), ("bfloat16", 0.005)])
def test_the_sum_is_near_and_the_same_everywhere_and_is_sent_narrow(name, error):
    x = jax.random.normal(jax.random.key(0), (8, 37, 29)) * jnp.exp2(jnp.arange(8.0) - 4)[:, None, None]
    function, x = reduced(x, PrecisionConfig(communication=name).policy().communication)
    found, exact = function(x), np.asarray(x, np.float64).sum(0)
    assert np.linalg.norm(found[0] - exact) / np.linalg.norm(exact) < error
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    text = function.lower(x).as_text()
    sent = [line for line in text.splitlines() if "all_to_all" in line or "all_gather" in line]
    entries = -(-37 * 29 // (8 * 128)) * 8 * 128 if name != "bfloat16" else -(-37 * 29 // 8) * 8
    size = {"int8": entries + entries // 128 * 4, "e4m3": entries + entries // 128 * 4, "bfloat16": 2 * entries}[name]
    # One message each way: to each of eight devices its part, and that part, added up, to all.
    assert [f"tensor<8x{size // 8}xui8>" in line for line in sent] == [True, True]


def test_a_tree_travels_as_one_message_and_gives_what_its_arrays_give():
    quantizer = PrecisionConfig(communication="int8").policy().communication
    a, b = jax.random.normal(jax.random.key(0), (8, 9, 33)), jax.random.normal(jax.random.key(1), (8, 300))
    spec, mesh = PartitionSpec("data"), make_mesh(MeshConfig(data=8))

    def both(a, b):
        return jax.tree.map(lambda x: x[None], all_reduce({"a": a[0], "b": b[0]}, "data", quantizer))

    function = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False))
    found = function(a, b)
    for name, x in (("a", a), ("b", b)):
        alone, x = reduced(x, quantizer)
        np.testing.assert_array_equal(found[name], alone(x))
    text = function.lower(a, b).as_text()
    assert text.count('"stablehlo.all_to_all"') == text.count('"stablehlo.all_gather"') == 1


def program(policy, mesh=None):
    mesh = mesh or make_mesh(MeshConfig(data=8))
    return Program(MODEL, CausalLM(MODEL), adamw(1e-2, axes=MODEL.axes()), mesh, policy=policy)


def batch(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 64, (8, 17)).astype(np.int32)
    weights = rng.random((8, 16)).astype(np.float32)  # devices have unequal weight
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": weights}


def test_training_is_near_the_exact_one():
    runs = {}
    for name, policy in (("exact", PrecisionPolicy()), ("int8", PrecisionConfig(communication="int8").policy())):
        p = program(policy)
        state, seen = p.init(0), []
        for i in range(3):
            state, metrics = p.step(state, None, p.put(batch(i)))
            seen.append([float(s / w) for s, w in (metrics["loss"], metrics["grad_norm"])])
        runs[name] = np.array(seen)
    # One after the other: totals, each device's part of the gradients, sums with losses and metrics.
    p = program(PrecisionConfig(communication="int8").policy())
    text = p.step.lower(p.abstract_state, None, p.put(batch(0))).compile().as_text()
    assert re.findall(rf" ({'|'.join(hlo.KINDS)})(?:-start)?\(", text) == ["all-reduce", "all-to-all", "all-gather"]
    assert runs["int8"][0, 0] == pytest.approx(runs["exact"][0, 0], rel=1e-5)  # totals are those of all devices
    np.testing.assert_allclose(runs["int8"], runs["exact"], rtol=0.02)
    assert not np.array_equal(runs["int8"], runs["exact"])


class Counting:
    """`CausalLM`, which counts tokens in `extra`."""

    totals = staticmethod(CausalLM(MODEL).totals)

    def loss(self, params, batch, ctx, totals):
        value, aux = CausalLM(MODEL).loss(params, batch, ctx, totals)
        return value, dataclasses.replace(aux, extra=ctx.extra + totals["tokens"])


def test_what_each_device_would_change_by_itself_is_refused():
    quantizer = PrecisionConfig(communication="int8").policy().communication
    tx = adamw(1e-2, axes=MODEL.axes())
    step = make_step(Counting(), tx, gradients=functools.partial(accumulate_in_few_bits, quantizer=quantizer))
    state = init_state(MODEL.init(jax.random.key(0))["params"], tx, jax.random.key(1), extra=jnp.zeros(()))
    one_device = jax.jit(step)(state, None, batch(0))[0]
    assert float(one_device.extra) == pytest.approx(batch(0)["loss_weights"].sum())
    with use_mesh(make_mesh(MeshConfig(data=8))), pytest.raises(ConfigError, match="the objective changes its extra"):
        jax.jit(step)(state, None, batch(0))


def test_sharded_weights_are_refused():
    policy = dataclasses.replace(PrecisionPolicy(), communication=Quantizer("int8", (1, 128)))
    with pytest.raises(ConfigError, match=r"over mesh.data alone, but the mesh has \{'fsdp': 4\}"):
        _ = program(policy, make_mesh(MeshConfig(data=2, fsdp=4))).recipe
    state = init_state({}, adamw(1e-2, axes={}), jax.random.key(0))
    with use_mesh(make_mesh(MeshConfig(data=1, fsdp=8))), pytest.raises(ConfigError, match=r"\{'fsdp': 8\}"):
        accumulate_in_few_bits(None, None, state, None, batch(0), quantizer=policy.communication)
