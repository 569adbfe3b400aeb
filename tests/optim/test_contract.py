"""What every optimizer of jaxlm promises. A new one joins by a line in `MEMBERS`."""

import collections
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError
from jaxlm.optim import (
    FromHparams,
    adamw,
    adamw_8bit,
    apollo,
    apollo_mini,
    cast,
    fira,
    galore,
    muon,
    natural_galore,
    roles,
    scale_optimizer,
    spam,
    stable_spam,
    swan,
    warmup_stable_decay,
)
from jaxlm.training import Checkpoints, init_state, state_shardings

LOW_RANK = {"rank": 2, "period": 3}

MEMBERS = {
    "adamw": (adamw, {}),
    "adamw_clipped": (adamw, {"clip_norm": 0.5}),
    "muon": (muon, {}),
    "muon_two_rates": (muon, {"consistent_rms": None, "clip_norm": 1.0, "adam_learning_rate": "the same"}),
    "scale": (scale_optimizer, {}),
    "scale_rows_all_momentum": (
        scale_optimizer,
        {"normalization": "row", "momentum_roles": ("matrix", "embed", "head"), "adam_learning_rate": "the same"},
    ),
    "scale_singular": (scale_optimizer, {"normalization": "singular"}),
    "swan": (swan, {}),
    "galore": (galore, {**LOW_RANK, "scale": 1.0}),
    "galore_both_sides_random": (galore, {**LOW_RANK, "scale": 1.0, "side": "both", "refresh": "orthogonal"}),
    "natural_galore": (
        natural_galore,
        {**LOW_RANK, "scale": 1.0, "history": 2, "damping": 1.0, "damping_mode": "relative"},
    ),
    "natural_galore_larger": (natural_galore, {**LOW_RANK, "scale": 1.0, "history": 4, "side": "larger"}),
    "fira": (fira, LOW_RANK),
    "apollo": (apollo, LOW_RANK),
    "apollo_mini": (apollo_mini, {"period": 3, "scale": 4.0, "scale_front": True}),
    "spam": (spam, {"period": 100, "warmup": 3, "quiet": 1, "threshold": 10.0}),
    "stable_spam": (stable_spam, {"period": 100, "decay_steps": 300}),
    "adamw_8bit": (adamw_8bit, {"block": 4, "min_size": 1}),
    # Without the pull to zero, which the suite's other promises leave no room for.
    "cast": (cast, {"total_steps": 10**6, "strength": 0.0, "n": 1, "m": 2, "refresh": 3}),
}
STATIC = (
    "rank", "period", "history", "block", "min_size", "warmup", "quiet", "ns_steps", "seed", "decay_steps",
    "total_steps", "n", "m", "refresh",
)  # fmt: skip


def build(name, learning_rate, axes, factory=None):
    default, settings = MEMBERS[name]
    if "adam_learning_rate" in settings:
        settings = {**settings, "adam_learning_rate": learning_rate}
    return (factory or default)(learning_rate, axes=axes, weight_decay=0.1, **settings)


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


def tree(seed, dtype=jnp.float32, sizes=SIZES):
    """A random value for every leaf of AXES."""
    rng = np.random.default_rng(seed)
    shape = lambda axes: [sizes[name] for name in axes]  # noqa: E731
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


@pytest.fixture(params=MEMBERS)
def member(request):
    return request.param


@pytest.fixture(name="make")
def _make(member):
    return lambda learning_rate=0.01: build(member, learning_rate, AXES)


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


def test_state_arrays_lie_like_their_parameter_or_are_small(make):
    """On a mesh that divides every axis of the large parameters, nothing larger than those is on every device."""
    sizes = {**SIZES, "vocab": 64, "embed": 16, "mlp": 32}
    params = tree(0, sizes=sizes)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
    state = jax.eval_shape(lambda: init_state(params, make(), jax.random.key(0)))
    lies = state_shardings(mesh, state, shardings(mesh, params))
    for leaf, where in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(lies.opt_state), strict=True):
        assert not where.is_fully_replicated or leaf.size <= 2 * 16 * 6, (leaf, where)


