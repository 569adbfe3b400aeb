"""Populations: a member is its own run, alone, mapped or resumed."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.keys import fold
from jaxlm.data.resident import ResidentRows
from jaxlm.evals import resident_loss
from jaxlm.models import Decoder
from jaxlm.objectives import CausalLM
from jaxlm.optim import FromHparams, adamw
from jaxlm.optim.config import OptimizerConfig
from jaxlm.testing import tiny_config
from jaxlm.training import Member, Population, init_state, make_step

MODEL = Decoder(tiny_config("llama", num_layers=1))
OBJECTIVE = CausalLM(MODEL)
TX = adamw(FromHparams(), axes=MODEL.axes(), weight_decay=0.0)
IDS = np.random.default_rng(0).integers(0, 64, (12, 9)).astype(np.int32)
ROWS = ResidentRows(
    {"inputs": jnp.asarray(IDS[:, :-1]), "targets": jnp.asarray(IDS[:, 1:]), "loss_weights": jnp.ones((12, 8))}
)
MEMBERS = [Member("slow", 0, {"learning_rate": 1e-3}), Member("fast", 0, {"learning_rate": 1e-2}),
           Member("other", 1, {"learning_rate": 1e-2})]  # fmt: skip


def init(key, hparams):
    return init_state(MODEL.init(key)["params"], TX, key, hparams=hparams)


LOSS = resident_loss(OBJECTIVE, ROWS, 4)
POPULATION = Population(
    init,
    make_step(OBJECTIVE, TX),
    sample=lambda key, step: ROWS.sample(key, step, 4),
    num_steps=5,
    evaluate=lambda params: {"loss": LOSS(params)},
    how="loop",
)


@pytest.fixture(scope="module")
def looped():
    return POPULATION.train(MEMBERS, keep_params=True)


def test_members_are_the_runs_of_a_plain_loop(looped):
    step = jax.jit(make_step(OBJECTIVE, TX))
    key = jax.random.key(1)
    state, losses = init(key, {"learning_rate": 1e-2}), []
    for i in range(5):
        state, metrics = step(state, None, ROWS.sample(fold(key, "data"), jnp.int32(i), 4))
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    np.testing.assert_allclose(looped[2].history["loss"], losses, rtol=1e-5)
    chex.assert_trees_all_close(looped[2].params, state.trainable, atol=1e-4)
    assert looped[2].results["loss"] == pytest.approx(
        float(LOSS(state.trainable)), rel=1e-4
    )


def test_mapped_members_are_the_same(looped):
    for one, other in zip(looped, dataclasses.replace(POPULATION, how="vmap").train(MEMBERS, keep_params=True)):
        assert one.member == other.member
        chex.assert_trees_all_close(one.history, other.history, rtol=1e-4)
        chex.assert_trees_all_close(one.params, other.params, atol=1e-4)
        assert one.results == pytest.approx(other.results, rel=1e-4)


def test_a_study_goes_on_with_the_members_that_are_missing(looped, tmp_path):
    seen = []
    POPULATION.train(MEMBERS[:2], keep_params=True, folder=tmp_path, report=seen.append)
    again = POPULATION.train(MEMBERS, keep_params=True, folder=tmp_path, report=seen.append)
    assert [outcome.member.name for outcome in seen] == ["slow", "fast", "other"]
    for one, other in zip(looped, again):
        chex.assert_trees_all_equal(one.params, other.params)
        chex.assert_trees_all_close(one.history, other.history)
        assert one.results == other.results
    kept = json.loads((tmp_path / "slow.json").read_text())
    assert kept["num_steps"] == 5
    assert len(kept["history"]["loss"]) == 5
    with pytest.raises(DataError, match="slow.json is of a run with other settings"):
        POPULATION.train([MEMBERS[0]._replace(seed=3)], folder=tmp_path)


def test_kept_parameters_come_back_in_their_own_format_or_with_a_named_error(tmp_path):
    def narrow(key, hparams):
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), MODEL.init(key)["params"])
        return init_state(params, TX, key, hparams=hparams)

    population = dataclasses.replace(POPULATION, init=narrow, evaluate=None)
    (kept,) = population.train(MEMBERS[:1], keep_params=True, folder=tmp_path)
    (again,) = population.train(MEMBERS[:1], keep_params=True, folder=tmp_path)
    chex.assert_trees_all_equal(again.params, kept.params)
    chex.assert_trees_all_equal_dtypes(again.params, kept.params)
    (tmp_path / "slow.npz").write_bytes((tmp_path / "slow.npz").read_bytes()[:-100])
    with pytest.raises(DataError, match="slow.npz cannot be read"):
        population.train(MEMBERS[:1], keep_params=True, folder=tmp_path)


def test_a_member_that_diverges_says_so(tmp_path):
    (outcome,) = POPULATION.train([Member("wild", 0, {"learning_rate": 1e30})], folder=tmp_path)
    assert not np.isfinite(outcome.results["loss"])
    (again,) = POPULATION.train([Member("wild", 0, {"learning_rate": 1e30})], folder=tmp_path)
    np.testing.assert_equal(again.results["loss"], outcome.results["loss"])


def test_what_cannot_be_trained_is_refused():
    for members, said in (
        ([], "no members"),
        ([MEMBERS[0], MEMBERS[0]], "several members are named slow"),
        ([MEMBERS[0], Member("bare", 0)], "hparams of 'bare' are \\[\\]"),
        ([Member("nan", 0, {"learning_rate": np.nan})], "learning_rate is not finite"),
    ):
        with pytest.raises(ConfigError, match=said):
            POPULATION.train(members)
    with pytest.raises(ConfigError, match="how is 'pmap'"):
        dataclasses.replace(POPULATION, how="pmap")


def on_devices(how, count):
    population = dataclasses.replace(POPULATION, how=how, devices=tuple(jax.devices()[:count]))
    return population.train(MEMBERS, keep_params=True)


@pytest.fixture(scope="module")
def divided():
    return on_devices("loop", 8)


@pytest.mark.parametrize(("how", "devices"), [("map", 1), ("loop", 2), ("map", 2), ("loop", 3)])
def test_members_have_the_same_bits_however_they_are_divided(looped, divided, how, devices):
    for one, other in zip(looped if devices == 1 else divided, on_devices(how, devices)):
        chex.assert_trees_all_equal(one.params, other.params)
        assert one.results == other.results
        np.testing.assert_array_equal(one.history["loss"], other.history["loss"])
        # A sum that is only reported may be fused otherwise in another program.
        chex.assert_trees_all_close(one.history, other.history, rtol=1e-5)


def test_many_devices_train_the_members_of_one(looped, divided):
    """Not to the bit: a program for several devices goes through other passes of XLA, which fuse other operations; a
    gradient's last bit differs, and Adam's first steps divide small gradients by their size."""
    for one, other in zip(looped, divided):
        chex.assert_trees_all_close(one.params, other.params, atol=1e-5)
        chex.assert_trees_all_close(one.history, other.history, rtol=1e-5)
        assert one.results == pytest.approx(other.results, rel=1e-5)


def test_weight_decay_is_a_number_of_each_member():
    tx = OptimizerConfig("adamw").make(5, MODEL.axes(), sweep=("learning_rate", "weight_decay"))

    def fixed(decay):
        return OptimizerConfig("adamw", weight_decay=decay).make(5, MODEL.axes(), sweep=True)

    def train(tx, **hparams):
        population = dataclasses.replace(
            POPULATION,
            init=lambda key, h: init_state(MODEL.init(key)["params"], tx, key, hparams=h),
            step=make_step(OBJECTIVE, tx),
            num_steps=2,
            evaluate=None,
        )
        (outcome,) = population.train([Member("a", 0, {"learning_rate": 1e-2, **hparams})], keep_params=True)
        return outcome.params

    for decay in (0.0, 3.0):
        chex.assert_trees_all_close(train(tx, weight_decay=decay), train(fixed(decay)), atol=1e-6)
    with pytest.raises(ConfigError, match="optimizer.b1 cannot be swept"):
        OptimizerConfig().make(5, MODEL.axes(), sweep=("b1",))


def test_a_data_seed_changes_the_order_of_data_alone():
    members = [Member(f"{seed}", 0, {"learning_rate": 0.0}, data_seed=seed) for seed in (0, 1)]
    plain, (same, other) = POPULATION.train(MEMBERS[:1]), POPULATION.train(members, keep_params=True)
    chex.assert_trees_all_equal(same.params, other.params)
    assert same.history["loss"][0] == plain[0].history["loss"][0]
    assert same.history["loss"][0] != other.history["loss"][0]
