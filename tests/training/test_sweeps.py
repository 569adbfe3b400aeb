"""Sweeps on a quadratic, whose runs are known in closed form: `w` goes to 1 by `lr * (1 - w)` a step from the seed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.reporting.sweeps import certificate_table, sweep_figure, sweep_table
from jaxlm.training import Member, Population, Sweep, TrainState, coordinate_search, grid, random_points, steps_for

STEPS = 4


def start(key, hparams):
    w = -jax.random.uniform(key)
    return TrainState(jnp.zeros((), jnp.int32), {"w": w}, (), None, key, dict(hparams))


def step(state, frozen, batch):
    w, one = state.trainable["w"], jnp.ones(())
    moved = w + state.hparams["rate"] * (1 - w)
    metrics = {"loss": ((1 - w) ** 2, one), "skipped": ((moved > 1e3).astype(jnp.float32), one)}
    return dataclasses.replace(state, step=state.step + 1, trainable={"w": moved}), metrics


def population(scale=1.0, **settings):
    found = {
        "init": start, "step": step, "sample": lambda key, step: {"x": jnp.zeros(2)}, "num_steps": STEPS,
        "evaluate": lambda params: {"loss": scale * (1 - params["w"]) ** 2}, "tokens_per_step": 16,
    }  # fmt: skip
    return Population(**{**found, **settings})


def expected(rate, seed, scale=1.0, steps=STEPS):
    return scale * ((1 + float(jax.random.uniform(jax.random.key(seed)))) * (1 - rate) ** steps) ** 2


def sweep(**settings):
    return Sweep(lambda point: population(float(point.get("scale", 1.0))), ("rate",), **settings)


def test_a_grid_is_trained_with_paired_seeds_and_equal_tokens():
    points = grid({"scale": (1.0, 3.0), "rate": (0.1, 0.5, 0.9)})
    found = sweep(seeds=(3, 4), budget=16 * STEPS).run(points)
    assert [trial.point for trial in found.trials] == points
    for trial in found.trials:
        losses = [expected(trial.point["rate"], seed, trial.point["scale"]) for seed in (3, 4)]
        np.testing.assert_allclose(trial.values("loss"), losses, rtol=1e-3)
        assert found.mean(trial.point) == pytest.approx(np.mean(losses), rel=1e-3)
        assert found.deviation(trial.point) == pytest.approx(np.std(losses, ddof=1), rel=1e-3)
        assert trial.tokens == 64
    assert found.best().point == {"scale": 1.0, "rate": 0.9}
    mean, error = found.difference(points[0], points[1])
    paired = [expected(0.1, seed) - expected(0.5, seed) for seed in (3, 4)]
    assert mean == pytest.approx(np.mean(paired), rel=1e-3)
    assert error == pytest.approx(np.std(paired, ddof=1) / np.sqrt(2), rel=1e-3)
    table = sweep_table(found)
    assert table.columns == ("scale", "rate", "loss", "standard deviation", "seeds", "tokens")
    assert table.rows[0][:2] == (1.0, 0.9)
    figure = sweep_figure(found, "rate")
    assert [line.name for line in figure.series] == ["scale 1.0", "scale 3.0"]
    assert figure.series[0].x == (0.1, 0.5, 0.9)
    assert figure.x_scale == "log"


def test_a_point_that_diverged_is_infinitely_worse():
    wild, good = {"rate": 1e3}, {"rate": 0.5}
    found = sweep(seeds=(0, 1)).run([wild, good])
    assert found.mean(wild) == math.inf
    assert found.best().point == good
    assert found.difference(wild, good)[0] == math.inf
    assert found.difference(good, wild)[0] == -math.inf
    assert math.isnan(found.difference(wild, wild)[0])
    assert sweep_table(found).rows[0][0] == 0.5


def test_points_that_share_a_program_are_one_population():
    made = []

    def make(point):
        made.append(point)
        return population(point["scale"])

    Sweep(make, ("rate",)).run(grid({"rate": (0.1, 0.5), "scale": (1.0, 2.0)}))
    assert made == [{"scale": 1.0}, {"scale": 2.0}]


def test_what_is_finished_is_not_trained_again(tmp_path):
    seen = []
    settings = {"folder": tmp_path, "seeds": (0, 1), "report": seen.append}
    first = sweep(**settings).run(grid({"rate": (0.1, 0.5)}))
    assert len(seen) == 4
    again = sweep(**settings).run(grid({"rate": (0.5, 0.1, 0.9)}))
    assert len(seen) == 6
    assert {o.member.hparams["rate"] for o in seen[4:]} == {0.9}
    assert again.mean({"rate": 0.1}) == first.mean({"rate": 0.1})


@pytest.mark.parametrize("how", ["loop", "map", "vmap"])
def test_a_member_that_is_stopped_is_the_shorter_run(how, tmp_path):
    members = [Member("a", 0, {"rate": 0.9}), Member("b", 0, {"rate": 0.1})]
    stopped = population(how=how).train(
        members, check_every=2, stop=lambda member, history: history["loss"][-1] < 0.2, folder=tmp_path
    )
    whole = population(how=how).train(members)
    assert [o.steps for o in stopped] == [2, 4]
    np.testing.assert_array_equal(stopped[0].history["loss"], whole[0].history["loss"][:2])
    assert stopped[0].results["loss"] == pytest.approx(expected(0.9, 0, steps=2), rel=1e-3)
    assert stopped[1].results == whole[1].results
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


@pytest.mark.parametrize(("how", "devices"), [("loop", 1), ("map", 4), ("vmap", 2)])
def test_a_killed_population_goes_on_from_its_states(how, devices, tmp_path):
    members = [Member(f"m{i}", i, {"rate": 0.1 * i}) for i in range(3)]
    made = population(how=how, devices=tuple(jax.devices()[:devices]))

    def killed(member, history):
        if len(history["loss"]) == 3 and member.name == "m1":
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        made.train(members, check_every=1, stop=killed, folder=tmp_path)
    assert (tmp_path / "m1.state.npz").exists()
    steps = []
    resumed = made.train(
        members, check_every=1, stop=lambda m, h: steps.append((m.name, len(h["loss"]))), folder=tmp_path
    )
    assert min(n for name, n in steps if name == "m1") == 3  # the first two steps were kept
    for one, other in zip(resumed, population(how=how).train(members)):
        np.testing.assert_array_equal(one.history["loss"], other.history["loss"])
        assert one.results == other.results
    (tmp_path / "m1.json").unlink()
    (tmp_path / "m1.state.npz").write_bytes(b"PK\3\4")
    with pytest.raises(DataError, match="m1.state.npz cannot be read"):
        made.train(members[1:2], check_every=1, folder=tmp_path)


@pytest.mark.parametrize(("how", "devices"), [("loop", 2), ("map", 1)])
def test_members_of_a_killed_group_go_on_without_those_that_are_done(how, devices, tmp_path):
    members = [Member(f"m{i}", i, {"rate": 0.1 * (i + 1)}) for i in range(3)]
    made = population(how=how, devices=tuple(jax.devices()[:devices]))
    asked = []

    def stop(member, history):
        asked.append((member.name, len(history["loss"])))
        if asked[-1] == ("m1", 3):
            raise KeyboardInterrupt
        return member.name == "m0" and len(history["loss"]) == 1

    with pytest.raises(KeyboardInterrupt):
        made.train(members, check_every=1, stop=stop, folder=tmp_path)
    # Of a member that is done there is no state, from which it might go on by mistake.
    assert (tmp_path / "m0.json").exists()
    assert not (tmp_path / "m0.state.npz").exists()
    asked.clear()
    resumed = made.train(
        members, check_every=1, stop=lambda m, h: asked.append((m.name, len(h["loss"]))), folder=tmp_path
    )
    assert min(n for name, n in asked if name == "m1") == 3
    assert [outcome.steps for outcome in resumed] == [1, STEPS, STEPS]
    for one, other in zip(resumed[1:], population(how=how).train(members)[1:]):
        np.testing.assert_array_equal(one.history["loss"], other.history["loss"])
        assert one.results == other.results
    assert not list(tmp_path.glob("*.state.npz"))


def test_coordinate_search_ends_at_a_local_optimum_and_shows_it():
    axes = {"rate": (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5, 1.7), "scale": (4.0, 2.0, 1.0)}
    found = coordinate_search(sweep(), axes, {"rate": 0.3, "scale": 2.0})
    assert found.best == {"rate": 0.9, "scale": 1.0} or found.best == {"rate": 1.1, "scale": 1.0}
    assert found.certified
    assert found.edges == ("scale",)
    assert found.value == pytest.approx(expected(0.9, 0), rel=1e-2)
    neighbors = [point for point, _ in found.certificate]
    i = axes["rate"].index(found.best["rate"])
    wanted = [{"rate": axes["rate"][j], "scale": 1.0} for j in (i - 1, i + 1)]
    assert neighbors == [*wanted, {"rate": found.best["rate"], "scale": 2.0}]
    assert all(value >= found.value for _, value in found.certificate)
    assert len(found.results.trials) < 20  # of 27
    assert "No neighbor is better. At an edge of the values tried: scale" in certificate_table(found).caption
    short = coordinate_search(sweep(), axes, {"rate": 0.3, "scale": 2.0}, max_points=6)
    assert not short.certified
    assert len(short.results.trials) == 6


def test_random_points_lie_in_the_space_and_more_begin_with_fewer():
    space = {"rate": (1e-4, 1e-1, "log"), "decay": (0.0, 1.0, "linear"), "width": (8, 16)}
    points = random_points(space, 200, seed=1)
    assert points[:5] == random_points(space, 5, seed=1)
    rates = np.log10([point["rate"] for point in points])
    assert rates.min() > -4
    assert rates.max() < -1
    assert np.mean(rates) == pytest.approx(-2.5, abs=0.2)
    assert {point["width"] for point in points} == {8, 16}
    with pytest.raises(ConfigError, match="the space has 2 points, fewer than 3"):
        random_points({"width": (8, 16)}, 3)


def test_a_diverged_point_is_never_the_best():
    found = sweep().run(grid({"rate": (0.1, 1e6)}))
    assert found.best().point == {"rate": 0.1}
    assert found.mean({"rate": 1e6}) == np.inf
    assert sweep_figure(found, "rate").series[0].x == (0.1,)
    with pytest.raises(ConfigError, match="each of the 1 points diverged"):
        sweep().run(grid({"rate": (1e6,)})).best()


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda: grid({}), "the grid is empty"),
        (lambda: grid({"rate": ()}), "the grid is empty: 'rate'"),
        (lambda: grid({"rate": (1, 1.0)}), "a value of 'rate' twice"),
        (lambda: grid({"rate": (0.1, 1.0, "log")}), "is the range"),
        (lambda: random_points({"rate": (1.0, 0.1, "log")}, 1), "the bounds of 'rate'"),
        (lambda: random_points({"rate": (0.1, 1.0, "logs")}, 1), "did you mean 'log'"),
        (lambda: sweep().run([]), "no points"),
        (lambda: sweep().run([{"rate": 0.1}, {"rate": 0.1, "rat": 1}]), "unknown hyperparameter 'rat'.*'rate'"),
        (lambda: sweep().run([{"scale": 1.0}]), "lacks 'rate'"),
        (lambda: sweep().run([{"rate": "fast"}]), "'rate' is 'fast', expected a number"),
        (lambda: sweep().run([{"rate": 1}, {"rate": 1.0}]), "more than once: rate=1.0"),
        (lambda: sweep(seeds=(1, 1)), "seeds are"),
        (lambda: sweep(budget=100).run([{"rate": 0.1}]), "trains on 64 tokens, expected the budget of 100"),
        (lambda: steps_for(1000, 16), "1000 tokens does not divide into steps of 16"),
        (lambda: coordinate_search(sweep(), {"rate": (0.1,)}, {"rate": 0.2}), "the start has 'rate' at 0.2"),
        (lambda: coordinate_search(sweep(), {"rate": (0.1,)}, {"rite": 0.2}), "unknown hyperparameter 'rite'"),
        (lambda: population().train([Member("a", 0, {"rate": 1.0})], check_every=3), "a divisor of num_steps 4"),
        (lambda: population().train([Member("a", 0, {"rate": 1.0})], stop=max), "stop is given without check_every"),
        (lambda: sweep().run(grid({"rate": (0.1,)})).trial({"rate": 2}), "rate=2.0 was not tried"),
        (lambda: sweep_figure(sweep().run(grid({"rate": (0.1,)})), "rat"), "no hyperparameter 'rat'"),
    ],
)
def test_what_cannot_be_swept_is_refused(attempt, said):
    with pytest.raises(ConfigError, match=said):
        attempt()
