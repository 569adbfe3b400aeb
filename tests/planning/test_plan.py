"""A small program planned for a TPU: bytes against arithmetic, what does not fit, the roofline in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.core.sharding import MeshConfig, make_mesh
from jaxlm.planning import CHIPS, Collective, Costs, Memory, Plan, find_topology, make_plan, parse_refusal, shard_bytes
from jaxlm.planning.plan import estimate


def planned(rows, width=1024):
    topology = find_topology("v5e:2x2")
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), topology.devices)
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp", None)))
    w = jax.ShapeDtypeStruct((width, width), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    lowered = jax.jit(lambda w, x: (w, jnp.sum(jnp.tanh(x @ w))), donate_argnums=0).lower(w, x)
    flops = 2 * rows * width**2
    arguments = {"parameters": w, "batch": x}
    return make_plan(lowered, topology, arguments, model_flops=flops, executed_flops=flops)


def test_bytes_a_chip_are_those_of_the_arithmetic():
    plan = planned(2048)
    weights, batch = 1024 * 1024 * 4 / 4, 2048 * 1024 * 4 / 4
    assert plan.kinds == {"parameters": weights, "batch": batch}
    memory = plan.memory
    assert memory.arguments == weights + batch
    assert memory.aliased == weights
    assert memory.total == memory.arguments + memory.outputs + memory.temporaries - memory.aliased
    assert plan.fits
    assert plan.model_flops == 2 * 2048 * 1024**2 / 4
    assert {c.kind for c in plan.costs.collectives} >= {"all-gather"}
    assert plan.costs.bytes_moved >= weights + batch
    assert plan.times.compiler > 0


def test_what_does_not_fit_has_the_compilers_own_figure():
    plan = planned(32 << 20)
    assert not plan.fits
    assert plan.memory is None
    assert "memory" in plan.refusal
    assert plan.needed > plan.limit
    assert plan.limit == pytest.approx(15.75 * 2**30, rel=0.01)


def test_messages_of_the_compiler():
    old = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 25.50G of 15.75G hbm. Exceeded by 9.75G."
    new = "Ran out of memory on HBM, total memory for HLO temporaries (18.84G) exceeds available HBM (512.0M)."
    assert parse_refusal(old) == (25.5 * 2**30, 15.75 * 2**30)
    assert parse_refusal(new) == (18.84 * 2**30, 512 * 2**20)
    assert parse_refusal("something else") == (None, None)


def test_the_roofline_is_the_slowest_of_three():
    chip = CHIPS["v5p"]
    costs = Costs((Collective("all-reduce", 4, 1, 600e9),), bytes_moved=2765e9 * 3, cycles=3.5e9, guessed_loops=0)
    times = estimate(chip, 459e12 * 2, costs)
    assert (times.compute, times.memory, times.network, times.compiler) == (2.0, 3.0, 1.5, 2.0)
    assert times.roofline == 3.0


def test_a_compiler_that_refuses_nothing_is_not_believed():
    memory = Memory({}, arguments=100e9, outputs=0, temporaries=50e9, aliased=0, peak=None)
    plan = Plan("h200", CHIPS["h200"], 1, {}, 0.0, 0.0, 0.0, memory=memory)
    assert not plan.fits
    assert dataclasses.replace(plan, memory=dataclasses.replace(memory, temporaries=40e9)).fits


def test_keys_and_whole_arrays_count_in_full():
    mesh = make_mesh(MeshConfig())
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    half = jax.ShapeDtypeStruct((16, 3), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("data")))
    assert shard_bytes({"key": key, "half": half}) == 8 + 2 * 3 * 2
