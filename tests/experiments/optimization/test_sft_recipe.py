import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import runner
from experiments.optimization import sft_recipe
from experiments.optimization.sft_recipe_runs import (
    CONSTANT,
    COSINE,
    PhaseRun,
    Results,
    Run,
    Scores,
    Setting,
    best_rate,
    draw_data,
    make_recipe,
    tune,
)
from jaxlm.core.errors import ConfigError
from jaxlm.data.synthetic.skills import KINDS, as_text
from jaxlm.models import Decoder
from jaxlm.training import init_state

CONFIG = dataclasses.replace(sft_recipe.PRESETS["small"], samples=1536, batch_sizes=(8, 64), rates=(1e-3, 2e-3))


def test_smoke(tmp_path, capsys):
    out = tmp_path / "run"
    assert runner.execute(sft_recipe, ["--preset", "smoke", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert len(report["claims"]) == 7
    assert len(report["tables"][0]["rows"]) == 4
    assert len(report["figures"]) == 4
    assert "seed 1 format:" in capsys.readouterr().out
    assert runner.execute(sft_recipe, ["--preset", "smoke", "--out", str(out)]) == 0
    assert "seed 1 format:" not in capsys.readouterr().out  # what is finished is not repeated


def scores(quality):
    each = dict.fromkeys(KINDS, quality)
    return Scores(each, each, dict.fromkeys(KINDS, 0.5))


def made(setting, seed, quality, norm=1.0, loss=1.0):
    steps = CONFIG.samples // setting.batch_size
    wobble = 0.01 * (seed - 1.5)
    return Run(setting, seed, scores(quality + wobble), np.full(steps, norm), np.full(steps, loss))


def results(large=0.6, phased=0.5, stacked=0.5, cosine=0.6, sign=1.0, later=1):
    """Runs whose quality falls with the gradient norm (of sign 1) and rises with the loss."""
    qualities = {(8, 1e-3): 0.4, (8, 2e-3): 0.2, (64, 1e-3): 0.3, (64, 2e-3): large}
    grid = [
        made(Setting(*key), seed, q, norm=2 - sign * q, loss=1 + sign * q)
        for key, q in qualities.items()
        for seed in (1, 2)
    ]
    tuned = {size: {rate: q for (s, rate), q in qualities.items() if s == size} for size in (8, 64)}
    schedules = [
        made(Setting(64, 2e-3, warmup, end), seed, cosine if end == COSINE else 0.6)
        for warmup in (0.0, 0.02) for end in (CONSTANT, COSINE) for seed in (1, 2)
    ]  # fmt: skip

    def phases(quality, peak):
        course = [0.0, 0.0, 0.0]
        course[peak] = quality
        return [PhaseRun(seed, scores(quality), (512, 1024, 1536), tuple(course), (1536,)) for seed in (1, 2)]

    return Results(scores(0.1), tuned, grid, schedules, {1e-3: 0.5}, phases(phased, 2), phases(stacked, later))


def test_claims_that_hold():
    assert [c.holds for c in sft_recipe.claims(CONFIG, results())] == [True] * 7


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"large": 0.405}, {0}),
        ({"sign": -1.0}, {1, 2, 3}),
        ({"cosine": 0.5}, {4}),
        ({"stacked": 0.4}, {5}),
        ({"stacked": 0.9}, set()),
        ({"later": 2}, set()),
    ],
)
def test_claims_are_judged_by_the_scores(changes, lost):
    held = [c.holds for c in sft_recipe.claims(CONFIG, results(**changes))]
    assert {i for i, holds in enumerate(held) if not holds} == lost


def test_stacked_runs_that_peak_later_take_more_samples():
    found = results(later=2)
    early = [r._replace(course=(0.5, 0.5, 0.5)) for r in found.phased]
    assert not sft_recipe.claims(CONFIG, found._replace(phased=early))[5].holds


