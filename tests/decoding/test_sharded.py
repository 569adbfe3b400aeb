"""Generation on a mesh of 8 devices gives what one device gives, with weights and cache divided among them."""

import jax
import numpy as np
import pytest

from jaxlm.core import sharding
from jaxlm.core.sharding import MeshConfig, make_mesh, use_mesh
from jaxlm.decoding import DecoderStepper, GenerationConfig, Generator, generate
from jaxlm.decoding.generate import start
from jaxlm.testing import tiny_decoder

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7], [1], [2, 2]]
CONFIG = GenerationConfig(max_new_tokens=8, top_p=0.9, repetition_penalty=1.2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mesh_config", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_a_mesh_gives_what_one_device_gives(mesh_config, shared):
    model, params = tiny_decoder(num_layers=2, num_heads=4, num_kv_heads=4)
    stepper = DecoderStepper(model, shared)
    expected = generate(stepper, params, PROMPTS, CONFIG)
    mesh = make_mesh(mesh_config)
    placed = jax.device_put(params, sharding.shardings(mesh, model.axes(), params))
    with use_mesh(mesh):
        state = start(Generator(stepper), placed, PROMPTS, CONFIG)
        found = generate(stepper, placed, PROMPTS, CONFIG)
    parts = [mesh_config.tensor, 8 if mesh_config.tensor == 1 else 4]
    layers, batch, heads, capacity, dim = state.carry.k.shape
    local = state.carry.k.addressable_shards[0].data.shape
    assert local == (layers, batch // parts[1], heads // parts[0], capacity, dim)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
