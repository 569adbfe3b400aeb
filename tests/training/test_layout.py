"""Where a training state lies, and what a step sends: what the layout implies, and nothing more."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxlm.core import trees
from jaxlm.core.sharding import MeshConfig, batch_sharding, make_mesh
from jaxlm.models import Decoder
from jaxlm.models.presets import preset
from jaxlm.objectives import CausalLM
from jaxlm.optim import OptimizerConfig
from jaxlm.planning import hlo
from jaxlm.planning.plan import shard_bytes
from jaxlm.testing import tiny_config
from jaxlm.training import Program

FSDP = MeshConfig(data=1, fsdp=8)
# Sizes that are like no others, so that an array's shape tells what it is.
VOCAB, ROWS, LENGTH = 496, 8, 32


def program(mesh: MeshConfig, model: Decoder, optimizer: str = "adamw") -> Program:
    tx = OptimizerConfig(name=optimizer).make(4, model.axes())
    # One chunk of logits: each chunk adds up the head's gradient over the devices.
    return Program(model, CausalLM(model, chunk_length=LENGTH), tx, make_mesh(mesh))


def total_bytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def largest_replicated(tree, count: int = 5) -> list[tuple[int, str, tuple[int, ...]]]:
    """`(bytes, path, shape)` of the largest arrays that every device holds whole."""
    found = [
        (math.prod(x.shape) * x.dtype.itemsize, path, x.shape)
        for path, x in trees.named_leaves(tree)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and x.sharding.is_fully_replicated
    ]
    return sorted(found, reverse=True)[:count]


def test_a_device_holds_an_eighth_of_parameters_and_optimizer_state():
    state = program(FSDP, Decoder(preset("smollm2-135m"))).abstract_state
    whole = total_bytes((state.trainable, state.opt_state))
    assert whole > 3 * 4 * 134e6
    # What every device holds whole: the scales of norms and their moments.
    assert shard_bytes((state.trainable, state.opt_state)) <= whole / 8 + 3 * 4 * 61 * 576 + 100
    # The plan is what a real state is.
    small = program(FSDP, Decoder(tiny_config("llama")))
    real = small.init(0)
    for (path, x), y in zip(trees.named_leaves(real), jax.tree.leaves(small.abstract_state), strict=True):
        assert x.addressable_shards[0].data.shape == y.sharding.shard_shape(y.shape), path
        assert len(x.addressable_shards) == 8


@pytest.mark.parametrize("family", ["smollm2-135m", "gpt2", "gemma-3-1b"])
def test_nothing_large_is_replicated(family):
    config = preset(family)
    state = program(FSDP, Decoder(config)).abstract_state
    for size, path, shape in largest_replicated(state):
        # Norms, biases and counters; the widest is a bias of the feed-forward layer.
        assert len(shape) <= 2, (path, shape)
        assert size <= 4 * config.num_layers * max(config.mlp_dim, config.embed_dim), (path, shape)
        assert "kernel" not in path, (path, shape)
        assert "table" not in path, (path, shape)


def test_a_kernel_that_is_replicated_would_be_found():
    state = program(FSDP, Decoder(tiny_config("llama"))).abstract_state
    other = program(MeshConfig(data=8), Decoder(tiny_config("llama"))).abstract_state
    whole = jax.tree.map(lambda x: x.sharding, other)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, whole)
    assert "kernel" in largest_replicated(state)[0][1]


def compiled_step(mesh: MeshConfig) -> tuple[hlo.Costs, str, Decoder]:
    model = Decoder(tiny_config("llama", num_layers=3, vocab_size=VOCAB, num_kv_heads=4))
    made = program(mesh, model)
    dtypes = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), jnp.int32) | {"loss_weights": jnp.float32}
    place = batch_sharding(made.mesh, 2)
    batch = {name: jax.ShapeDtypeStruct((ROWS, LENGTH), d, sharding=place) for name, d in dtypes.items()}
    text = made.step.lower(made.abstract_state, None, batch).compile().as_text()
    return hlo.analyze(text), text, model


def sent(costs: hlo.Costs, *kinds: str) -> float:
    return sum(c.payload for c in costs.collectives if c.kind in kinds)


def arrays_sent(text: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays that collectives give."""
    kinds = "|".join(hlo.KINDS)
    lines = re.findall(rf"^\s+(?:ROOT )?%?\S+ = (.*?) (?:{kinds})(?:-start)?\(", text, re.MULTILINE)
    dims = [d for line in lines for d in re.findall(r"[a-z]\w*\[([\d,]*)\]", line)]
    return {tuple(int(n) for n in d.split(",") if n) for d in dims}