def test_the_first_state_can_be_donated(make):
    """No two of its arrays are the same buffer."""
    leaves = jax.tree.leaves(make().init(tree(0)))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


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
    same, _ = update(constant, gradients, constant.init(params), params, jnp.int32(25))
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
    tx.update(gradients, tx.init(params), params, step=STEP, something_else=3)


def test_state_is_a_carry_that_learns(member, make):
    """As in the jitted loop: 300 updates inside one scan bring a quadratic near its minimum.

    With a rank of 2 most of a matrix stands still at any time.
    """
    tx, target, start = make(warmup_stable_decay(0.05, 300, 10, 150)), tree(5), tree(6)

    def distance(p):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (p, target)), strict=True))

    def one(carry, step):
        params, state = carry
        updates, state = update(tx, jax.grad(distance)(params), state, params, step)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda p: jax.lax.scan(one, (p, tx.init(p)), jnp.arange(300)))(start)
    assert distance(params) < (0.35 if "rank" in MEMBERS[member][1] else 0.05) * distance(start)


def test_inject_hyperparams_makes_any_number_a_part_of_the_state(member, make):
    factory = MEMBERS[member][0]
    static = [name for name in STATIC if name in inspect.signature(factory).parameters]
    tx = build(member, 0.3, AXES, optax.inject_hyperparams(factory, static_args=static))
    params, gradients = tree(0), tree(1)
    state = tx.init(params)
    assert {"learning_rate", "weight_decay"} <= set(state.hyperparams)
    for name in ("learning_rate", "adam_learning_rate"):
        if name in state.hyperparams:
            state.hyperparams[name] = jnp.float32(0.01)
    updates, state = update(tx, gradients, state, params)
    expected, _ = update(make(0.01), gradients, make(0.01).init(params), params)
    assert_trees_close(updates, expected, rtol=1e-4, atol=1e-7)


def test_it_is_a_link_in_a_chain(make):
    tx = optax.chain(optax.scale(2.0), make(), optax.scale(0.5))
    params, gradients = tree(0), tree(1)
    updates, _ = update(tx, gradients, tx.init(params), params)
    alone, _ = update(make(), jax.tree.map(lambda g: 2 * g, gradients), make().init(params), params)
    assert_trees_close(updates, jax.tree.map(lambda u: 0.5 * u, alone), rtol=1e-5, atol=1e-8)


def test_a_stack_of_layers_and_experts_equals_each_alone(member):
    """Three updates of a stack, a refresh of low-rank bases among them, against one optimizer a layer."""
    random = MEMBERS[member][1].get("refresh") == "orthogonal" or member.startswith("apollo")
    if random:
        pytest.skip("random projections are drawn for each layer, from the stack's own key")
    axes = {"w": ("layers", "experts", "embed", "mlp")}
    rng = np.random.default_rng(0)
    draws = [jnp.asarray(rng.normal(size=(2, 2, 4, 6)), jnp.float32) for _ in range(4)]
    # Clipping is by the norm of everything, which is another one alone.
    draws = [draws[0], *(d * 1e-3 if "clip_norm" in MEMBERS[member][1] else d for d in draws[1:])]
    stacked = run_updates(build(member, 0.1, axes), [{"w": d} for d in draws])["w"]
    one = build(member, 0.1, {"w": ("embed", "mlp")})
    for i, j in np.ndindex(2, 2):
        alone = run_updates(one, [{"w": d[i, j]} for d in draws])["w"]
        np.testing.assert_allclose(stacked[i, j], alone, rtol=2e-4, atol=1e-6)


def run_updates(tx, draws):
    params, *gradients = draws
    state = tx.init(params)
    for step, g in enumerate(gradients, 2):
        updates, state = update(tx, g, state, params, jnp.int32(step))
    return updates


def test_decompositions_happen_in_the_one_branch_of_a_refresh(make):
    """Also for many members in one program: a `cond` on something mapped would become a `select`."""
    tx, params = make(), tree(0)
    states = jax.eval_shape(lambda: jax.vmap(lambda _: tx.init(params))(jnp.arange(2)))
    stacked = jax.eval_shape(lambda: jax.tree.map(lambda p: jnp.stack([p, p]), params))

    def one(g, s, p, step):
        return tx.update(g, s, p, step=step)

    for traced in (
        jax.make_jaxpr(one)(params, jax.eval_shape(tx.init, params), params, STEP),
        jax.make_jaxpr(jax.vmap(one, in_axes=(0, 0, 0, None)))(stacked, states, stacked, STEP),
    ):
        always, inside = primitives(traced.jaxpr)
        assert inside["cond"] == 0
        assert not {"svd", "qr", "eigh"} & set(always)
        assert always["cond"] == int(bool(inside))


