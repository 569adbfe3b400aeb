import json

import pytest

from experiments import runner
from experiments.bases import ArmResult
from experiments.optimization import scale
from jaxlm.core.errors import ConfigError


def result(loss, rate=2.0):
    return ArmResult({1.0: 4.0, 2.0: 3.0, 4.0: 5.0}, rate, (loss, loss), (loss,), 0.1, None)


def test_smoke(tmp_path):
    assert runner.execute(scale, ["--preset", "smoke", "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["claims"]) == 3
    assert {f["title"] for f in report["figures"]} >= {"Training loss", "Tuning"}


def test_claims_are_judged_by_the_losses():
    results = {
        "adam": result(3.0),
        "scale": result(3.08),
        "column": result(3.2),
        "row": result(3.1),
        "sgd": result(3.2),
    }
    found = {c.statement.split()[0]: c for c in scale.claims(results, {"head": 2.0, "mlp/up": 1.0})}
    assert {name: c.holds for name, c in found.items()} == {
        "SCALE's": True, "Normalizing": False, "Momentum": True, "Plain": False, "Of": True, "Weights": True
    }  # fmt: skip
    results["scale"] = result(3.1, rate=4.0)
    worse = scale.claims(results, {"head": 1.0, "mlp/up": 2.0})
    assert not worse[0].holds
    assert "Best at an edge of the rates tried: scale" in worse[0].note


def test_memory_is_the_papers():
    size, adam, muon, own, _ = scale._memory_row("llama-1b")
    assert (adam, muon, own) == (
        pytest.approx(8.03, abs=0.01),
        pytest.approx(5.36, abs=0.01),
        pytest.approx(2.81, abs=0.01),
    )


def test_unknown_arms_are_refused():
    with pytest.raises(ConfigError, match="no arm 'scaled'"):
        scale.Config(scale.SMALL.model, scale.SMALL.data, arms=("scaled",))
