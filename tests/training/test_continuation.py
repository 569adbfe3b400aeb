"""Going on from a state: bit for bit the run that never stopped, or a new one, as it is asked for."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.resident import ResidentRows
from jaxlm.models import Decoder
from jaxlm.objectives import CausalLM
from jaxlm.optim import FromHparams, ScheduleFromHparams, adamw, rewarm, warmup_stable_decay
from jaxlm.testing import tiny_config
from jaxlm.training import Member, Population, continue_state, init_state, make_step

MODEL = Decoder(tiny_config("llama", num_layers=1))
OBJECTIVE = CausalLM(MODEL)
IDS = np.random.default_rng(0).integers(0, 64, (12, 9)).astype(np.int32)
ROWS = ResidentRows(
    {"inputs": jnp.asarray(IDS[:, :-1]), "targets": jnp.asarray(IDS[:, 1:]), "loss_weights": jnp.ones((12, 8))}
)
MEMBER = Member("run", 0, {"learning_rate": 1e-2})


def optimizer(schedule):
    return adamw(FromHparams(schedule=schedule), axes=MODEL.axes())


def population(schedule, steps, *, keep=True, restart=False, **more):
    tx = optimizer(schedule)

    def init(key, hparams, start=None):
        if start is None:
            return init_state(MODEL.init(key)["params"], tx, key, hparams=hparams)
        return continue_state(start, tx, keep_optimizer=keep, restart=restart, hparams=hparams)

    return Population(init, make_step(OBJECTIVE, tx), lambda key, step: ROWS.sample(key, step, 4), steps, **more)


TRUNK = warmup_stable_decay(1.0, 100, 2, 0)


@pytest.fixture(scope="module")
def stable():
    """The state after four steps of a stable trunk."""
    return population(TRUNK, 4).train([MEMBER], keep_state=True)[0].state


def test_a_run_that_goes_on_is_the_one_that_never_stopped(stable):
    whole = population(TRUNK, 8).train([MEMBER], keep_state=True)[0]
    rest = population(TRUNK, 4).train([MEMBER], keep_state=True, start=stable)[0]
    chex.assert_trees_all_equal(rest.state, whole.state)
    np.testing.assert_array_equal(rest.history["loss"], whole.history["loss"][4:])
    assert int(rest.state.step) == 8


def test_a_branch_that_decays_is_the_run_with_that_schedule(stable):
    decaying = warmup_stable_decay(1.0, 4 + 4, 2, 4)
    whole = population(decaying, 8).train([MEMBER], keep_params=True)[0]
    branch = population(decaying, 4).train([MEMBER], keep_params=True, start=stable)[0]
    chex.assert_trees_all_equal(branch.params, whole.params)


def test_a_restart_begins_at_step_0_with_fresh_moments_and_the_old_parameters(stable):
    tx = optimizer(TRUNK)
    again = continue_state(stable, tx, keep_optimizer=False, restart=True, hparams={"learning_rate": 0.5})
    assert int(again.step) == 0
    assert float(again.hparams["learning_rate"]) == 0.5
    chex.assert_trees_all_equal(again.trainable, stable.trainable)
    chex.assert_trees_all_equal(again.opt_state, tx.init(stable.trainable))
    kept = continue_state(stable, tx, keep_optimizer=True, restart=True)
    chex.assert_trees_all_equal(kept.opt_state, stable.opt_state)


def test_the_state_of_another_optimizer_is_not_kept(stable):
    import optax

    with pytest.raises(ConfigError, match="cannot be kept: '.*' is .* follows"):
        continue_state(stable, optax.sgd(1.0, momentum=0.9), keep_optimizer=True, restart=False)


def test_members_start_from_what_they_are_given_mapped_and_resumed_too(stable, tmp_path):
    members = [MEMBER, Member("other", 1, {"learning_rate": 3e-2})]
    run = population(TRUNK, 4, how="loop")
    looped = run.train(members, keep_state=True, start=stable, folder=tmp_path)
    mapped = dataclasses.replace(run, how="vmap").train(members, keep_state=True, start=stable)
    for one, other in zip(looped, mapped):
        chex.assert_trees_all_close(one.state.trainable, other.state.trainable, atol=1e-5)
        assert int(other.state.step) == 8
    again = run.train(members, keep_state=True, start=stable, folder=tmp_path)
    chex.assert_trees_all_equal([o.state for o in again], [o.state for o in looped])
    with pytest.raises(DataError, match="run with other settings"):
        run.train(members, start=looped[0].state, folder=tmp_path)


def test_losses_are_tracked_before_and_along_the_run(tmp_path):
    def norm(params):
        return {"norm": jnp.sum(params["final_norm"]["scale"] ** 2)}

    run = population(TRUNK, 6, track=norm, track_every=2, evaluate=norm)
    (found,) = run.train([MEMBER], folder=tmp_path)
    assert found.tracked["norm"].shape == (4,)
    assert found.tracked["norm"][0] == 32
    assert found.tracked["norm"][-1] == pytest.approx(found.results["norm"])
    assert found.history["loss"].shape == (6,)
    plain = population(TRUNK, 6).train([MEMBER])[0]
    np.testing.assert_allclose(found.history["loss"], plain.history["loss"], rtol=1e-6)
    (kept,) = run.train([MEMBER], folder=tmp_path)
    np.testing.assert_array_equal(kept.tracked["norm"], found.tracked["norm"])
    (mapped,) = dataclasses.replace(run, how="vmap").train([MEMBER])
    np.testing.assert_allclose(mapped.tracked["norm"], found.tracked["norm"], rtol=1e-5)
    for more, said in (({"track_every": 2}, "come together"), ({"track": norm, "track_every": 4}, "a divisor")):
        with pytest.raises(ConfigError, match=said):
            population(TRUNK, 6, **more)


def test_a_sweep_over_schedules_is_one_program():
    """Each member's rates are those of the schedule made with its numbers."""
    rate = ScheduleFromHparams(lambda h: rewarm(h["peak"], 6, h["warmup"], end_fraction=h["end"]))
    tx = adamw(rate, axes=MODEL.axes())

    def run(tx, members):
        def init(key, hparams):
            return init_state(MODEL.init(key)["params"], tx, key, hparams=hparams)

        step = make_step(OBJECTIVE, tx)
        return Population(init, step, lambda key, s: ROWS.sample(key, s, 4), 6).train(members, keep_params=True)

    swept = [{"peak": 1e-2, "warmup": 3, "end": 0.1}, {"peak": 3e-3, "warmup": 0, "end": 1.0}]
    found = run(tx, [Member(str(i), 0, h) for i, h in enumerate(swept)])
    for h, outcome in zip(swept, found):
        fixed = adamw(rewarm(h["peak"], 6, h["warmup"], end_fraction=h["end"]), axes=MODEL.axes())
        chex.assert_trees_all_close(outcome.params, run(fixed, [Member("fixed", 0)])[0].params, atol=1e-6)
    with pytest.raises(ConfigError, match="reads 'peak' of hparams"):
        run(tx, [Member("bare", 0)])
