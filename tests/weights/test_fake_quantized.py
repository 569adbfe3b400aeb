"""Straight-through gradients against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import weights
from jaxlm.core.errors import ConfigError
from jaxlm.models import Decoder
from jaxlm.testing import tiny_config
from jaxlm.weights import LearnedStep, fake_quant, learn_steps, learned_step_quant, straight_through

W = jnp.array([-3.0, -1.6, -0.26, 0.0, 0.24, 0.7, 1.5, 9.0])


def test_fake_quant_rounds_and_has_gradient_1_inside_and_0_outside():
    np.testing.assert_allclose(fake_quant(W, 0.5, 3), [-1.5, -1.5, -0.5, 0, 0, 0.5, 1.5, 1.5])
    gradient = jax.grad(lambda w: jnp.sum(fake_quant(w, 0.5, 3) * jnp.arange(1.0, 9)))(W)
    np.testing.assert_array_equal(gradient, [0, 0, 3, 4, 5, 6, 7, 0])


def test_straight_through_takes_the_value_of_one_and_the_gradient_of_the_other():
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(straight_through(x**2, jnp.round(x))))(W)
    assert value == jnp.sum(jnp.round(W))
    np.testing.assert_array_equal(gradient, 2 * W)


def test_learned_steps_have_the_papers_gradient():
    step, bits = jnp.float32(0.5), 3
    dw, ds = jax.grad(lambda w, s: jnp.sum(learned_step_quant(w, s, bits)), argnums=(0, 1))(W, step)
    v = np.asarray(W) / 0.5
    inside = (v >= -4) & (v <= 3)
    np.testing.assert_array_equal(dw, inside.astype(np.float32))
    # Equation 3 of the paper, times its gradient scale.
    by_entry = np.where(inside, np.round(v) - v, np.where(v < -4, -4, 3))
    np.testing.assert_allclose(ds, by_entry.sum() / np.sqrt(len(v) * 3), rtol=1e-5)
    np.testing.assert_allclose(learned_step_quant(W, step, bits), np.clip(np.round(v), -4, 3) * 0.5)


def test_learned_steps_in_a_model_train_both():
    model = Decoder(tiny_config("llama", num_layers=2))
    params = learn_steps(model.init(jax.random.key(0))["params"], ["blocks/0/mlp/up/kernel"], bits=4)
    up = params["blocks"][0]["mlp"]["up"]["kernel"]
    assert isinstance(up, LearnedStep)
    assert up.step.shape == (2,)
    ids = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, ids) ** 2)))(params)
    found = gradient["blocks"][0]["mlp"]["up"]["kernel"]
    assert bool(jnp.all(found.step != 0))
    assert bool(jnp.any(found.base != 0))
    values = weights.dense(up)[0] / up.step[0]
    np.testing.assert_allclose(values, jnp.round(values), atol=1e-5)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="bits is 1, expected from 2 to 16"):
        fake_quant(W, 1.0, 1)
    low = weights.add_low_rank(jax.random.key(0), jnp.ones((4, 4)), 2)
    with pytest.raises(ConfigError, match="kernel is LowRank: only dense kernels can learn a step"):
        learn_steps({"kernel": low}, ["kernel"], 4)
    with pytest.raises(ConfigError, match="no kernel 'kernal': did you mean 'kernel'"):
        learn_steps({"kernel": jnp.ones((4, 4))}, ["kernal"], 4)
