import dataclasses
import json
from types import SimpleNamespace

import pytest

from experiments import runner
from experiments.bases import ArmResult
from experiments.optimization import cast
from jaxlm.core.errors import ConfigError


def result(loss, before=None, kept=1.0, masked=0.05, flips=0.0):
    found = {"before pruning": loss if before is None else before, "kept": kept, "masked": masked}
    outcome = SimpleNamespace(results=found, history={"flips": [flips] * 60, "loss": [loss]})
    return ArmResult({}, 1.0, (loss, loss), (loss,), 0.1, None, (outcome,))


BASE = cast.Base(None, None, 3.0, 1.1, 0.6, 1e-4)


def test_smoke(tmp_path):
    assert runner.execute(cast, ["--preset", "smoke", "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["claims"]) == 3
    rows = {row[0]: row for row in report["tables"][0]["rows"]}
    assert set(rows) == {"dense", "pruned at once", "static", "cast"}
    # What pruning changes is a matter of arms whose forward pass was dense.
    assert rows["static"][4:] == [None, None]
    assert all(isinstance(cell, float) for cell in rows["cast"][4:])


def test_claims_are_judged_by_the_losses():
    results = {
        "static": result(3.4),
        "sr_ste": result(3.3, flips=0.01),
        "cast": result(3.1, before=3.095, flips=0.001),
        "without factors": result(3.05),
    }
    found = [c.holds for c in cast.claims(BASE, 3.9, results)]
    assert found == [True, True, True, True, True, True, False]
    worse = {"sr_ste": result(3.0), "cast": result(3.1, before=3.0, masked=0.5, flips=0.1)}
    assert [c.holds for c in cast.claims(BASE, 3.9, worse)] == [False, False, False, False]


@pytest.mark.parametrize(("kept", "masked", "holds"), [(1.0, 0.05, True), (1.0, 0.07, False), (0.5, 0.01, False)])
def test_masked_weights_have_to_vanish_and_kept_ones_to_stay(kept, masked, holds):
    (claim,) = (
        c for c in cast.claims(BASE, 3.9, {"cast": result(3.1, kept=kept, masked=masked)}) if "kept" in c.statement
    )
    assert claim.holds == holds


def test_a_run_too_short_for_its_weights_is_refused():
    base = cast.Base(None, None, 3.0, 0.07, 0.03, 1e-4)
    config = cast.Config(cast.SMALL.model, cast.SMALL.data, steps=20)
    with pytest.raises(ConfigError, match=r"a masked weight travels 0\.0.*expected 3\.0 times the mean weight 0\.05"):
        cast.check_budget(config, base)
    cast.check_budget(dataclasses.replace(config, steps=500), base)


def test_the_budget_is_checked_once_before_any_arm_and_not_at_the_rate_that_was_best(monkeypatch, tmp_path):
    """At the best rate, which may be a small one, parts of CAST are left out after everything else was trained."""
    config, asked = dataclasses.replace(cast.PRESETS["smoke"], budget=1e9), []
    monkeypatch.setattr(cast, "retrain", lambda config, arm, *_: asked.append(arm))
    with pytest.raises(ConfigError, match="a masked weight travels"):
        cast.run(config, tmp_path)
    assert asked == []


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="no arm 'casts'"):
        cast.Config(cast.SMALL.model, cast.SMALL.data, arms=("casts",))
    with pytest.raises(ConfigError, match="add arm 'cast'"):
        cast.Config(cast.SMALL.model, cast.SMALL.data, arms=("without refresh",))
