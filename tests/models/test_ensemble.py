"""Ensembles against plain means over members, and the inequality that makes them work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError
from jaxlm.models import Decoder, EnsembleModel, ensemble_logits, stack_members
from jaxlm.models.ensemble import COMBINE, add_member, member, num_members
from jaxlm.objectives import CausalLM, Distillation, StepContext
from jaxlm.testing import randomize, tiny_config

LOGITS = 3 * jax.random.normal(jax.random.key(0), (5, 4, 7, 11))
TARGETS = jax.random.randint(jax.random.key(1), (4, 7), 0, 11)


def nll(logits):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.broadcast_to(TARGETS, logits.shape[:-1])[..., None], -1)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, atol=atol)


def test_no_token_is_worse_than_its_members_mean():
    # Jensen: cross-entropy is convex in the logits, and -log in the probability.
    for combine in COMBINE:
        assert (nll(ensemble_logits(LOGITS, combine)) <= jnp.mean(nll(LOGITS), axis=0) + 1e-5).all()


def test_probabilities_are_averaged_or_logits():
    close(jnp.exp(ensemble_logits(LOGITS, "probabilities")), jnp.mean(jax.nn.softmax(LOGITS), axis=0))
    geometric = jnp.prod(jax.nn.softmax(LOGITS), axis=0) ** (1 / 5)
    close(jax.nn.softmax(ensemble_logits(LOGITS)), geometric / geometric.sum(-1, keepdims=True))


@pytest.mark.parametrize("combine", COMBINE)
def test_members_may_come_one_by_one_in_any_order(combine):
    expected = jax.nn.log_softmax(ensemble_logits(LOGITS, combine))
    close(jax.nn.log_softmax(ensemble_logits(LOGITS[jnp.array([3, 1, 4, 0, 2])], combine)), expected)
    combined = jnp.ones_like(LOGITS[0])  # what is there before the first member does not matter
    for count, logits in enumerate(LOGITS):
        combined = add_member(combined, logits, count, combine)
    close(jax.nn.log_softmax(combined), expected)


@pytest.mark.parametrize("combine", COMBINE)
def test_constants_of_a_token_change_nothing_and_copies_are_the_member(combine):
    shifted = LOGITS + jnp.arange(5.0)[:, None, None, None] * jnp.arange(7.0)[None, None, :, None]
    close(nll(ensemble_logits(shifted, combine)), nll(ensemble_logits(LOGITS, combine)), 1e-4)
    close(nll(ensemble_logits(jnp.stack([LOGITS[0]] * 3), combine)), nll(LOGITS[0]))
    hotter = LOGITS.at[0].multiply(2.0)
    assert jnp.abs(nll(ensemble_logits(hotter, combine)) - nll(ensemble_logits(LOGITS, combine))).max() > 0.1


def setting(family):
    model = Decoder(tiny_config(family, num_layers=2))
    members = [randomize(model.init(jax.random.key(i))["params"], i) for i in range(3)]
    tokens = jax.random.randint(jax.random.key(9), (2, 9), 0, 64)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": jnp.ones((2, 8)).at[0, 5:].set(0.0)}
    batch |= {"segment_ids": jnp.array([[1, 1, 1, 2, 2, 0, 0, 0], [1] * 8])}
    batch |= {"positions": jnp.array([[0, 1, 2, 0, 1, 0, 0, 0], list(range(8))])}
    return model, members, batch


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # an untied head; a tied one and learned positions
def test_the_model_is_the_mean_of_its_members(family):
    model, members, batch = setting(family)
    ensemble, stacked = EnsembleModel(model), stack_members(members)
    more = (batch["positions"], batch["segment_ids"])
    logits = jnp.stack([model.apply({"params": p}, batch["inputs"], *more) for p in members])
    close(ensemble.apply({"params": stacked}, batch["inputs"], *more), logits.mean(axis=0), 1e-4)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits.mean(axis=0)), batch["targets"][..., None], -1)[..., 0]
    found = CausalLM(ensemble, chunk_length=3).sums(stacked, batch)
    assert float(found["nll"]) == pytest.approx(-float(jnp.sum(batch["loss_weights"] * picked)), rel=1e-4)
    assert num_members(stacked) == 3
    jax.tree.map(np.testing.assert_array_equal, member(stacked, 1), members[1])


def test_members_may_lie_on_a_mesh():
    model, members, batch = setting("llama")
    objective, stacked = CausalLM(EnsembleModel(model), chunk_length=3), stack_members(members)
    axes = jax.tree.map(lambda names: (None, *names), model.axes(), is_leaf=sharding.is_axes)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=2, tensor=4))
    rules = model.config.sharding_rules(mesh)
    expected = jax.jit(objective.sums)(stacked, batch)
    with sharding.use_mesh(mesh, rules):
        placed = jax.device_put(stacked, sharding.shardings(mesh, axes, stacked, rules))
        found = jax.jit(lambda *args: objective.sums(*args))(placed, batch)  # traced anew
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_an_ensemble_is_a_teacher():
    model, members, batch = setting("llama")
    objective = Distillation(model, weight=1.0, teacher_model=EnsembleModel(model))

    def divergence(student, teachers):
        ctx = StepContext(frozen=stack_members(teachers))
        return float(objective.loss(student, batch, ctx, objective.totals(student, batch, ctx))[0])

    assert divergence(members[0], [members[0]] * 2) == pytest.approx(0, abs=1e-5)
    assert divergence(members[0], members) > 1e-3


def test_what_is_no_ensemble_is_refused():
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    for attempt, said in (
        (lambda: stack_members([]), "no members"),
        (lambda: stack_members([params, {**params, "b": jnp.ones(4)}]), "member 1 of an ensemble has b"),
        (lambda: stack_members([params, {"a": jnp.ones(2)}]), "nowhere"),
        (lambda: num_members(params), r"leading axes of sizes \[2, 3\]"),
        (lambda: member(stack_members([params]), 1), "member 1 of an ensemble of 1"),
        (lambda: ensemble_logits(LOGITS, "logit"), "did you mean 'logits'"),
        (lambda: EnsembleModel(Decoder(tiny_config("llama")), "mean"), "combine is 'mean'"),
    ):
        with pytest.raises(ConfigError, match=said):
            attempt()
