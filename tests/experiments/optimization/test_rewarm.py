import dataclasses
import json

import pytest

from experiments import runner
from experiments.optimization import rewarm
from experiments.optimization.rewarm_runs import Course, Results, plan_continuations
from jaxlm.core.errors import ConfigError

CONFIG = rewarm.PRESETS["small"]


def test_smoke(tmp_path, capsys):
    out = tmp_path / "run"
    assert runner.execute(rewarm, ["--preset", "smoke", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert len(report["claims"]) == 7
    assert len(report["figures"]) == 4
    assert len(report["tables"][0]["rows"]) == 15
    capsys.readouterr()
    assert runner.execute(rewarm, ["--preset", "smoke", "--out", str(out)]) == 0
    assert "upstream 0.004" not in capsys.readouterr().out  # what is finished is not repeated


def course(up, down, spike=0.5):
    track = {"upstream": (2.0, 2.0 + spike, up), "downstream": (3.0, 3.0 + spike, down)}
    return Course((down, down), (up, up), (down, down), track)


@pytest.fixture
def results():
    """Runs of which every claim holds."""
    courses = dict.fromkeys(plan_continuations(CONFIG, 4e-3), course(2.5, 1.5, 0.5))
    courses["constant"] = course(2.1, 1.8, 0.0)
    courses["peak 0.5"] = course(2.4, 1.6, 0.3)
    courses["peak 2"] = course(2.7, 1.4, 0.9)
    for peak in ("0.5", "1", "2"):
        courses[f"scratch, peak {peak}"] = course(4.0, 1.7)
    courses["same data, re-warmed"] = course(2.05, 3.0, 0.4)
    courses["same data, constant"] = course(1.95, 3.0, 0.0)
    return Results(4e-3, {4e-3: 2.0}, courses, (0, 100, 200))


def test_claims_that_hold(results):
    assert [c.holds for c in rewarm.claims(CONFIG, results)] == [True] * 7


@pytest.mark.parametrize(
    ("claim", "name", "worse"),
    [
        (0, "warm-up 2 %", course(2.5, 1.52)),
        (1, "constant", course(2.1, 1.55)),
        (2, "peak 2", course(2.3, 1.4, 0.9)),
        (3, "scratch, peak 0.5", course(4.0, 1.3)),
        (4, "peak 2", course(2.7, 1.4, 0.1)),
        (5, "same data, re-warmed", course(1.9, 3.0, 0.4)),
        (6, "start at 2/4", course(2.5, 1.45)),
    ],
)
def test_a_claim_that_does_not_hold_is_seen(results, claim, name, worse):
    results.courses[name] = worse
    assert not rewarm.claims(CONFIG, results)[claim].holds


def test_the_grid_is_the_papers():
    plan = plan_continuations(CONFIG, 1e-2)
    assert plan["constant"].hparams == {"peak": 1e-3, "warmup_steps": 0, "end_fraction": 1.0}
    assert plan["warm-up 2 %"].hparams["warmup_steps"] == 5
    assert {name: kind.start for name, kind in plan.items() if kind.start in (2, 3)} == {
        "start at 2/4": 2,
        "start at 3/4": 3,
    }
    assert [name for name, kind in plan.items() if kind.keep] == ["moments kept"]
    assert sum(kind.start is None for kind in plan.values()) == 3


def test_grids_that_cannot_be_judged_are_refused():
    for changes, said in (
        ({"upstream_steps": 10}, "a multiple of 4"),
        ({"peaks": (0.5, 2.0)}, "1.0 among them"),
        ({"warmups": (0.0,)}, "0.01 among them"),
        ({"seeds": (0,)}, "none of them 0"),
        ({"downstream": dataclasses.replace(CONFIG.downstream, tokenizer="sentencepiece")}, "one tokenizer"),
    ):
        with pytest.raises(ConfigError, match=said):
            dataclasses.replace(CONFIG, **changes)


def test_the_report_shows_every_run_and_every_warmup(results):
    report = rewarm.report(CONFIG, results)
    assert [row[0] for row in report.tables[0].rows] == list(results.courses)
    rows = {row[0]: row for row in report.tables[0].rows}
    assert rows["peak 2"][1:] == pytest.approx((2.7, 1.4, 0.0, 0.9, 0.9, "never", 0.7))
    figure = next(f for f in report.figures if f.title == "Downstream, by warm-up")
    assert [line.name for line in figure.series] == ["0 %", "0.5 %", "1 %", "2 %"]
