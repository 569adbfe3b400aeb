"""The step's contract: exact accumulation, frozen and extra trees, populations, non-finite steps."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.objectives import Aux, CausalLM
from jaxlm.optim import FromHparams, adamw, roles
from jaxlm.testing import tiny_decoder
from jaxlm.training import accumulate, init_state, make_step

WIDTH, LENGTH, BATCH = 6, 5, 8


class TwoTerms:
    """A regression to a teacher over pairs, and an L1 term, each with a normalizer of its own.

    The teacher is frozen; `extra` counts the rows seen.
    """

    def totals(self, params, batch, ctx):
        return {"left": jnp.sum(batch["weights"][:, 0]), "right": jnp.sum(batch["weights"][:, 1] ** 2)}

    def loss(self, params, batch, ctx, totals):
        x, w = batch["inputs"], batch["weights"]
        error = jnp.square(jnp.tanh(x @ params["w"]) - x @ ctx.frozen["teacher"]).mean(-1)
        left = jnp.sum(w[:, 0] * error[:, 0]) / totals["left"]
        right = jnp.sum(w[:, 1] ** 2 * jnp.abs(x[:, 1] @ params["v"])) / totals["right"]
        rows = jnp.asarray(x.shape[0], jnp.float32)
        extra = {"rows": ctx.extra["rows"] + rows}
        return left + right, Aux({"loss": (jnp.sum(error), rows)}, extra)


def pairs(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "inputs": jnp.asarray(rng.normal(size=(BATCH, 2, LENGTH, WIDTH)), jnp.float32),
        "weights": jnp.asarray(rng.random((BATCH, 2, LENGTH)), jnp.float32),
    }


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32),
        "v": jnp.asarray(rng.normal(size=(WIDTH,)), jnp.float32),
    }


FROZEN = {"teacher": jnp.asarray(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)), jnp.float32)}


def build(trainable, frozen, step):
    return trainable


def periodic_svd(rate_from):
    """Keeps the leading singular direction of `w`'s gradient, found anew every third step."""

    def init(params):
        return {"basis": jnp.zeros((WIDTH, 1))}

    def update(grads, state, params=None, *, step, hparams, **extra):
        fresh = lambda g: jnp.linalg.svd(g)[0][:, :1]  # noqa: E731
        basis = jax.lax.cond(step % 3 == 0, fresh, lambda g: state["basis"], grads["w"])
        rate = hparams[rate_from]
        updates = {"w": -rate * basis @ (basis.T @ grads["w"]), "v": -rate * grads["v"]}
        return updates, {"basis": basis}

    return optax.GradientTransformationExtraArgs(init, update)


def start(tx, seed=0, rate=0.1):
    extra = {"rows": jnp.zeros(())}
    return init_state(parameters(seed), tx, jax.random.key(seed), extra=extra, hparams={"rate": rate})


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_micro_batches_give_the_gradients_of_one_batch(pieces):
    tx = optax.sgd(1.0)
    one = make_step(TwoTerms(), tx, build=build)
    many = make_step(TwoTerms(), tx, build=build, gradients=functools.partial(accumulate, micro_batches=pieces))
    batch = pairs()
    (a, metrics_a), (b, metrics_b) = (jax.jit(f)(start(tx), FROZEN, batch) for f in (one, many))
    chex.assert_trees_all_close(a.trainable, b.trainable, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics_a, metrics_b, rtol=1e-5)
    assert float(b.extra["rows"]) == BATCH
    # ... and not those of a mean of means, which is what averaging micro-batch losses would give.
    piece = jax.tree.map(lambda x: x[:: BATCH // 2], batch)
    assert not np.allclose(jax.jit(one)(start(tx), FROZEN, piece)[0].trainable["v"], a.trainable["v"], rtol=1e-3)


def test_a_population_equals_runs_of_its_own():
    tx = periodic_svd("rate")
    step = make_step(TwoTerms(), tx, build=build)
    rates = [0.05, 0.1, 0.2]
    states = [start(tx, seed, rate) for seed, rate in enumerate(rates)]
    mapped = jax.tree.map(lambda *x: jnp.stack(x), *states)
    mapped = mapped.__class__(**{**vars(mapped), "step": states[0].step})
    axes = mapped.__class__(step=None, trainable=0, opt_state=0, extra=0, key=0, hparams=0)
    together = jax.jit(jax.vmap(step, in_axes=(axes, None, None), out_axes=(axes, 0)))
    alone = jax.jit(step)
    for i in range(5):
        batch = pairs(i)
        mapped, _ = together(mapped, FROZEN, batch)
        states = [alone(state, FROZEN, batch)[0] for state in states]
    for member, state in enumerate(states):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x: x[member], mapped.trainable),  # noqa: B023
            state.trainable,
            rtol=2e-4,
            atol=1e-5,
        )
    assert int(mapped.step) == 5


