"""An optimizer that starts anew: equal to a fresh one after each reset, to the bit to the plain one without any."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.optim import adamw, galore, reset_state_every

AXES = {"w": ("embed", "mlp")}


def gradient(step):
    return {"w": jnp.asarray(np.random.default_rng(step).normal(size=(4, 6)), jnp.float32)}


@pytest.mark.parametrize("make", [adamw, lambda rate, axes: galore(rate, axes=axes, rank=2, period=5)])
def test_after_a_reset_it_is_a_fresh_optimizer(make):
    inner, params = make(0.1, axes=AXES), gradient(100)
    tx = reset_state_every(inner, 5)
    state = tx.init(params)
    update = jax.jit(lambda g, s, step: tx.update(g, s, params, step=step))
    for step in range(13):
        if step in (0, 5, 10):
            fresh = inner.init(params)
        updates, state = update(gradient(step), state, jnp.int32(step))
        expected, fresh = inner.update(gradient(step), fresh, params, step=jnp.int32(step))
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-4, atol=1e-6, err_msg=str(step))


def test_without_a_reset_nothing_changes_to_the_bit():
    inner, params = adamw(0.1, axes=AXES), gradient(100)
    tx = reset_state_every(inner, 1000)
    found, plain = [(params, t.init(params)) for t in (tx, inner)]
    for step in range(4):
        u, s = tx.update(gradient(step), found[1], found[0], step=step)
        v, r = inner.update(gradient(step), plain[1], plain[0], step=step)
        found, plain = (optax.apply_updates(found[0], u), s), (optax.apply_updates(plain[0], v), r)
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def test_what_it_needs_is_named():
    params = gradient(0)
    tx = reset_state_every(optax.adam(0.1), 3)
    with pytest.raises(ConfigError, match="reset_state_every follows the step"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ConfigError, match="needs the parameters"):
        tx.update(params, tx.init(params), step=1)
    with pytest.raises(ConfigError, match="period is 0"):
        reset_state_every(optax.adam(0.1), 0)
