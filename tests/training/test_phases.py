"""Phases on a regression whose best checkpoint is not its last."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.data.resident import ResidentRows
from jaxlm.optim import FromHparams, scale_by_learning_rate
from jaxlm.training import Member, Phase, Population, Sweep, init_state, keep_best, run_phased, stack_phases, start_best
from jaxlm.training.state import TrainState

TX = optax.chain(optax.trace(0.9), scale_by_learning_rate(FromHparams("rate")))
MEMBER = Member("m", 0, {"rate": 0.05})
START = {"w": jnp.zeros(())}


def step(state, frozen, batch):
    """Momentum on the distance to the batch's mean; `left` is where a schedule would be."""
    error = state.trainable["w"] - batch["x"].mean()
    updates, opt_state = TX.update({"w": error}, state.opt_state, step=state.step, hparams=state.hparams)
    one = jnp.ones(())
    metrics = {"loss": (error**2, one), "left": (state.hparams["steps"] - state.step, one)}
    return TrainState(
        state.step + 1,
        optax.apply_updates(state.trainable, updates),
        opt_state,
        state.extra,
        state.key,
        state.hparams,
    ), metrics


def near(target):
    return lambda params: {"near": -jnp.abs(params["w"] - target), "w": params["w"]}


def phase(name="a", value=1.0, target=0.5, **changes):
    rows = ResidentRows({"x": value + jnp.linspace(-0.5, 0.5, 16)})
    settings = {"samples": 32, "batch_size": 4, "evaluate": near(target), "evaluate_every": 8, "metric": "near"}
    return Phase(name, step, TX, rows, **{**settings, **changes})


def plain(made, num_steps, start=START):
    """The same run without phases."""

    def init(key, hparams, given):
        return init_state(given, TX, key, hparams=hparams)

    run = Population(init, step, lambda key, s: made.rows.sample(key, s, made.batch_size), num_steps)
    return run.train([MEMBER._replace(hparams={"rate": 0.05, "steps": 8.0})], start=start, keep_params=True)[0]


def test_the_best_checkpoint_is_that_of_the_run_stopped_there():
    course = run_phased([phase()], MEMBER, START)
    assert course.samples == (8, 16, 24, 32)
    scores = course.evaluations["near"]
    at = int(np.argmax(scores))
    assert course.best == (at,)
    assert at < 3  # it overshoots afterwards
    chex.assert_trees_all_close(course.params, plain(phase(), 2 * (at + 1)).params, rtol=1e-6)
    assert float(near(0.5)(course.params)["near"]) == pytest.approx(scores[at])


def test_one_phase_is_the_run_without_phases_and_one_phase_stacked_is_itself():
    last = phase(metric="w")  # grows to the end
    alone, stacked = (run_phased([p], MEMBER, START) for p in (last, stack_phases([last], metric="w")))
    chex.assert_trees_all_close(alone.params, plain(last, 8).params, rtol=1e-6)
    chex.assert_trees_all_equal(stacked.params, alone.params)
    np.testing.assert_array_equal(alone.outcomes[0].history["loss"], plain(last, 8).history["loss"])


def test_each_phase_begins_at_the_best_of_the_last_with_step_and_moments_anew():
    phases = [phase(), phase("b", 3.0, 2.0)]
    course = run_phased(phases, MEMBER, START)
    first = run_phased(phases[:1], MEMBER, START)
    second = run_phased([phases[1]], MEMBER, first.params)
    chex.assert_trees_all_equal(course.params, second.params)
    assert course.samples == (8, 16, 24, 32, 40, 48, 56, 64)
    assert course.best[1] == 4 + second.best[0]
    for outcome in course.outcomes:
        assert outcome.history["left"].tolist() == list(range(8, 0, -1))


def test_stacked_phases_are_the_union_with_all_samples():
    stacked = stack_phases([shared := phase(), dataclasses.replace(shared, name="b", samples=16)], "near")
    assert (stacked.rows.count, stacked.samples) == (32, 48)
    with pytest.raises(ConfigError, match="differ in batch_size"):
        stack_phases([shared, dataclasses.replace(shared, batch_size=2)], "near")


