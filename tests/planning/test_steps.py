"""Every kind of step, lowered from shapes for devices that are here: the bytes of its arguments by arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression import QuantizeConfig, abstract_quantize, quantize
from jaxlm.core.errors import ConfigError
from jaxlm.core.precision import BFLOAT16
from jaxlm.core.sharding import MeshConfig, make_mesh
from jaxlm.models import Decoder
from jaxlm.models.config import DecoderConfig
from jaxlm.models.flops import forward_flops_per_token
from jaxlm.objectives import CausalLM
from jaxlm.optim.config import OptimizerConfig
from jaxlm.peft.lora import LoraConfig, add_lora
from jaxlm.planning import abstract_batch, adapter_step, decode_step, policy_step, shard_bytes, train_step
from jaxlm.training import Program

CONFIG = DecoderConfig(
    vocab_size=64, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, max_length=32, precision=BFLOAT16
)
MODEL, OPTIMIZER = Decoder(CONFIG), OptimizerConfig()
PARAMETERS = sum(x.size for x in jax.tree.leaves(MODEL.abstract_params()))
KERNELS = 2 * (4 * 32 * 32 + 3 * 32 * 64)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])


def bytes_of(step):
    return {name: shard_bytes(tree) for name, tree in step.arguments.items()}


def test_training_and_decoding(mesh):
    program = Program(MODEL, CausalLM(MODEL), OPTIMIZER.make(10, MODEL.axes()), mesh)
    step = train_step(program, abstract_batch(mesh, 8, 16))
    found = bytes_of(step)
    assert 2 * found["parameters"] <= found["optimizer state"] < 2.01 * found["parameters"]  # and counters
    assert found["batch"] == 5 * 8 * 16 * 4 / 4
    assert step.model_flops == 3 * 8 * 16 * forward_flops_per_token(CONFIG, 16)

    step = decode_step(program, batch_size=8, length=16)
    keys_and_values = 2 * 2 * 8 * 32 * 16 * 2 / 4
    assert keys_and_values <= bytes_of(step)["cache"] < 1.01 * keys_and_values  # and places


def test_a_policy_step_has_a_reference_in_bfloat16_and_advantages(mesh):
    step = policy_step(MODEL, OPTIMIZER, mesh, batch_size=32, length=16, members=4, micro_batches=2)
    found = bytes_of(step)
    assert found["reference"] == found["parameters"] / 2
    assert found["batch"] == (6 * 32 * 16 * 4 + 32 * 4) / 4
    assert step.model_flops == 4 * 32 * 16 * forward_flops_per_token(CONFIG, 16)
    assert step.lowered.compile() is not None
    with pytest.raises(ConfigError, match="32 samples is not divisible by 5 samples a prompt"):
        policy_step(MODEL, OPTIMIZER, mesh, batch_size=32, length=16, members=5)
    with pytest.raises(ConfigError, match="batch of 2 rows"):
        policy_step(MODEL, OPTIMIZER, mesh, batch_size=8, length=16, members=4)


@pytest.mark.parametrize("packed", [None, QuantizeConfig(bits=4, group=32)])
def test_adapters_alone_are_trained_over_a_base_in_bfloat16_or_packed(mesh, packed):
    step = adapter_step(
        MODEL, OPTIMIZER, mesh, batch_size=8, length=16, lora=LoraConfig(rank=2), quantize=packed
    )
    trained = sum(x.size for x in jax.tree.leaves(step.arguments["parameters"]))
    assert trained == 2 * 2 * (4 * (32 + 32) + 3 * (32 + 64))
    frozen = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(step.arguments["frozen"]))
    in_blocks = 2 * KERNELS if packed is None else KERNELS / 2 + 2 * KERNELS / 32
    assert frozen == 2 * (PARAMETERS - KERNELS) + in_blocks
    assert step.lowered.compile() is not None


@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(),
        QuantizeConfig(bits=4, group=16, symmetric=False),
        QuantizeConfig(group=32, embeddings=True, skip=("*/query/kernel",)),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_abstract_quantization_has_the_shapes_of_the_real_one(config, adapted):
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), MODEL.abstract_params())
    params = add_lora(jax.random.key(0), params, LoraConfig(rank=2)) if adapted else params
    found, expected = abstract_quantize(params, config, MODEL.axes()), quantize(params, config, MODEL.axes())
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(found)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(expected)
    ]
