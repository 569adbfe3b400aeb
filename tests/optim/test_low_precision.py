"""Rounded updates and narrow states: what is kept on average, what is lost to nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.core.formats import number_format
from jaxlm.optim import apply_rounded_updates, keep_state_in

KEY = jax.random.key(0)


@pytest.mark.parametrize(("to", "update"), [("bfloat16", 2.0**-10), ("q3.13", 2.0**-16)])
def test_small_updates_are_lost_to_nearest_and_arrive_on_average_at_random(to, update):
    params = {"w": jnp.ones(4096)}
    updates = {"w": jnp.full(4096, update)}
    nearest, random = params, params
    for i in range(20):
        nearest = apply_rounded_updates(nearest, updates, to=to, rounding="nearest")
        random = apply_rounded_updates(random, updates, key=jax.random.fold_in(KEY, i), to=to)
    np.testing.assert_array_equal(nearest["w"], 1)
    assert float(jnp.mean(random["w"])) == pytest.approx(1 + 20 * update, rel=0, abs=2 * update)
    np.testing.assert_array_equal(number_format(to).round(random["w"]), random["w"])


def test_dtypes_stay_and_leaves_are_rounded_independently():
    params = {"a": jnp.ones(512, jnp.bfloat16), "b": jnp.ones(512, jnp.bfloat16), "c": None}
    updates = {"a": jnp.full(512, 2.0**-9), "b": jnp.full(512, 2.0**-9), "c": None}
    out = apply_rounded_updates(params, updates, key=KEY)
    assert out["a"].dtype == jnp.bfloat16
    assert not np.array_equal(out["a"], out["b"])


def test_bfloat16_moments_follow_float32s_where_nearest_would_stand_still():
    gradient = {"w": jnp.full((64, 64), 0.1)}
    params = {"w": jnp.zeros((64, 64))}
    adam = optax.scale_by_adam(b1=0.9, b2=0.999)
    exact, tx = adam.init(params), keep_state_in(adam, "bfloat16")
    state = tx.init(params)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state) if x.ndim)
    update = jax.jit(tx.update)
    stuck = jnp.zeros((), jnp.bfloat16)
    for i in range(300):
        _, exact = adam.update(gradient, exact)
        out, state = update(gradient, state, params, key=jax.random.fold_in(KEY, i))
        stuck = (0.999 * stuck.astype(jnp.float32) + 0.001 * 0.01).astype(jnp.bfloat16)
    nu, expected = state.inner.nu["w"].astype(jnp.float32), exact.nu["w"][0, 0]
    assert float(jnp.mean(nu)) == pytest.approx(float(expected), rel=0.01)
    assert float(stuck) < 0.95 * float(expected)
    np.testing.assert_allclose(jnp.mean(out["w"]), 1.0, atol=0.02)


def test_float32_is_the_optimizer_itself_and_wide_takes_narrow_parameters():
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    plain = keep_state_in(optax.adam(1e-3), "float32")
    assert plain.init(params)[0].mu["w"].dtype == jnp.bfloat16
    wide = keep_state_in(optax.adam(1e-3), "float32", wide=True)
    state = wide.init(params)
    updates, state = wide.update(params, state, params)
    assert state.inner[0].nu["w"].dtype == updates["w"].dtype == jnp.float32


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="optimizer_state is 'int8'.*take adamw_8bit"):
        keep_state_in(optax.adam(1e-3), "int8")
    tx = keep_state_in(optax.adam(1e-3), "bfloat16")
    params = {"w": jnp.ones((4, 4))}
    with pytest.raises(ConfigError, match="rounded at random: call update"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(ConfigError, match="at random, and that needs a key"):
        apply_rounded_updates(params, params)