def test_what_is_finished_is_not_trained_again(tmp_path):
    seen = []
    phases = [phase(), phase("b", 3.0, 2.0)]
    first = run_phased(phases, MEMBER, START, folder=tmp_path, report=seen.append)
    again = run_phased(phases, MEMBER, START, folder=tmp_path, report=seen.append)
    assert len(seen) == 2
    chex.assert_trees_all_equal(again.params, first.params)
    assert again.best == first.best


def test_a_score_that_is_no_number_is_never_the_best():
    bad = phase(evaluate=lambda params: {"near": jnp.where(params["w"] > 0.1, jnp.nan, params["w"])})
    course = run_phased([bad], MEMBER, START)
    assert np.isnan(course.evaluations["near"]).any()
    assert float(course.params["w"]) <= 0.1


@pytest.mark.parametrize("how", ["map", "vmap"])
def test_members_that_are_mapped_keep_their_own_best(how):
    members = [MEMBER._replace(name=str(r), hparams={"rate": r, "steps": 8.0}) for r in (0.02, 0.05)]
    found = dataclasses.replace(phase(), how=how).train(members, START)
    for outcome, member in zip(found, members):
        (one,) = phase().train([member], START)
        chex.assert_trees_all_close(outcome.params, one.params, rtol=1e-5)


def test_the_extra_of_the_step_below_passes_through():
    def counting(state, frozen, batch):
        state, metrics = step(state, frozen, batch)
        return dataclasses.replace(state, extra=state.extra + 1), metrics

    kept = jax.jit(keep_best(counting, near(0.5), 2, "near"))
    extra = start_best(START, jnp.zeros(()))
    state = init_state(START, TX, jax.random.key(0), extra=extra, hparams={"rate": 0.1, "steps": 4})
    for _ in range(3):
        state, _ = kept(state, None, {"x": jnp.ones(4)})
    assert float(state.extra.extra) == 3
    assert float(state.extra.trainable["w"]) != float(state.trainable["w"])


def test_phases_alike_are_one_program():
    evaluate, traced = near(0.5), []

    def counted(state, frozen, batch):
        traced.append(1)
        return step(state, frozen, batch)

    a, b = (phase(name, value, evaluate=evaluate) for name, value in (("a", 1.0), ("b", 3.0)))
    phases = [dataclasses.replace(a, step=counted), dataclasses.replace(b, step=counted, metric="w")]
    course = run_phased(phases, MEMBER, START)
    once = len(traced)
    chex.assert_trees_all_close(
        course.params, run_phased([dataclasses.replace(p, step=step) for p in phases], MEMBER, START).params
    )
    run_phased(phases[:1], MEMBER, START)
    assert len(traced) == once
    assert course.best[1] == 7  # by "w", which grows to the end


def test_points_of_a_sweep_start_from_what_they_are_given():
    made = phase()

    def init(key, hparams, start):
        return init_state(start, TX, key, hparams=hparams)

    run = Population(
        init, step, lambda key, s: made.rows.sample(key, s, 4), 8, evaluate=lambda p: {"loss": p["w"]}
    )
    sweep = Sweep(lambda point: run, ("rate", "steps"), start=START, keep_params=True)
    (trial,) = sweep.run([{"rate": 0.05, "steps": 8.0}]).trials
    chex.assert_trees_all_close(trial.outcomes[0].params, plain(made, 8).params, rtol=1e-6)


def test_bad_settings_are_named():
    for changes, said in (
        ({"evaluate_every": 6}, "phase 'a': evaluate_every is 6 samples, expected a multiple of the batch of 4"),
        ({"samples": 36}, "samples is 36, expected a multiple of evaluate_every 8"),
    ):
        with pytest.raises(ConfigError, match=said):
            phase(**changes)
    with pytest.raises(ConfigError, match="different names"):
        run_phased([phase(), phase()], MEMBER, START)
    with pytest.raises(ConfigError, match="have 'steps'"):
        run_phased([phase()], MEMBER._replace(hparams={"steps": 1.0}), START)
    with pytest.raises(ConfigError, match="chosen by 'nearness'"):
        run_phased([phase(metric="nearness")], MEMBER, START)
    with pytest.raises(ConfigError, match="every is 0"):
        keep_best(step, near(0), 0, "near")
    with pytest.raises(ConfigError, match="no phases to stack"):
        stack_phases([], "near")
