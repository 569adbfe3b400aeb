"""Updates of outlying gradients are left out, decided from state alone; without any, nothing changes to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.optim import OptimizerConfig, adamw, skip_spikes

AXES = {"w": ("embed", "mlp")}


def gradients(count, spikes=(), factor=20.0):
    rng = np.random.default_rng(0)
    out = rng.normal(size=(count, 4, 6)).astype(np.float32)
    for i in spikes:
        out[i] *= factor
    return [{"w": jnp.asarray(g)} for g in out]


def walk(tx, grads):
    """Parameters and state after each gradient."""
    params = {"w": jnp.ones((4, 6))}
    state, found = tx.init(params), []
    update = jax.jit(lambda g, s, p, step: tx.update(g, s, p, step=step))
    for step, g in enumerate(grads):
        updates, state = update(g, state, params, jnp.int32(step))
        params = optax.apply_updates(params, updates)
        found.append((np.asarray(params["w"]), state))
    return found


def bound(norms, deviations=6.0):
    """Written anew, in NumPy."""
    middle = np.median(norms)
    return middle + deviations * max(1.4826 * np.median(np.abs(norms - middle)), 0.1 * middle)


def test_spikes_are_skipped_and_the_rest_is_as_if_they_had_not_been():
    spikes = (3, 20, 21, 33)
    grads = gradients(40, spikes)
    found = walk(skip_spikes(adamw(0.1, axes=AXES), warmup=8, window=16), grads)
    norms = [float(optax.global_norm(g)) for g in grads]
    expected = [i >= 8 and norms[i] > bound(norms[max(0, i - 16) : i]) for i in range(40)]
    assert [bool(state.spike_skipped) for _, state in found] == expected
    assert [i for i in range(40) if expected[i]] == [20, 21, 33]  # nothing is known yet at 3
    assert int(found[-1][1].skipped) == 3
    plain = walk(adamw(0.1, axes=AXES), [g for i, g in enumerate(grads) if not expected[i]])
    np.testing.assert_array_equal(found[-1][0], plain[-1][0])


def test_without_spikes_not_a_bit_changes():
    found = walk(skip_spikes(adamw(0.1, axes=AXES), warmup=4, window=8), gradients(20))
    np.testing.assert_array_equal(found[-1][0], walk(adamw(0.1, axes=AXES), gradients(20))[-1][0])


def test_a_lasting_change_of_scale_is_followed():
    found = walk(skip_spikes(adamw(0.1, axes=AXES), warmup=4, window=16), gradients(60, range(30, 60)))
    flags = [bool(state.spike_skipped) for _, state in found]
    assert any(flags[30:36])
    assert not any(flags[30 + 9 :])


def test_the_step_reports_it():
    from jaxlm.objectives import Aux
    from jaxlm.training import init_state, make_step

    class Linear:
        def totals(self, params, batch, ctx):
            return {}

        def loss(self, params, batch, ctx, totals):
            value = jnp.sum(params["w"] * batch["x"])
            return value, Aux({"loss": (value, jnp.ones(()))})

    tx = skip_spikes(optax.sgd(1.0), warmup=2, window=4)
    state = init_state({"w": jnp.zeros(3)}, tx, jax.random.key(0))
    step, flags = jax.jit(make_step(Linear(), tx)), []
    for size in (1.0, 1.0, 1.1, 50.0, jnp.nan, 1.0):
        state, metrics = step(state, None, {"x": jnp.full(3, size)})
        flags.append((float(metrics["spike_skipped"][0]), float(metrics["skipped"][0])))
    assert flags == [(0, 0), (0, 0), (0, 0), (1, 0), (0, 1), (0, 0)]
    np.testing.assert_allclose(state.trainable["w"], -4.1 * np.ones(3), rtol=1e-6)


def test_its_state_lies_on_a_mesh_like_that_of_the_optimizer_inside():
    from jaxlm.core.sharding import MeshConfig, make_mesh
    from jaxlm.models import Decoder, DecoderConfig
    from jaxlm.objectives import CausalLM
    from jaxlm.training import Program

    model = Decoder(DecoderConfig(vocab_size=64, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=32, max_length=8))
    tx = OptimizerConfig(skip_spikes=6.0).make(10, model.axes())
    places = Program(model, CausalLM(model), tx, make_mesh(MeshConfig(data=1, fsdp=8))).shardings.opt_state
    plain = OptimizerConfig().make(10, model.axes())
    expected = Program(model, CausalLM(model), plain, make_mesh(MeshConfig(data=1, fsdp=8))).shardings.opt_state
    assert jax.tree.leaves(places.inner) == jax.tree.leaves(expected)
    assert all(place.is_fully_replicated for place in (places.norms, places.seen, places.skipped))


def test_it_is_a_setting_and_bad_ones_are_named():
    state = OptimizerConfig(skip_spikes=6.0).make(10, AXES).init({"w": jnp.ones((4, 6))})
    assert state.norms.shape == (128,)
    with pytest.raises(ConfigError, match="skip_spikes is -1"):
        OptimizerConfig(skip_spikes=-1)
    with pytest.raises(ConfigError, match="deviations is 0"):
        skip_spikes(optax.sgd(1.0), 0)
    with pytest.raises(ConfigError, match="warmup is 9, expected from 2 to the window of 8"):
        skip_spikes(optax.sgd(1.0), warmup=9, window=8)