def test_a_rate_beyond_the_linear_rule_is_found():
    tuned = {8: {1e-3: 0.4, 2e-3: 0.2}, 64: {1e-3: 0.1, 9e-3: 0.5}}
    grid = [made(Setting(size, rate), seed, q, norm=q) for size, t in tuned.items() for rate, q in t.items()
            for seed in (1, 2)]  # fmt: skip
    claim = sft_recipe.claims(CONFIG, results()._replace(tuned=tuned, grid=grid))[6]
    assert (claim.measured, claim.holds) == ("9 times as high for 8 times the batch", False)


def test_noise_is_that_of_a_difference_of_means():
    # Seeds are 0.01 apart: a variance of 0.01^2 / 2, in a difference of means of two once more.
    assert sft_recipe.noise(CONFIG, results().grid) == pytest.approx(2 * 0.01 / math.sqrt(2))
    one = [r for r in results().grid if r.seed == 1]
    assert math.isnan(sft_recipe.noise(CONFIG, one))


def test_a_run_that_diverged_is_left_out_of_correlations():
    grid = results().grid
    bad = grid[0]._replace(scores=scores(math.nan))
    assert len(sft_recipe.early_runs(CONFIG, [bad, *grid[1:]])) == 7
    assert sft_recipe.report(CONFIG, results()._replace(grid=[bad, *grid[1:]])).numbers["of these diverged"] == 1


def test_rates_are_tried_beyond_the_edges():
    asked = []

    def attempt(rates):
        asked.append(list(rates))
        return {rate: -abs(math.log(rate / 9e-3)) for rate in rates}

    tuned = tune(dataclasses.replace(CONFIG, rates=(1e-4, 3e-4, 1e-3)), attempt)
    assert asked == [[1e-4, 3e-4, 1e-3], [3.3e-3], [1.1e-2]]
    assert best_rate(tuned) == 1.1e-2
    assert best_rate({1e-3: math.nan, 1e-4: 0.1, 2e-4: 0.1}) == 1e-4
    with pytest.raises(ConfigError, match="every run diverges"):
        tune(CONFIG, lambda rates: dict.fromkeys(rates, math.nan))


def test_what_is_judged_is_not_what_was_trained_on():
    config = dataclasses.replace(sft_recipe.PRESETS["smoke"], persons=16, examples=64, held_out=16, base_examples=128)
    data = draw_data(config)
    for kind in KINDS:
        sets = [{e.question for e in part[kind]} for part in (data.train, data.tuning, data.judge)]
        assert sum(map(len, sets)) == len(set.union(*sets))
    base = {as_text(e) for e in data.base}
    for kind in ("format", "skills"):
        assert not base & {as_text(e) for part in (data.train, data.judge, data.plain) for e in part[kind]}
    assert not base & {as_text(e) for e in data.judge["facts"]}


def test_the_preset_for_accelerators_traces():
    config = sft_recipe.PRESETS["smollm2"]
    model = Decoder(config.model)
    step, tx = make_recipe(config, model, 3840)
    hparams = {"rate": 1e-4, "warmup": 0.02, "end_fraction": COSINE, "steps": 12.0}

    def start(key):
        return init_state(model.init(key)["params"], tx, key, hparams=hparams)

    state = jax.eval_shape(start, jax.random.key(0))
    kinds = {"inputs": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32}
    kinds["loss_weights"] = jnp.float32
    batch = {name: jax.ShapeDtypeStruct((3840, config.length), kind) for name, kind in kinds.items()}
    after, metrics = jax.eval_shape(step, state, None, batch)
    shapes = [[(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (state, after)]
    assert shapes[0] == shapes[1]
    assert metrics["grad_norm"][0].shape == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_sizes": (64,)}, "two or more that rise"),
        ({"samples": 1000}, "do not divide samples 1000"),
        ({"micro_batch": 48}, "not into micro_batch 48"),
        ({"evaluate_every": 100}, "do not fit evaluate_every 100"),
        ({"warmups": (0.1,)}, "0 first"),
        ({"seeds": (0, 1)}, "none of them 0"),
        ({"early": 1.0}, "early is 1.0"),
    ],
)
def test_grids_that_cannot_be_judged_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(CONFIG, **changes)
