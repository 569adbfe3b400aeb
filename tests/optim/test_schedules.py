"""Schedules against their closed forms, against Optax where it has the same one, and traced."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError
from jaxlm.optim import quick_recovery, rewarm, warmup_stable_decay

PEAK, TOTAL, WARMUP, DECAY = 3e-3, 1000, 100, 200


def closed_form(shape, x, end):
    return {
        "linear": end + (1 - end) * (1 - x),
        "cosine": end + (1 - end) * (1 + math.cos(math.pi * x)) / 2,
        "sqrt": end + (1 - end) * (1 - math.sqrt(x)),
        "exponential": end**x,
    }[shape]


@pytest.mark.parametrize("shape", ["linear", "cosine", "sqrt", "exponential"])
@pytest.mark.parametrize("end", [0.01, 0.1, 1.0])
def test_warmup_stable_decay_follows_its_closed_form(shape, end):
    schedule = warmup_stable_decay(PEAK, TOTAL, WARMUP, DECAY, shape, end)
    for step, expected in [(0, 0), (1, 0.01), (50, 0.5), (99, 0.99), (100, 1), (101, 1), (799, 1), (800, 1)]:
        np.testing.assert_allclose(schedule(step), PEAK * expected, rtol=1e-6)
    for step in (801, 850, 900, 999, 1000):
        expected = PEAK * closed_form(shape, (step - 800) / DECAY, end)
        np.testing.assert_allclose(schedule(step), expected, rtol=2e-5)
    np.testing.assert_allclose(schedule(5000), PEAK * end, rtol=1e-6)


def test_exponential_decay_has_the_half_life_it_is_given():
    half_life = 40
    schedule = warmup_stable_decay(PEAK, TOTAL, WARMUP, DECAY, "exponential", 0.5 ** (DECAY / half_life))
    np.testing.assert_allclose(schedule(800 + half_life), PEAK / 2, rtol=1e-5)
    np.testing.assert_allclose(schedule(800 + 3 * half_life), PEAK / 8, rtol=1e-5)


@pytest.mark.parametrize(("shape", "end"), [("linear", 0.0), ("linear", 0.1), ("cosine", 0.1)])
def test_warmup_stable_decay_equals_optax_schedules_joined(shape, end):
    decay = {
        "linear": optax.linear_schedule(PEAK, end * PEAK, DECAY),
        "cosine": optax.cosine_decay_schedule(PEAK, DECAY, alpha=end),
    }[shape]
    joined = optax.join_schedules(
        [optax.linear_schedule(0, PEAK, WARMUP), optax.constant_schedule(PEAK), decay],
        [WARMUP, TOTAL - DECAY],
    )
    steps = jnp.arange(TOTAL + 50)
    ours = jax.vmap(warmup_stable_decay(PEAK, TOTAL, WARMUP, DECAY, shape, end))(steps)
    np.testing.assert_allclose(ours, jax.vmap(joined)(steps), rtol=1e-5, atol=1e-9)


def test_runs_of_other_lengths_agree_until_the_shorter_one_decays():
    steps = jnp.arange(700)
    short = jax.vmap(warmup_stable_decay(PEAK, 800, WARMUP, 100))(steps)
    long = jax.vmap(warmup_stable_decay(PEAK, 5000, WARMUP, 500))(steps)
    np.testing.assert_array_equal(short, long)


@pytest.mark.parametrize("warmup", [0, 5, 20])
def test_rewarm_equals_optax_warmup_cosine(warmup):
    steps = jnp.arange(1100)
    ours = jax.vmap(rewarm(PEAK, 1000, warmup))(steps)
    theirs = jax.vmap(optax.warmup_cosine_decay_schedule(0.0, PEAK, warmup, 1000, 0.1 * PEAK))(steps)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-10)


def test_rewarm_without_warmup_jumps_and_with_a_start_continues_the_run_before():
    assert float(rewarm(PEAK, 1000, 0)(0)) == pytest.approx(PEAK)
    before = warmup_stable_decay(1e-3, 500, 50, 100, end_fraction=0.1)
    both = optax.join_schedules([before, rewarm(PEAK, 1000, 100, start=1e-4)], [500])
    assert float(both(499)) == pytest.approx(1e-3 * (1 - 0.9 * 99 / 100), rel=1e-5)
    assert float(both(500)) == pytest.approx(1e-4, rel=1e-5)
    assert float(both(550)) == pytest.approx((1e-4 + PEAK) / 2, rel=1e-5)
    assert float(both(1500)) == pytest.approx(0.1 * PEAK, rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 500), st.data())
def test_the_rate_rises_then_rests_then_falls_and_is_never_above_the_peak(total, data):
    warmup = data.draw(st.integers(0, total))
    decay = data.draw(st.integers(0, total - warmup))
    shape = data.draw(st.sampled_from(["linear", "cosine", "sqrt", "exponential"]))
    end = data.draw(st.floats(0.01, 1.0))
    rates = np.asarray(warmup_stable_decay(1.0, total, warmup, decay, shape, end)(np.arange(501)))
    assert rates.max() <= 1 + 1e-6
    assert rates.min() >= 0
    assert (np.diff(rates[: warmup + 1]) >= -1e-6).all()
    assert (np.diff(rates[warmup:]) <= 1e-6).all()
    np.testing.assert_allclose(rates[warmup : total - decay], 1.0, rtol=1e-6)


def test_a_traced_step_compiles_once_and_gives_the_same_numbers():
    schedule = warmup_stable_decay(PEAK, TOTAL, WARMUP, DECAY, "sqrt")
    traced = jax.jit(schedule)
    for step in (0, 70, 500, 900, 2000):
        np.testing.assert_allclose(traced(jnp.int32(step)), schedule(step), rtol=1e-6)
    assert traced._cache_size() == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: warmup_stable_decay(1.0, 10, 5, 6), "decay_steps is 6"),
        (lambda: warmup_stable_decay(1.0, 10, 11, 0), "warmup_steps is 11"),
        (lambda: warmup_stable_decay(1.0, 0, 0, 0), "total_steps is 0"),
        (lambda: warmup_stable_decay(float("nan"), 10, 0, 0), "peak is nan"),
        (lambda: warmup_stable_decay(1.0, 10, 0, 5, "linaer"), "did you mean 'linear'"),
        (lambda: warmup_stable_decay(1.0, 10, 0, 5, "exponential", 0.0), "never reaches end_fraction 0"),
        (lambda: warmup_stable_decay(1.0, 10, 0, 5, end_fraction=1.5), "end_fraction is 1.5"),
        (lambda: rewarm(1.0, 10, 11), "rewarm: warmup_steps is 11"),
        (lambda: rewarm(1.0, 10, 1, start=-1.0), "start is -1"),
    ],
)
def test_schedules_that_cannot_be_are_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_quick_recovery_ramps_after_every_restart_and_is_the_schedule_elsewhere():
    plain = rewarm(1.0, 100, 10)
    schedule = jax.jit(jax.vmap(quick_recovery(plain, 30, recovery=5, start_fraction=1e-3)))
    found, steps = np.asarray(schedule(jnp.arange(100))), np.arange(100)
    expected = np.array([float(plain(int(s))) for s in steps])
    for restart in (30, 60, 90):
        target = expected[restart + 5]
        expected[restart : restart + 5] = target * np.linspace(1e-3, 1, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    beyond = quick_recovery(plain, 1000)
    assert [float(beyond(int(s))) for s in steps] == [float(plain(int(s))) for s in steps]


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"cycle": 0}, "cycle is 0"),
        ({"cycle": 5, "recovery": 6}, "recovery is 6"),
        ({"cycle": 5, "recovery": 1}, "recovery is 1"),
        ({"cycle": 20, "start_fraction": -0.1}, "start_fraction is -0.1"),
    ],
)
def test_bad_recoveries_are_named(settings_, words):
    with pytest.raises(ConfigError, match=words):
        quick_recovery(rewarm(1.0, 100, 10), **settings_)
