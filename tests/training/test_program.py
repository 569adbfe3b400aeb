"""The same training on one device and on meshes of eight: data, FSDP, tensor, sequence and mixed parallel."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.core.sharding import MeshConfig, make_mesh
from jaxlm.models import Decoder
from jaxlm.objectives import CausalLM
from jaxlm.optim import OptimizerConfig
from jaxlm.testing import tiny_config
from jaxlm.training import Checkpoints, Program

MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "tensor": MeshConfig(data=2, tensor=4),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence": MeshConfig(data=2, sequence=2, tensor=2),
}
STEPS = 4


def program(mesh, micro_batches=1, optimizer="adamw"):
    model = Decoder(tiny_config("llama", num_layers=2))
    tx = OptimizerConfig(name=optimizer, learning_rate=0.01).make(STEPS, model.axes())
    return Program(model, CausalLM(model, z_loss=1e-4, chunk_length=8), tx, mesh, micro_batches)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        ids = rng.integers(0, 64, (8, 17)).astype(np.int32)
        segments = 1 + (np.arange(16)[None] >= rng.integers(1, 16, (8, 1))).astype(np.int32)
        yield {
            "inputs": ids[:, :-1],
            "targets": ids[:, 1:],
            "loss_weights": rng.random((8, 16)).astype(np.float32),
            "segment_ids": segments,
            "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16)).copy(),
        }


def run(program):
    state, losses = program.init(seed=3), []
    for batch in batches():
        state, metrics = program.step(state, None, program.put(batch))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    return state, np.array(losses)


@pytest.fixture(scope="module")
def expected():
    return run(program(one_device()))


@pytest.mark.parametrize("name", sorted(MESHES))
def test_every_mesh_gives_the_losses_of_one_device(name, expected):
    state, losses = run(program(make_mesh(MESHES[name]), micro_batches=2 if name == "tensor" else 1))
    np.testing.assert_allclose(losses, expected[1], rtol=1e-5)
    # Adam divides small gradients by their size, which magnifies rounding where they are close to zero.
    for a, b in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(expected[0].trainable), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=2e-4)


def test_the_start_is_the_same_on_every_mesh():
    # To the last bit on jax 0.10; since then the compiler vectorizes parts of an array differently from the whole.
    expected = program(one_device()).init(3).trainable
    for config in MESHES.values():
        got = program(make_mesh(config)).init(3).trainable
        chex.assert_trees_all_close(jax.device_get(got), jax.device_get(expected), atol=1e-8)


def test_state_is_sharded_with_its_optimizer():
    state = program(make_mesh(MESHES["fsdp"])).init(0)
    kernel = state.trainable["blocks"][0]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 4, 48)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert len(moments) >= 2
    assert {m.addressable_shards[0].data.shape for m in moments} == {(2, 4, 48)}


@pytest.mark.parametrize("target", ["one", "tensor"])
def test_a_checkpoint_of_one_mesh_goes_on_on_another(target, tmp_path, expected):
    first = program(make_mesh(MESHES["fsdp"]))
    state, data = first.init(3), list(batches())
    for batch in data[:2]:
        state, _ = first.step(state, None, first.put(batch))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, state, {})
    checkpoints.wait()
    second = program(one_device() if target == "one" else make_mesh(MESHES["tensor"]))
    state = checkpoints.restore(second.abstract_state).state
    checkpoints.close()
    losses = []
    for batch in data[2:]:
        state, metrics = second.step(state, None, second.put(batch))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    np.testing.assert_allclose(losses, expected[1][2:], rtol=1e-5)


def test_muon_runs_sharded(expected):
    mesh = make_mesh(MESHES["mixed"])
    alone, together = run(program(one_device(), optimizer="muon")), run(program(mesh, optimizer="muon"))
    np.testing.assert_allclose(together[1], alone[1], rtol=1e-4)
    assert not np.allclose(alone[1], expected[1], rtol=1e-4)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="batch of 12 rows is not divisible by 8"):
        program(make_mesh(MESHES["data"])).check_batch(12)
    with pytest.raises(ConfigError, match="num_heads 4 is not divisible by mesh.tensor 8"):
        program(make_mesh(MeshConfig(data=1, tensor=8))).init(0)


def test_few_key_value_heads_are_replicated():
    model = Decoder(tiny_config("llama", num_layers=2, num_kv_heads=1))
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    sharded = Program(model, CausalLM(model), OptimizerConfig().make(2, model.axes()), mesh)
    state = sharded.init(0)
    attention = state.trainable["blocks"][0]["attention"]
    assert attention["key"]["kernel"].addressable_shards[0].data.shape == (2, 32, 8)
    assert attention["query"]["kernel"].addressable_shards[0].data.shape == (2, 32, 8)
    batch = next(batches())
    got = sharded.step(state, None, sharded.put(batch))[1]["loss"][0]
    alone = Program(model, CausalLM(model), OptimizerConfig().make(2, model.axes()), one_device())
    np.testing.assert_allclose(got, alone.step(alone.init(0), None, alone.put(batch))[1]["loss"][0], rtol=1e-5)


def test_tracing_allocates_nothing():
    big = Decoder(tiny_config("llama", embed_dim=8192, num_heads=4, mlp_dim=65_536, vocab_size=1_000_000))
    plan = Program(big, CausalLM(big), OptimizerConfig().make(2, big.axes()), make_mesh(MESHES["mixed"]))
    batch = {name: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)) for name, x in next(batches()).items()}
    _, metrics = plan.step.trace(plan.abstract_state, None, batch).out_info
    assert metrics["loss"][0].shape == ()
