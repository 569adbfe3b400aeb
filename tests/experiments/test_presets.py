"""Every preset of the main job is built and traced on a mesh of its own shape, nothing allocated."""

import jax
import numpy as np
import pytest

from experiments import pretrain
from jaxlm.core.sharding import MESH_AXES
from jaxlm.planning import abstract_batch


@pytest.mark.parametrize("name", sorted(pretrain.PRESETS))
def test_preset_traces(name):
    config = pretrain.PRESETS[name]
    if max(getattr(config.mesh, axis) for axis in MESH_AXES) > 8:  # as many devices as the tests have
        import dataclasses

        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=8))
    devices = jax.devices() if -1 not in [getattr(config.mesh, a) for a in MESH_AXES] else jax.devices()[:1]
    program = pretrain.make_program(config, devices)
    batch = abstract_batch(program.mesh, config.batch_size, config.data.sequence_length)
    state, metrics = program.step.trace(program.abstract_state, None, batch).out_info
    assert metrics["loss"][0].shape == ()
    before, after = jax.tree.leaves(program.abstract_state), jax.tree.leaves(state)
    assert [(x.shape, x.dtype) for x in after] == [(x.shape, x.dtype) for x in before]
    assert np.isfinite(config.optimizer.schedule(config.steps)(config.steps // 2))
