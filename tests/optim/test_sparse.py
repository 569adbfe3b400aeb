"""CAST's optimizer and SR-STE's decay against a recursion by hand, and what its card says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.core.sparsity import nm_mask, satisfies_nm
from jaxlm.optim import add_masked_decay, cast, decay_budget, scale_by_cast

B1, B2, EPS = 0.9, 0.999, 1e-8


def draw(seed, shape=(8, 3)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def by_hand(w, grads, total, strength, rate):
    """Algorithm 1 in NumPy, float64, a mask at every step."""
    w, mu, nu = w.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(grads):
        mask = np.asarray(nm_mask(jnp.abs(jnp.asarray(w, jnp.float32))))
        mu = B1 * mu + (1 - B1) * g
        mixed = np.where(mask, mu, (1 - t / total) * mu + t / total * strength * np.sign(w))
        nu = B2 * nu + (1 - B2) * mixed**2
        w = w - rate * (mixed / (1 - B1 ** (t + 1))) / (np.sqrt(nu / (1 - B2 ** (t + 1))) + EPS)
    return w


def train(w, grads, total, strength, rate, refresh=1):
    tx = scale_by_cast(total, strength=strength, refresh=refresh)
    state, w = tx.init(w := jnp.asarray(w)), w
    update = jax.jit(lambda g, state, w, step: tx.update(g, state, w, step=step))
    for t, g in enumerate(grads):
        direction, state = update(jnp.asarray(g), state, w, jnp.int32(t))
        w = w - rate * direction
    return w, state


def test_it_is_the_algorithm():
    w, grads = draw(0), [draw(i + 1) for i in range(12)]
    found, _ = train(w, grads, 12, 0.3, 0.05)
    np.testing.assert_allclose(found, by_hand(w, grads, 12, 0.3, 0.05), rtol=2e-4, atol=2e-5)


def test_where_nothing_is_masked_the_strength_has_no_effect():
    """Nor at step 0, where the first moment alone decides: the second is of it, not of the gradient."""
    w, g = draw(0), draw(1)
    tx = scale_by_cast(10, strength=5.0)
    state = tx.init(jnp.asarray(w))
    direction, new = tx.update(jnp.asarray(g), state, jnp.asarray(w), step=jnp.int32(0))
    expected = g / ((1 - B1) * np.abs(g) + EPS)
    np.testing.assert_allclose(direction, expected, rtol=1e-4)
    late, _ = tx.update(jnp.asarray(g), state, jnp.asarray(w), step=jnp.int32(5))
    mask = np.asarray(new.mask)
    np.testing.assert_array_equal(np.asarray(late)[mask], np.asarray(direction)[mask])
    assert np.all(np.asarray(late)[~mask] != np.asarray(direction)[~mask])


def test_without_a_gradient_the_strength_does_not_matter_and_the_weight_ends_near_zero():
    w, none = draw(0), [np.zeros((8, 3), np.float32)] * 300
    rate = 5 * np.abs(w).mean() / 300
    weak, state = train(w, none, 300, 1.0, rate)
    strong, _ = train(w, none, 300, 100.0, rate)
    # Around zero the sign of a rounding error decides a step.
    np.testing.assert_allclose(weak, strong, atol=4 * rate)
    kept = np.asarray(nm_mask(jnp.abs(w)))
    np.testing.assert_array_equal(np.asarray(weak)[kept], w[kept])
    assert np.abs(np.asarray(weak)[~kept]).max() < 5 * rate
    np.testing.assert_array_equal(state.mask, kept)


def test_masks_are_drawn_anew_every_refresh_from_the_parameters_of_that_step():
    w, turned = jnp.asarray(draw(0)), jnp.asarray(draw(9))
    tx = scale_by_cast(100, refresh=5)
    state = tx.init(w)
    _, held = tx.update(w, state, turned, step=jnp.int32(4))
    np.testing.assert_array_equal(held.mask, nm_mask(jnp.abs(w)))
    _, drawn = tx.update(w, state, turned, step=jnp.int32(5))
    np.testing.assert_array_equal(drawn.mask, nm_mask(jnp.abs(turned)))


def test_a_quadratic_ends_sparse_with_its_budget_and_rate_to_zero():
    target, total = draw(3, (16, 4)), 400
    axes, w = {"w": ("embed", "mlp")}, {"w": jnp.asarray(draw(4, (16, 4)))}

    def rate(step):
        return 0.05 * (1 - step / total)

    assert decay_budget(rate, total) > 2 * np.abs(target).mean()
    tx = cast(rate, total, axes=axes, strength=1.0)

    def one(carry, step):
        w, state = carry
        g = {"w": 0.05 * (w["w"] - target)}
        updates, state = tx.update(g, state, w, step=step)
        return ({"w": w["w"] + updates["w"]}, state), None

    (w, _), _ = jax.lax.scan(one, (w, tx.init(w)), jnp.arange(total))
    mask = nm_mask(jnp.abs(w["w"]))
    assert jnp.max(jnp.abs(jnp.where(mask, 0, w["w"]))) < 0.05
    np.testing.assert_allclose(jnp.where(mask, w["w"] - target, 0), 0, atol=0.3)
    assert satisfies_nm(jnp.where(mask, w["w"], 0))


def test_the_budget_of_a_constant_rate_is_half_the_way():
    assert decay_budget(1e-3, 1000) == pytest.approx(0.5, rel=2e-3)


def test_masked_decay_pulls_what_a_mask_would_remove():
    w = {"w": jnp.asarray(draw(0))}
    tx = add_masked_decay(0.5)
    found, _ = tx.update({"w": jnp.ones((8, 3))}, tx.init(w), w)
    kept = np.asarray(nm_mask(jnp.abs(w["w"])))
    np.testing.assert_allclose(found["w"], np.where(kept, 1, 1 + 0.5 * draw(0)), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps is 0"),
        ({"total_steps": 5, "refresh": 0}, "refresh is 0"),
        ({"total_steps": 5, "strength": -1.0}, "strength is -1.0"),
        ({"total_steps": 5, "n": 4}, "4:4 sparsity"),
        ({"total_steps": 5, "m": 3, "n": 1}, r"w of shape \(8, 3\) has 8 inputs"),
        ({"total_steps": 5, "b1": 1.0}, "b1 is 1.0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        scale_by_cast(**options).init({"w": jnp.ones((8, 3))})