def test_a_periodic_svd_stays_a_conditional_under_vmap():
    tx = periodic_svd("rate")
    step = make_step(TwoTerms(), tx, build=build)
    states = [start(tx, seed) for seed in range(3)]
    mapped = jax.tree.map(lambda *x: jnp.stack(x), *states)
    mapped = mapped.__class__(**{**vars(mapped), "step": states[0].step})
    axes = mapped.__class__(step=None, trainable=0, opt_state=0, extra=0, key=0, hparams=0)
    together = jax.jit(jax.vmap(step, in_axes=(axes, None, None), out_axes=(axes, 0)))
    text = together.lower(mapped, FROZEN, pairs()).compile().as_text()
    assert "conditional(" in text
    # With a mapped step it degenerates to a select: what this test guards against.
    every = axes.__class__(step=0, trainable=0, opt_state=0, extra=0, key=0, hparams=0)
    worse = jax.tree.map(lambda *x: jnp.stack(x), *states)
    degenerate = jax.jit(jax.vmap(step, in_axes=(every, None, None), out_axes=(every, 0)))
    assert "conditional(" not in degenerate.lower(worse, FROZEN, pairs()).compile().as_text()


def test_only_what_is_trained_changes_layer_by_layer_and_weight_decay_included():
    model, params = tiny_decoder("llama")
    axes = model.axes()

    def wanted(path, role):
        if "attention/" in path:
            return [False, True, False, True]
        return "mlp/down" in path

    trainable, frozen = trees.partition(params, wanted, roles.roles(axes))
    chex.assert_trees_all_equal(trees.merge(trainable, frozen), params)
    tx = adamw(0.1, axes=axes, weight_decay=0.5)
    step = jax.jit(make_step(CausalLM(model), tx))
    state = init_state(trainable, tx, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 9), 0, 64)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": jnp.ones((2, 8))}
    for _ in range(2):
        state, _ = step(state, frozen, batch)
    after = trees.merge(state.trainable, frozen)
    for (path, old), (_, new) in zip(trees.named_leaves(params), trees.named_leaves(after), strict=True):
        changed = np.any(np.asarray(old) != np.asarray(new), axis=tuple(range(1, old.ndim)))
        if path.startswith("blocks"):
            expected = {"attention/": [False, True, False, True], "mlp/down": [True] * 4}
            assert changed.tolist() == next((v for k, v in expected.items() if k in path), [False] * 4), path
        else:
            assert not changed.any(), path


def test_a_step_that_is_not_finite_changes_nothing_but_the_count():
    tx = optax.adam(0.1)
    step = jax.jit(make_step(TwoTerms(), tx, build=build))
    state, _ = step(start(tx), FROZEN, pairs())
    bad = pairs()
    bad["inputs"] = bad["inputs"].at[0, 0, 0, 0].set(jnp.nan)
    after, metrics = step(state, FROZEN, bad)
    chex.assert_trees_all_equal(
        (after.trainable, after.opt_state, after.extra), (state.trainable, state.opt_state, state.extra)
    )
    assert int(after.step) == 2
    assert float(metrics["skipped"][0]) == 1.0


def test_weights_are_never_constants_of_the_compiled_step():
    model, params = tiny_decoder("llama")
    tx = adamw(FromHparams(), axes=model.axes())
    step = make_step(CausalLM(model), tx)
    state = init_state(params, tx, jax.random.key(0), hparams={"learning_rate": 1e-3})
    batch = {
        "inputs": jnp.zeros((2, 8), jnp.int32),
        "targets": jnp.zeros((2, 8), jnp.int32),
        "loss_weights": jnp.ones((2, 8)),
    }
    jaxpr = jax.make_jaxpr(step)(state, None, batch)
    assert all(np.size(c) < 1000 for c in jaxpr.consts)


def test_a_batch_that_cannot_be_cut_is_refused():
    tx = optax.sgd(1.0)
    step = make_step(TwoTerms(), tx, build=build, gradients=functools.partial(accumulate, micro_batches=3))
    with pytest.raises(ConfigError, match="cannot be cut into 3"):
        step(start(tx), FROZEN, pairs())