# Sums of metrics, the norm of the gradient, and the like.
FEW = 2048


def test_data_parallelism_sends_each_gradient_once():
    costs, _, model = compiled_step(MeshConfig(data=8))
    assert {(c.kind, c.group) for c in costs.collectives} == {("all-reduce", 8)}
    parameters = total_bytes(model.abstract_params())
    assert parameters <= sent(costs, "all-reduce") <= parameters + FEW


def test_fsdp_gathers_weights_forward_and_backward_and_reduces_gradients_once():
    costs, _, model = compiled_step(FSDP)
    params = model.abstract_params()
    matrices = sum(total_bytes(x) for path, x in trees.named_leaves(params["blocks"]) if "norm" not in path)
    ends = total_bytes((params["embedding"], params["head"]))
    # The table and the head are gathered once: their results serve the backward pass.
    assert sent(costs, "all-gather") == 2 * matrices + ends
    # XLA's CPU backend reduces whole and slices then, where accelerators scatter: the payload is the same.
    parameters = total_bytes(params)
    assert parameters <= sent(costs, "all-reduce", "reduce-scatter") <= parameters + FEW
    assert {c.kind for c in costs.collectives} <= {"all-gather", "all-reduce", "reduce-scatter"}


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, tensor=4), MeshConfig(data=1, fsdp=4, tensor=2)], ids=str)
def test_tensor_parallelism_gathers_neither_logits_nor_a_whole_vocabulary(mesh):
    costs, text, model = compiled_step(mesh)
    assert not [shape for shape in arrays_sent(text) if VOCAB in shape]
    matrices = total_bytes(model.abstract_params())
    # Weights are gathered over fsdp alone: each device's part of the tensor axis, at most twice.
    assert sent(costs, "all-gather") <= (2 * matrices / mesh.tensor if mesh.fsdp > 1 else 0)


def test_context_parallelism_sends_keys_and_values_and_no_logits():
    costs, text, model = compiled_step(MeshConfig(data=2, sequence=4))
    assert not [shape for shape in arrays_sent(text) if VOCAB in shape and len(shape) > 2]
    rows, part = ROWS // 2, LENGTH // 4
    # Segment ids are gathered once for all layers of a pass.
    assert sent(costs, "all-gather") == 2 * 4 * rows * LENGTH
    assert not sent(costs, "all-to-all")
    parameters = total_bytes(model.abstract_params())
    # Gradients are added up along the length, then over the batch: once over each axis of the mesh.
    assert sent(costs, "all-reduce") <= 2 * parameters + FEW
    # Three times round in a step (forward, again, backward), three neighbors each: keys and values.
    once = 4 * rows * part * 2 * model.config.embed_dim
    assert sent(costs, "collective-permute") == model.config.num_layers * 3 * 3 * once


def test_the_shapes_of_collectives_are_read():
    reduce = "  %a = (f32[496,32]{1,0}, f32[]) all-reduce(%x, %y), to_apply=%add"
    text = f"{reduce}\n  %b = f32[8,32,496]{{2,1,0}} all-gather-start(%x)"
    assert arrays_sent(text) == {(496, 32), (), (8, 32, 496)}
