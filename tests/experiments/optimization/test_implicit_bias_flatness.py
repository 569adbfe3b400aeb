import dataclasses
import json

import pytest

from experiments import runner
from experiments.optimization import implicit_bias_flatness as study
from experiments.optimization.implicit_bias_flatness import Measure
from jaxlm.core.errors import ConfigError

CONFIG = study.Config(widths=(16, 32))
TABLE = {"phrase of 4": 0.3, "phrase of 2": 0.2, "sentence": 0.3}


def test_smoke(tmp_path):
    command = ["--preset", "smoke", "--out", str(tmp_path / "run")]
    assert runner.execute(study, command) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = report["tables"][0]["rows"]
    assert [row[:3] for row in rows[:4]] == [[8, 1, 2], [8, 1, 4], [16, 1, 2], [16, 1, 4]]
    assert all(row[3] > -1e-4 for row in rows[:4])  # no model is better than the exact conditionals
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "measures").iterdir()}
    assert len(kept) == 4
    assert runner.execute(study, command) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def model(width, seed, step, excess, trace, accuracy):
    return Measure(width, seed, step, excess, trace, 0.1, dict.fromkeys(TABLE, accuracy))


GOOD = [
    model(16, 1, 100, 0.5, 1.0, 0.1),  # outside of the band
    model(16, 1, 200, 0.004, 9.0, 0.4),
    model(16, 1, 300, 0.003, 8.0, 0.5),
    model(32, 1, 200, 0.005, 7.0, 0.6),
    model(32, 1, 300, 0.002, 6.0, 0.7),
    model(32, 2, 300, 0.004, 5.0, 0.8),
]


def test_claims_are_judged_on_models_of_equal_loss():
    found = study.claims(CONFIG, GOOD, TABLE)
    assert [c.holds for c in found] == [True, True, True, True, True, True]
    assert found[0].measured == "-1"
    assert "5 of 6 models" in found[0].note
    worse = [m._replace(trace=10 - m.trace) for m in GOOD]
    assert [c.holds for c in study.claims(CONFIG, worse, TABLE)] == [False, True, False, False, True, True]
    assert not study.claims(CONFIG, GOOD, dict.fromkeys(TABLE, 0.45))[-1].holds


def test_without_models_of_equal_loss_nothing_holds():
    none = study.claims(CONFIG, [m._replace(excess=1.0) for m in GOOD], TABLE)
    assert not any(c.holds for c in none)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="widths are \\(16, 24\\)"):
        study.Config(widths=(16, 24))
    with pytest.raises(ConfigError, match="seeds are"):
        study.Config(seeds=())
    with pytest.raises(ConfigError, match="band is 0"):
        dataclasses.replace(CONFIG, band=0.0)
