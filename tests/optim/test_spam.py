"""SPAM and Stable-SPAM: resets, spikes, and what they leave alone. (Trajectories: `test_against_torch.py`.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.optim import adamw, scale_by_spam, scale_by_stable_spam, spam, stable_spam

AXES = {"w": ("layers", "embed", "mlp"), "scale": ("layers", "embed")}
SHAPES = {"w": (2, 3, 4), "scale": (2, 3)}
OWN = {"w": 2, "scale": 1}


def values(seed):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=shape), jnp.float32) for k, shape in SHAPES.items()}


def unit(w):
    return np.asarray(w) / np.linalg.norm(w, axis=(-2, -1), keepdims=True)


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_without_spikes_and_resets_spam_is_adam():
    params = values(0)
    tx, adam = spam(0.1, axes=AXES), adamw(0.1, axes=AXES, b2=0.999, eps=1e-6, weight_decay=0.0)
    state, adam_state = tx.init(params), adam.init(params)
    for step in range(25):
        updates, state = tx.update(values(step), state, params, step=step)
        expected, adam_state = adam.update(values(step), adam_state, params)
        close(updates, expected, rtol=1e-4, atol=1e-6)


def test_a_spike_is_brought_down_to_its_bound_and_only_it():
    tx = scale_by_spam(threshold=50.0, quiet=3)
    state = tx.init(values(0))
    for step in range(5):
        _, state = tx.update(values(step), state, step=step)
    spiky = values(5)
    bound = np.sqrt(50.0 * np.asarray(state.nu["w"][1, 2, 3]))
    clipped = {**spiky, "w": spiky["w"].at[1, 2, 3].set(-bound)}
    a, state_a = tx.update({**spiky, "w": spiky["w"].at[1, 2, 3].set(-1e4)}, state, step=5)
    b, state_b = tx.update(clipped, state, step=5)
    close((a, state_a), (b, state_b), rtol=1e-4, atol=1e-6)


def test_moments_are_forgotten_at_positive_multiples_of_the_period():
    tx = scale_by_spam(period=4, warmup=2)
    state = tx.init(values(0))
    for step in range(13):
        g = values(step)
        _, state = tx.update(g, state, step=step)
        only_this = np.allclose(state.mu["w"], 0.1 * g["w"], rtol=1e-4, atol=1e-7)
        assert only_this == (step in (0, 4, 8, 12)), step


def test_stable_spam_gives_every_layer_the_averages_of_its_own_norms():
    """One layer's gradients grow a thousandfold for one step: the other's updates do not notice, its own hardly."""
    calm, loud = values(3), values(3)
    loud["w"] = loud["w"].at[1].multiply(1e3)
    tx = scale_by_stable_spam(lambda p: OWN)
    state = tx.init(calm)
    for step in range(30):
        _, state = tx.update(values(step), state, step=step)
    a, state_a = tx.update(calm, state, step=30)
    b, state_b = tx.update(loud, state, step=30)
    np.testing.assert_array_equal(a["w"][0], b["w"][0])
    assert np.max(np.abs(np.asarray(state_b.mu["w"][1]))) < 3 * np.max(np.abs(np.asarray(state_a.mu["w"][1])))
    assert state.norm["w"].shape == state.largest["scale"].shape == (2,)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_of_a_constant_gradient_stable_spam_shows_adam_the_direction_with_norm_one(scale):
    tx = scale_by_stable_spam(lambda p: OWN)
    g = jax.tree.map(lambda x: x * scale, values(1))
    state = tx.init(g)
    for step in range(5):
        updates, state = tx.update(g, state, step=step)
        close(updates, jax.tree.map(jnp.sign, g), rtol=1e-3)
    np.testing.assert_allclose(state.mu["w"], unit(g["w"]) * (1 - 0.9**5), rtol=1e-3)


def test_a_gradient_of_zero_changes_no_moment():
    tx = scale_by_stable_spam(lambda p: OWN)
    state = tx.init(values(0))
    for step in range(3):
        _, state = tx.update(values(step), state, step=step)
    updates, after = tx.update(jax.tree.map(jnp.zeros_like, values(0)), state, step=3)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    close((after.mu, after.nu, after.norm), (state.mu, state.nu, state.norm), rtol=0)


def test_the_momentum_falls_along_a_cosine_when_the_length_of_the_run_is_given():
    g, steps = values(1), 10
    tx = scale_by_stable_spam(lambda p: OWN, decay_steps=steps)
    for step, factor in ((0, 1.0), (5, 0.75), (10, 0.5), (20, 0.5)):
        _, state = tx.update(g, tx.init(g), step=step)
        np.testing.assert_allclose(state.mu["w"], (1 - 0.9 * factor) * unit(g["w"]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spam(0.1, axes=AXES, period=0), "period is 0"),
        (lambda: spam(0.1, axes=AXES, warmup=0), "warmup is 0"),
        (lambda: spam(0.1, axes=AXES, threshold=-1.0), "threshold is -1.0"),
        (lambda: spam(0.1, axes=AXES, b1=1.0), "b1 is 1.0"),
        (lambda: stable_spam(0.1, axes=AXES, period=-1), "period is -1"),
        (lambda: stable_spam(0.1, axes=AXES, gamma1=1.0), "gamma1 is 1.0"),
        (lambda: stable_spam(0.1, axes=AXES, theta=-0.1), "theta is -0.1"),
        (lambda: stable_spam(0.1, axes=AXES, decay_steps=0), "decay_steps is 0"),
    ],
)
def test_bad_values_are_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
