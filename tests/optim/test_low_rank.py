"""Projections, GaLore, Natural GaLore, Fira and APOLLO: closed forms, invariants, limiting cases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.optim import (
    Projection,
    adamw,
    apollo,
    fira,
    galore,
    limit_norm_growth,
    natural_galore,
    natural_gradient,
    scale_by_apollo,
    scale_by_empirical_fisher,
    scale_by_galore,
)

AXES = {"kernel": ("layers", "embed", "mlp"), "embed": ("vocab", "embed"), "scale": ("layers", "embed")}
SHAPES = {"kernel": (2, 5, 9), "embed": (7, 5), "scale": (2, 5)}


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def values(seed):
    return {name: normal(seed + i, shape) for i, (name, shape) in enumerate(SHAPES.items())}


def best_approximation(g, rank):
    u, s, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


@pytest.mark.parametrize("side", ["smaller", "larger", "both"])
@pytest.mark.parametrize("shape", [(2, 5, 9), (2, 3, 9, 5), (6, 6)])
def test_a_refreshed_projection_gives_the_best_approximation_of_its_rank(side, shape):
    g = normal(0, shape)
    tx = scale_by_galore(Projection(3, side=side), optax.identity(), scale=1.0)
    updates, state = tx.update(g, tx.init(g), step=0)
    np.testing.assert_allclose(updates, best_approximation(g, 3), atol=1e-4)
    for basis in jax.tree.leaves(state.bases):
        gram = np.broadcast_to(np.eye(3), (*basis.shape[:-2], 3, 3))
        np.testing.assert_allclose(basis.mT @ basis, gram, atol=1e-5)


def test_the_smaller_side_is_projected_and_the_input_side_of_squares():
    for shape, image in (((5, 9), (3, 9)), ((9, 5), (9, 3)), ((6, 6), (3, 6))):
        assert Projection(3).image_shape(shape) == image
    assert Projection(3, side="larger").image_shape((2, 5, 9)) == (2, 5, 3)
    assert Projection(3, side="both").image_shape((2, 5, 9)) == (2, 3, 3)


def test_bases_change_at_multiples_of_the_period_of_the_callers_step_alone():
    g = [normal(i, (5, 9)) for i in range(12)]
    tx = scale_by_galore(Projection(2, period=5), optax.identity(), scale=1.0)
    state = tx.init(g[0])
    np.testing.assert_array_equal(state.bases.rows, np.eye(5, 2))
    for step in range(3, 12):
        before = state.bases.rows
        _, state = tx.update(g[step], state, step=jnp.int32(step))
        assert (step % 5 == 0) == bool(np.any(np.asarray(before != state.bases.rows)))


@pytest.mark.parametrize("refresh", ["orthogonal", "gaussian"])
def test_random_bases_differ_by_layer_leaf_and_period_and_are_right_on_average(refresh):
    g = {"a": jnp.zeros((400, 4, 6)), "b": jnp.zeros((400, 4, 6))}
    projection = Projection(2, period=10, refresh=refresh)
    first, same, later = (projection.draw(g, jnp.int32(step)).rows for step in (0, 9, 10))
    np.testing.assert_array_equal(first["a"], same["a"])
    for other in (later["a"], first["b"], jnp.roll(first["a"], 1, 0)):
        assert np.max(np.abs(np.asarray(first["a"] - other))) > 0.1
    mean = np.mean(first["a"] @ first["a"].mT, axis=0)  # of P P^T: rank / size for orthogonal, 1 for gaussian
    np.testing.assert_allclose(mean, np.eye(4) * (0.5 if refresh == "orthogonal" else 1.0), atol=0.12)


def test_galore_takes_kernels_and_the_rest_is_adam():
    params, gradients = values(0), [values(10 * i) for i in (1, 2, 3)]
    tx, adam = galore(0.1, axes=AXES, rank=5, scale=1.0), adamw(0.1, axes=AXES, b2=0.999, eps=1e-6, weight_decay=0.0)
    state, adam_state = tx.init(params), adam.init(params)
    for step, g in enumerate(gradients):
        updates, state = tx.update(g, state, params, step=step)
        expected, adam_state = adam.update(g, adam_state, params)
    for name in ("embed", "scale"):
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)
    assert np.max(np.abs(updates["kernel"] - expected["kernel"])) > 0.01


def test_natural_gradient_solves_with_the_fisher_matrix():
    h = normal(0, (2, 4, 3, 5))  # two matrices, four gradients of 3 x 5 each
    valid = jnp.asarray([True, True, False, True])
    for lam in (1e-3, 1.0, 100.0):
        found = natural_gradient(h, valid, 1, lam)
        for layer in range(2):
            columns = np.asarray(h[layer], np.float64)[np.asarray(valid)].reshape(3, 15).T
            fisher = lam * np.eye(15) + columns @ columns.T
            expected = np.linalg.solve(fisher, np.asarray(h[layer, 1], np.float64).ravel())
            np.testing.assert_allclose(found[layer].ravel(), expected, rtol=2e-4, atol=1e-6)


def test_natural_gradient_of_one_vector_and_of_large_damping():
    h = normal(1, (1, 3, 5))
    square = float(jnp.sum(h**2))
    np.testing.assert_allclose(natural_gradient(h, jnp.asarray([True]), 0, 0.5), h[0] / (0.5 + square), rtol=1e-5)
    many, valid = normal(2, (4, 3, 5)), jnp.ones(4, bool)
    np.testing.assert_allclose(natural_gradient(many, valid, 2, 1e6) * 1e6, many[2], rtol=1e-3, atol=1e-4)
    # Relative damping does not know the scale of the loss: the result of c*g is that of g divided by c.
    a, b = (natural_gradient(many * c, valid, 2, 1.0, "relative") * c for c in (1.0, 1e3))
    np.testing.assert_allclose(a, b, rtol=1e-3)


def test_the_stable_form_keeps_the_digits_that_woodburys_formula_loses():
    h = normal(3, (4, 12, 5)) * 10
    columns = np.asarray(h, np.float64).reshape(4, 60).T
    exact = np.linalg.solve(1e-3 * np.eye(60) + columns @ columns.T, columns[:, 3])
    stable = np.asarray(natural_gradient(h, jnp.ones(4, bool), 3, 1e-3)).ravel()
    single = columns.astype(np.float32)
    core = np.eye(4, dtype=np.float32) + single.T @ single / np.float32(1e-3)
    inner = np.linalg.solve(core, single.T @ single[:, 3])
    literal = single[:, 3] / np.float32(1e-3) - single @ inner / np.float32(1e-6)
    error = lambda x: np.linalg.norm(x - exact) / np.linalg.norm(exact)  # noqa: E731
    assert error(stable) < 1e-5
    assert error(literal) > 100 * error(stable)


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 7, 3), (3, 3)])
def test_the_history_is_the_last_gradients_since_the_last_refresh(shape):
    history, period, lam = 3, 5, 0.1
    tx = scale_by_empirical_fisher(history, lam, period=period)
    gradients = [normal(i, shape) for i in range(13)]
    state = tx.init(gradients[0])
    for step, g in enumerate(gradients):
        updates, state = tx.update(g, state, step=jnp.int32(step))
        first = max(step - history + 1, step - step % period)
        past = np.stack([np.asarray(x, np.float64) for x in gradients[first : step + 1]])
        for i in np.ndindex(shape[:-2]):
            columns = past[(slice(None), *i)].reshape(len(past), -1).T
            fisher = lam * np.eye(len(columns)) + columns @ columns.T
            expected = np.linalg.solve(fisher, columns[:, -1])
            np.testing.assert_allclose(np.ravel(updates[i]), expected, rtol=1e-3, atol=1e-5, err_msg=str(step))


def test_whitening_with_a_full_history_and_no_adam():
    """As many independent gradients as dimensions, little damping: the result is orthogonal to all earlier ones."""
    tx = scale_by_empirical_fisher(6, 1e-6)
    gradients = [normal(i, (2, 3)) for i in range(6)]
    state = tx.init(gradients[0])
    for step, g in enumerate(gradients):
        updates, state = tx.update(g, state, step=step)
    products = [float(jnp.sum(updates * g)) for g in gradients]
    np.testing.assert_allclose(products, [0, 0, 0, 0, 0, 1], atol=1e-2)


def losses(tx, seed, steps=100):
    """A quadratic `<W - W*, C (W - W*) D> / 2` with condition numbers 10 and 1000: final over initial loss."""
    rng = np.random.default_rng(seed)
    rotate = lambda n: np.linalg.qr(rng.normal(size=(n, n)))[0]  # noqa: E731
    q, p, target = rotate(8), rotate(40), jnp.asarray(rng.normal(size=(8, 40)), jnp.float32)
    c = jnp.asarray(q * np.logspace(0, -1, 8) @ q.T, jnp.float32)
    d = jnp.asarray(p * np.logspace(0, -3, 40) @ p.T, jnp.float32)

    def loss(w):
        return 0.5 * jnp.sum((w - target) * (c @ (w - target) @ d))

    def one(carry, step):
        w, state, rate = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w, step=step)
        return (w - rate * updates, state, rate), None

    def train(rate):
        w = jnp.zeros((8, 40))
        return loss(jax.lax.scan(one, (w, tx.init(w), rate), jnp.arange(steps))[0][0]) / loss(w)

    rates = 1e-4 * 3.0 ** jnp.arange(9)
    return float(jnp.min(jax.jit(lambda r: jax.lax.map(train, r))(rates)))


def test_on_a_quadratic_the_gain_of_natural_galore_depends_on_its_damping():
    projection = Projection(4, period=20)
    adam = optax.scale_by_adam(eps=1e-6)
    fisher = lambda *args: optax.chain(scale_by_empirical_fisher(10, *args, period=20), adam)  # noqa: E731
    plain = losses(scale_by_galore(projection, adam, 1.0), 0)
    relative = losses(scale_by_galore(projection, fisher(1.0, "relative"), 1.0), 0)
    absolute = losses(scale_by_galore(projection, fisher(1e-3), 1.0), 0)
    assert relative < 0.7 * plain
    assert absolute > 3 * plain


def test_the_limiter_holds_growth_and_nothing_else():
    tx = limit_norm_growth(1.5)
    x = normal(0, (2, 3, 4))
    norm = lambda y: np.linalg.norm(np.asarray(y), axis=(-2, -1))  # noqa: E731
    first, state = tx.update(x, tx.init(x))
    np.testing.assert_array_equal(first, x)
    factors = jnp.asarray([10.0, 0.5]).reshape(2, 1, 1)
    second, state = tx.update(x * factors, state)
    np.testing.assert_allclose(norm(second), norm(x) * [1.5, 0.5], rtol=1e-5)
    third, _ = tx.update(x * 2.0, state)
    np.testing.assert_allclose(norm(third), norm(x) * [2.0, 0.75], rtol=1e-5)


def test_fira_at_full_rank_is_adam():
    """Nothing is outside of the subspace."""
    g = {"w": normal(0, (4, 6))}
    tx = fira(1.0, axes={"w": ("embed", "mlp")}, rank=4, scale=1.0, eps=0.0)
    updates, state = tx.update(g, tx.init(g), g, step=0)
    rows = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4, 4))
    np.testing.assert_allclose(updates["w"], -(rows @ jnp.sign(rows.mT @ g["w"])), atol=1e-4)


def test_apollo_moves_along_the_gradient_with_one_factor_for_each_channel():
    g = normal(0, (2, 4, 6))
    for scaling, ratio_axes in (("channel", -2), ("tensor", (-2, -1))):
        tx = scale_by_apollo(Projection(2, refresh="gaussian"), scaling=scaling)
        ratio = np.asarray(tx.update(g, tx.init(g), step=0)[0] / g)
        assert (ratio > 0).all()
        np.testing.assert_allclose(ratio.std(ratio_axes) / ratio.mean(ratio_axes), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: galore(0.1, axes=AXES, rank=0), "rank is 0"),
        (lambda: galore(0.1, axes=AXES, rank=2.0), "rank is 2.0"),
        (lambda: galore(0.1, axes=AXES, rank=2, period=0), "period is 0"),
        (lambda: apollo(0.1, axes=AXES, rank=2, period=-5), "period is -5"),
        (lambda: galore(0.1, axes=AXES, rank=2, b1=1.0), "b1 is 1.0"),
        (lambda: galore(0.1, axes=AXES, rank=2, side="small"), "did you mean 'smaller'"),
        (lambda: galore(0.1, axes=AXES, rank=2, refresh="qr"), "refresh is 'qr'"),
        (lambda: fira(0.1, axes=AXES, rank=2, side="both"), "side is 'both'"),
        (lambda: fira(0.1, axes=AXES, rank=2, gamma=0.9), "gamma is 0.9"),
        (lambda: natural_galore(0.1, axes=AXES, rank=2, damping=0.0), "damping is 0.0"),
        (lambda: natural_galore(0.1, axes=AXES, rank=2, history=0), "history is 0"),
        (lambda: apollo(0.1, axes=AXES, rank=2, scaling="row"), "scaling is 'row'"),
        (lambda: galore(0.1, axes=AXES, rank=6).init(values(0)), "rank 6 is larger than kernel, .* 5 x 9"),
        (lambda: apollo(0.1, axes=AXES, rank=6).init(values(0)), "rank 6 is larger than kernel"),
        (lambda: fira(0.1, axes=AXES, rank=2, matrix_roles=("vector",)), "scale is chosen, but its role is 'vector'"),
    ],
)
def test_bad_values_are_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
