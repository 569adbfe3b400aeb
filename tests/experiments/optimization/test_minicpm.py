import dataclasses
import json

import pytest

from experiments import runner
from experiments.optimization import minicpm
from experiments.optimization.minicpm import Results
from experiments.optimization.minicpm_runs import schedule_name
from jaxlm.core.errors import ConfigError
from jaxlm.evals.scaling import Chinchilla

CONFIG = minicpm.PRESETS["small"]
LAW = Chinchilla(100.0, 0.5, 200.0, 0.4, 1.0)


def test_smoke(tmp_path, capsys):
    out = tmp_path / "run"
    assert runner.execute(minicpm, ["--preset", "smoke", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert len(report["claims"]) == 7
    assert len(report["figures"]) == 4
    assert [t["title"] for t in report["tables"]][:2] == ["Schedules", "Loss by learning rate and width"]
    assert "wsd 1: done" in capsys.readouterr().out
    assert runner.execute(minicpm, ["--preset", "smoke", "--out", str(out)]) == 0
    assert ": done" not in capsys.readouterr().out  # what is finished is not repeated


@pytest.fixture
def results():
    """Results of which every claim holds."""
    schedules = {}
    for length in (160, 320, 640):
        schedules[schedule_name("wsd 10 %", length)] = [2.01, 2.01]
        schedules[schedule_name("cosine", length)] = [2.0, 2.0]
    schedules[schedule_name("stable", 640)] = [2.1, 2.1]
    schedules[schedule_name("wsd 2.5 %", 640)] = [2.03, 2.03]
    valley = {width: [abs(i - 3) + 2.0 for i in range(7)] for width in CONFIG.widths}
    drift = {width: [abs(i - 5 + j) + 2.0 for i in range(7)] for j, width in enumerate(CONFIG.widths)}
    law = [(n, d, float(LAW.loss(n, d))) for n in (2e4, 1e5, 4e5) for d in (1e5, 2e5, 4e5, 8e5)]
    return Results(
        {"wsd": {0.01: 2.0}, "cosine": {0.01: 2.0}},
        schedules,
        {(True, w): x for w, x in valley.items()} | {(False, w): x for w, x in drift.items()},
        law,
        {"plain": [1.5, 1.5], "mixed": [1.4, 1.4]},
        {"stable": {"curvature": [1.0], "cosine": [0.0]}, "decayed": {"curvature": [2.0], "cosine": [0.5]}},
    )


def test_claims_that_hold(results):
    found = minicpm.claims(CONFIG, results)
    assert [c.holds for c in found] == [True] * 7
    assert found[0].note == ""
    results.tuned["cosine"].update({0.02: 2.1, 0.04: 2.2})
    assert minicpm.claims(CONFIG, results)[0].note == "Best at an edge of the rates tried: cosine."


def test_claims_that_do_not_hold_are_seen(results):
    results.schedules[schedule_name("cosine", 320)] = [1.98, 1.98]
    results.schedules[schedule_name("stable", 640)] = [2.05, 2.05]
    results.schedules[schedule_name("wsd 2.5 %", 640)] = [2.0, 2.0]
    results.widths[True, 128][5] = 1.0
    results.widths[False, 128][6] = 1.0
    results.instructions["mixed"] = [1.6, 1.6]
    results.probes["stable"]["curvature"] = [3.0]
    found = minicpm.claims(CONFIG, results)
    assert [c.holds for c in found] == [False] * 7
    assert "lie at an edge" in found[4].note


def test_the_law_that_was_planted_is_reported(results):
    report = minicpm.report(CONFIG, results)
    table = next(t for t in report.tables if t.title == "Scaling law")
    found = {name: value for name, value, _, _ in table.rows}
    assert found == pytest.approx(dataclasses.asdict(LAW), rel=0.02)
    best = LAW.optimal_allocation(6 * 4e5 * 8e5)
    ratio = report.numbers["best tokens a parameter at the largest compute (192 in the paper)"]
    assert ratio == pytest.approx(best.tokens / best.params, rel=0.05)


def test_configurations_that_cannot_be_compared_are_refused():
    for changes, said in (
        ({"steps": 15}, "steps is 15, expected a multiple of 10"),
        ({"instruction_rows": 16}, "from 1 to 15"),
        ({"widths": (32, 64)}, "3 or more"),
        ({"width": 90}, "multiples of 16"),
        ({"seeds": (0, 1)}, "none of them 0"),
        ({"data": dataclasses.replace(CONFIG.data, tokenizer="sentencepiece")}, "tokenizer 'byte'"),
    ):
        with pytest.raises(ConfigError, match=said):
            dataclasses.replace(CONFIG, **changes)