def primitives(jaxpr):
    """Counts of primitives that always run, and of those in branches of `cond`."""
    always, inside = collections.Counter(), collections.Counter()
    for eqn in jaxpr.eqns:
        always[eqn.primitive.name] += 1
        for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if not (hasattr(sub, "jaxpr") or hasattr(sub, "eqns")):
                continue
            a, b = primitives(getattr(sub, "jaxpr", sub))
            inside += b + (a if eqn.primitive.name == "cond" else collections.Counter())
            always += collections.Counter() if eqn.primitive.name == "cond" else a
    return always, inside


def shardings(mesh, params, axes=AXES):
    rules = {"router": None, "conv_width": None}
    return sharding.shardings(mesh, axes, jax.eval_shape(lambda: params), rules)


def few(full):
    """One leaf of every kind that optimizers tell apart: what is compiled for eight devices takes long."""
    return {"head": full["head"], "norm": full["norm"], "runs": [{"expert": full["runs"][0]["expert"]}]}


def test_sharded_over_eight_devices_equals_one_device(make):
    sizes = {**SIZES, "vocab": 12, "embed": 4, "mlp": 8}
    tx, params = make(), few(tree(0, sizes=sizes))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    lies = state_shardings(mesh, init_state(params, tx, jax.random.key(0)), shardings(mesh, params, few(AXES)))
    state = tx.init(params)
    placed, there = jax.device_put(state, lies.opt_state), jax.device_put(params, lies.trainable)
    sharded = jax.jit(
        lambda g, s, p, step: tx.update(g, s, p, step=step), out_shardings=(lies.trainable, lies.opt_state)
    )
    for step in (2, 3, 4):  # the second one refreshes
        gradients = few(tree(step, sizes=sizes))
        updates, state = update(tx, gradients, state, params, jnp.int32(step))
        there_updates, placed = sharded(jax.device_put(gradients, lies.trainable), placed, there, jnp.int32(step))
        assert_trees_close(jax.device_get(there_updates), jax.device_get(updates), rtol=1e-3, atol=1e-5)


def test_saved_and_restored_it_goes_on_to_the_bit(tmp_path):
    """All members in one checkpoint, written between two refreshes and read in a fresh state."""
    params = few(tree(0))

    def updates_of(states, steps):
        out, states = {}, dict(states)
        for name in MEMBERS:
            for step in steps:
                gradients = few(tree(step + 1))
                out[name], states[name] = update(txs[name], gradients, states[name], params, jnp.int32(step))
        return out, states

    txs = {name: build(name, 0.1, AXES) for name in MEMBERS}
    _, states = updates_of({name: tx.init(params) for name, tx in txs.items()}, range(2))
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.save(1, states, {})
    checkpoints.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states)
    restored = checkpoints.restore(abstract).state
    checkpoints.close()
    straight, resumed = updates_of(states, range(2, 5)), updates_of(restored, range(2, 5))
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)


NEEDS_MATRICES = [name for name, (factory, _) in MEMBERS.items() if factory not in (adamw, spam, stable_spam)]


@pytest.mark.parametrize("name", NEEDS_MATRICES)
def test_roles_that_match_nothing_are_refused(name):
    with pytest.raises(ConfigError, match=r"touch no parameter.*vector: norm"):
        build(name, 0.1, {"norm": ("embed",)})
    tx = build(name, 0.1, {"norm": ("embed",), "w": ("embed", "mlp")})
    with pytest.raises(ConfigError, match="none of the parameters that are trained"):
        tx.init({"norm": jnp.ones(4), "w": None})


def test_a_leaf_without_a_role_is_an_error_before_any_compute():
    for name in MEMBERS:
        with pytest.raises(ConfigError, match="block/query"):
            build(name, 0.1, {"block": {"query": ("layers", "embed", "heads", "head_dim")}})
