"""SCALE and SWAN against their formulas in NumPy, and what follows from them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.core.trees import count
from jaxlm.optim import adamw, normalize_gradients, scale_by_swan, scale_optimizer, swan

AXES = {
    "embed": ("vocab", "embed"),
    "kernel": ("layers", "embed", "mlp"),
    "expert": ("layers", "experts", "mlp", "embed"),
    "head": ("embed", "vocab"),
    "scale": ("layers", "embed"),
    "router": ("layers", "embed", "router"),
}
SHAPES = {
    "embed": (10, 4),
    "kernel": (3, 4, 6),
    "expert": (3, 2, 6, 4),
    "head": (4, 10),
    "scale": (3, 4),
    "router": (3, 4, 2),
}
MATRICES = ("embed", "kernel", "expert", "head")


def values(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def rms(x, axis):
    return np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=axis, keepdims=True))


def run(tx, params, gradients):
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, updates, state


def test_scale_is_its_formula():
    rate, adam_rate, decay, beta = 0.1, 0.02, 0.3, 0.8
    params, gradients = values(0), [values(i) for i in (1, 2, 3)]
    tx = scale_optimizer(rate, axes=AXES, momentum=beta, adam_learning_rate=adam_rate, weight_decay=decay)
    found, _, _ = run(tx, params, gradients)

    mine = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m = np.zeros(SHAPES["head"])
    for g in gradients:
        m = beta * m + (1 - beta) * np.asarray(g["head"])
        for name in MATRICES:
            x = m if name == "head" else np.asarray(g[name])
            mine[name] = mine[name] * (1 - rate * decay) - rate * x / rms(x, -2)
    for name in MATRICES:
        np.testing.assert_allclose(found[name], mine[name], rtol=1e-4, atol=1e-5, err_msg=name)

    adam, _, _ = run(adamw(adam_rate, axes=AXES, b2=0.999, weight_decay=decay), params, gradients)
    for name in ("scale", "router"):
        np.testing.assert_allclose(found[name], adam[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(("mode", "axis"), [("column", -2), ("row", -1)])
def test_every_column_or_row_of_a_step_has_root_mean_square_one(mode, axis):
    tx = scale_optimizer(0.5, axes=AXES, normalization=mode)
    gradients = jax.tree.map(lambda g: g * 1e-3, values(1))
    _, updates, _ = run(tx, values(0), [gradients])
    for name in MATRICES:
        np.testing.assert_allclose(rms(updates[name], axis), 0.5, rtol=1e-5, err_msg=name)


def test_scaling_the_loss_of_an_output_unit_changes_nothing_for_it():
    factors = jnp.asarray([1e-3, 1.0, 7.0, 1e4, 2.0, 0.5]).reshape(1, 1, 6)
    tx = scale_optimizer(0.5, axes=AXES)
    plain, scaled = values(1), values(1)
    scaled["kernel"] = scaled["kernel"] * factors
    for name in MATRICES:
        a, b = (run(tx, values(0), [g])[1][name] for g in (plain, scaled))
        np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)


def test_with_one_input_column_normalization_is_the_sign():
    x = jnp.asarray([[3.0, -1e-3, 0.0, -5.0]])
    tx = normalize_gradients("column")
    np.testing.assert_allclose(tx.update(x, tx.init(x))[0], [[1, -1, 0, -1]], rtol=1e-6)


def test_state_is_the_heads_momentum_and_adam_of_what_is_no_matrix():
    params = values(0)
    adam = 2 * (params["scale"].size + params["router"].size)

    def arrays(**settings):
        state = scale_optimizer(0.1, axes=AXES, **settings).init(params)
        return count([leaf for leaf in jax.tree.leaves(state) if leaf.ndim]) - adam

    assert arrays() == params["head"].size
    assert arrays(momentum_roles=()) == 0
    assert arrays(momentum_roles=("matrix", "embed", "head")) == sum(params[name].size for name in MATRICES)


def test_a_tied_table_is_treated_as_the_head_that_it_is():
    axes = {"table": ("tied_vocab", "embed"), "w": ("embed", "mlp")}
    params = {"table": values(0)["embed"], "w": jnp.ones((4, 6))}
    g1, g2 = ({"table": values(i)["embed"], "w": jnp.ones((4, 6))} for i in (1, 2))
    _, updates, _ = run(scale_optimizer(1.0, axes=axes, momentum=0.9), params, [g1, g2])
    m = 0.9 * 0.1 * np.asarray(g1["table"]) + 0.1 * np.asarray(g2["table"])
    np.testing.assert_allclose(updates["table"], -m / rms(m, -1), rtol=1e-4)


def test_the_four_normalizations():
    x = values(3)["kernel"]
    for mode, expected in (("sign", np.sign(x)), ("none", np.asarray(x))):
        tx = normalize_gradients(mode)
        np.testing.assert_array_equal(tx.update(x, tx.init(x))[0], expected)
    tx = normalize_gradients("singular")
    singular = np.linalg.svd(tx.update(x, tx.init(x))[0], compute_uv=False) / np.sqrt(6)
    assert (singular > 0.5).all()
    assert (singular < 1.3).all()


@pytest.mark.parametrize("shape", [(2, 8, 16), (2, 3, 16, 8), (12, 12)])
def test_swan_standardizes_whitens_and_restores_the_norm(shape):
    g = np.random.default_rng(0).normal(1.0, 3.0, size=shape)
    tx = scale_by_swan()
    found = tx.update(jnp.asarray(g, jnp.float32), tx.init(g))[0]
    z = (g - g.mean(-2, keepdims=True)) / g.std(-2, keepdims=True)
    u, s, vt = np.linalg.svd(z, full_matrices=False)
    # Standardizing takes one direction out of tall matrices' smaller side: its singular value is zero.
    kept = s > 1e-6 * s[..., :1]
    polar = (u * kept[..., None, :]) @ vt
    norm = lambda x: np.sqrt((x**2).sum((-2, -1), keepdims=True))  # noqa: E731
    np.testing.assert_allclose(norm(np.asarray(found)), norm(z), rtol=1e-4)
    np.testing.assert_allclose(found, polar * norm(z) / norm(polar), atol=0.06)


def test_swan_gives_adam_to_everything_but_kernels():
    params, gradients = values(0), [values(i) for i in (1, 2)]
    _, updates, _ = run(swan(0.1, axes=AXES), params, gradients)
    _, adam, _ = run(adamw(0.1, axes=AXES, b2=0.999, weight_decay=0.0), params, gradients)
    for name in ("embed", "head", "scale", "router"):
        np.testing.assert_allclose(updates[name], adam[name], rtol=1e-5)
    assert np.max(np.abs(updates["kernel"] - adam["kernel"])) > 0.01


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"normalization": "columns"}, "did you mean 'column'"),
        ({"momentum_roles": ("heads",)}, "did you mean 'head'"),
        ({"adam_b2": -0.1}, "b2 is -0.1"),
    ],
)
def test_bad_values_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        scale_optimizer(0.1, axes=AXES, **settings)
