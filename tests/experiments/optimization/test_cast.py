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


BASE = cast.Base(None, 3.0, 0.05, 1e-4)


def test_smoke(tmp_path):
    assert runner.execute(cast, ["--preset", "smoke", "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len(report["claims"]) == 3
    assert {row[0] for row in report["tables"][0]["rows"]} == {"dense", "pruned at once", "static", "cast"}


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


def test_a_run_too_short_for_its_weights_is_refused():
    config = cast.Config(cast.SMALL.model, cast.SMALL.data, steps=20)
    with pytest.raises(ConfigError, match=r"a masked weight travels 0\.0.*expected 3\.0 times the mean weight 0\.05"):
        cast.retrain(config, "cast", BASE, None, config.rates, None)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="no arm 'casts'"):
        cast.Config(cast.SMALL.model, cast.SMALL.data, arms=("casts",))
    with pytest.raises(ConfigError, match="add arm 'cast'"):
        cast.Config(cast.SMALL.model, cast.SMALL.data, arms=("without refresh",))
