"""What every optimizer of jaxlm promises. A new one joins by a line in `MEMBERS`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.optim import FromHparams, adamw, muon, roles, warmup_stable_decay

MEMBERS = {
    "adamw": lambda axes, learning_rate: adamw(learning_rate, axes=axes),
    "adamw_clipped": lambda axes, learning_rate: adamw(learning_rate, axes=axes, clip_norm=0.5),
    "muon": lambda axes, learning_rate: muon(learning_rate, axes=axes),
    "muon_two_rates": lambda axes, learning_rate: muon(
        learning_rate, axes=axes, adam_learning_rate=learning_rate, consistent_rms=None, clip_norm=1.0
    ),
}

AXES = {
    "embed": {"table": ("vocab", "embed")},
    "positions": ("positions", "embed"),
    "runs": [
        {
            "scale": ("layers", "embed"),
            "up": ("layers", "embed", "mlp"),
            "expert": ("layers", "experts", "mlp", "embed"),
            "router": ("layers", "embed", "router"),
            "conv": ("layers", "conv_width", "embed"),
        }
    ],
    "norm": ("embed",),
    "head": ("embed", "vocab"),
}
SIZES = {
    "vocab": 11,
    "embed": 6,
    "positions": 5,
    "layers": 3,
    "mlp": 8,
    "experts": 2,
    "router": 2,
    "conv_width": 4,
}
STEP = jnp.int32(7)


def tree(seed, dtype=jnp.float32):
    """A random value for every leaf of AXES."""
    rng = np.random.default_rng(seed)
    shape = lambda axes: [SIZES[name] for name in axes]  # noqa: E731
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=shape(a)), dtype), AXES, is_leaf=roles.is_axes)


def loss_fn(params):
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


@functools.cache
def compiled(tx):
    """`tx.update` with every extra argument that a training step gives."""

    def call(gradients, state, params, step, hparams, key):
        return tx.update(gradients, state, params, step=step, hparams=hparams, key=key, loss_fn=loss_fn)

    return jax.jit(call)


def update(tx, gradients, state, params, step=STEP, hparams=None):
    return compiled(tx)(gradients, state, params, step, hparams, jax.random.key(0))


def assert_trees_close(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.fixture(params=MEMBERS, name="make")
def _make(request):
    return lambda learning_rate=0.01: MEMBERS[request.param](AXES, learning_rate)


def test_jit_gives_what_eager_gives_and_compiles_once(make):
    def of(full):  # two leaves are enough, and eager operations are slow
        return {"norm": full["norm"], "runs": [{"up": full["runs"][0]["up"]}]}

    tx, params = make(warmup_stable_decay(0.01, 100, 10, 10)), of(tree(0))
    traced = jax.jit(lambda g, s, p, step: tx.update(g, s, p, step=step))
    eager_state = jit_state = tx.init(params)
    for step in range(3):
        eager, eager_state = tx.update(of(tree(step + 1)), eager_state, params, step=jnp.int32(step))
        jitted, jit_state = traced(of(tree(step + 1)), jit_state, params, jnp.int32(step))
        assert_trees_close(eager, jitted, rtol=1e-4, atol=1e-6)
    assert_trees_close(eager_state, jit_state, rtol=1e-4, atol=1e-6)
    assert traced._cache_size() == 1


def test_members_under_vmap_equal_members_alone_each_with_its_own_rate(make):
    tx = make(FromHparams("learning_rate", warmup_stable_decay(1.0, 100, 10, 10)))
    members = 3
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    params = [tree(10 + i) for i in range(members)]
    rates = [{"learning_rate": jnp.float32(r)} for r in (1e-3, 1e-2, 0.0)]

    together = jax.jit(
        jax.vmap(lambda g, s, p, h, step: update(tx, g, s, p, step, hparams=h), in_axes=(0, 0, 0, 0, None))
    )
    states = [tx.init(p) for p in params]
    stacked_states = stack(states)
    for step in range(2):
        gradients = [tree(100 * step + i) for i in range(members)]
        stacked, stacked_states = together(
            stack(gradients), stacked_states, stack(params), stack(rates), jnp.int32(step + 1)
        )
        for i in range(members):
            alone, states[i] = update(tx, gradients[i], states[i], params[i], jnp.int32(step + 1), hparams=rates[i])
            assert_trees_close(jax.tree.map(lambda u, i=i: u[i], stacked), alone, rtol=1e-4, atol=1e-6)
    assert not any(np.any(u) for u in jax.tree.leaves(alone))  # the member whose rate is 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_updates_and_state_keep_dtypes_shapes_and_structure(make, dtype):
    tx, params = make(warmup_stable_decay(0.01, 100, 10, 10)), tree(0, dtype)
    state = tx.init(params)
    updates, new_state = update(tx, tree(1, dtype), state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    of = lambda s: jax.eval_shape(lambda: s)  # noqa: E731
    assert of(new_state) == of(state)
    assert jax.eval_shape(tx.init, params) == of(state)


def test_state_arrays_have_the_shape_of_a_parameter_or_are_small(make):
    """Sharding follows from this: a state array is laid out like its parameter, or replicated."""
    params = tree(0)
    shapes = {p.shape for p in jax.tree.leaves(params)}
    for leaf in jax.tree.leaves(jax.eval_shape(make().init, params)):
        assert leaf.shape in shapes or leaf.size <= 64, leaf


def test_frozen_leaves_are_left_out_and_the_others_do_not_notice(make):
    tx, params, gradients = make(), tree(0), tree(1)

    def frozen(full):  # as a partition into trainable and frozen leaves writes it
        return {**full, "embed": {"table": None}, "runs": [{**full["runs"][0], "up": None}]}

    updates, state = update(tx, frozen(gradients), tx.init(frozen(params)), frozen(params))
    assert jax.tree.structure(updates) == jax.tree.structure(frozen(params))
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert params["embed"]["table"].shape not in shapes
    assert params["runs"][0]["up"].shape not in shapes

    # The global norm that clipping divides by does notice: give the frozen leaves no gradient there.
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    silent = {
        **gradients,
        "embed": zeros["embed"],
        "runs": [{**gradients["runs"][0], "up": zeros["runs"][0]["up"]}],
    }
    full, _ = update(tx, silent, tx.init(params), params)
    assert_trees_close(updates, frozen(full), rtol=1e-5, atol=1e-7)


def test_optax_masked_freezes_too(make):
    params, gradients = tree(0), tree(1)
    trained = {**jax.tree.map(lambda _: True, params), "head": False}
    tx = optax.masked(make(), trained)
    updates, _ = update(tx, gradients, tx.init(params), params)
    np.testing.assert_array_equal(updates["head"], gradients["head"])  # optax passes masked updates through
    assert np.any(np.asarray(updates["norm"] != gradients["norm"]))


def test_zero_gradients_give_finite_updates_that_only_decay(make):
    tx, params = make(0.01), tree(0)
    updates, state = update(tx, jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
    decayed = roles.mask(params, AXES, ("matrix", "embed", "head", "router", "conv"))
    expected = jax.tree.map(lambda p, d: -0.01 * 0.1 * p if d else jnp.zeros_like(p), params, decayed)
    assert_trees_close(updates, expected, rtol=1e-5, atol=1e-9)


def test_the_rate_follows_the_step_of_the_caller_not_a_count(make):
    params, gradients = tree(0), tree(1)
    tx = make(warmup_stable_decay(1.0, 100, 50, 10))
    state = tx.init(params)
    late, _ = update(tx, gradients, state, params, jnp.int32(25))
    constant = make(0.5)
    same, _ = update(constant, gradients, constant.init(params), params)
    assert_trees_close(late, same, rtol=1e-6, atol=1e-9)
    at_zero, _ = update(tx, gradients, state, params, jnp.int32(0))
    assert not any(np.any(u) for u in jax.tree.leaves(at_zero))


def test_missing_step_and_hparams_are_named_and_unknown_extra_arguments_ignored(make):
    params, gradients = tree(0), tree(1)
    tx = make(warmup_stable_decay(1.0, 100, 50, 10))
    with pytest.raises(ConfigError, match="follows the step"):
        tx.update(gradients, tx.init(params), params)
    tx = make(FromHparams("learning_rate"))
    with pytest.raises(ConfigError, match=r"hparams\['learning_rate'\], but update\(\) was given no hparams"):
        tx.update(gradients, tx.init(params), params, step=STEP)
    with pytest.raises(ConfigError, match="did you mean 'learning_rat'"):
        tx.update(gradients, tx.init(params), params, step=STEP, hparams={"learning_rat": 1.0})
    tx = make(0.1)
    tx.update(gradients, tx.init(params), params, something_else=3)


def test_state_is_a_carry_that_learns(make):
    """As in the jitted loop: 300 updates inside one scan bring a quadratic near its minimum."""
    tx, target, start = make(warmup_stable_decay(0.05, 300, 10, 150)), tree(5), tree(6)

    def distance(p):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (p, target)), strict=True))

    def one(carry, step):
        params, state = carry
        updates, state = update(tx, jax.grad(distance)(params), state, params, step)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda p: jax.lax.scan(one, (p, tx.init(p)), jnp.arange(300)))(start)
    assert distance(params) < 0.05 * distance(start)


def test_a_leaf_without_a_role_is_an_error_before_any_compute():
    for factory in MEMBERS.values():
        with pytest.raises(ConfigError, match="block/query"):
            factory({"block": {"query": ("layers", "embed", "heads", "head_dim")}}, 0.1)
