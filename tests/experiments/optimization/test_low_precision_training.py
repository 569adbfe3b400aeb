import json

import pytest

from experiments import runner
from experiments.optimization import low_precision_training as study
from experiments.optimization.low_precision_training import Result
from jaxlm.core.errors import ConfigError


def result(loss, first=7.0):
    return Result((loss, loss), (first, loss), 0.1)


def test_smoke(tmp_path):
    assert runner.execute(study, ["--preset", "smoke", "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [c["statement"].split()[0] for c in report["claims"]] == ["Training"]
    assert {f["title"] for f in report["figures"]} >= {"Training loss", "Training loss at a small rate"}
    assert len(report["tables"][0]["rows"]) == 5


def test_claims_are_judged_by_the_losses():
    results = {
        study.BASELINE: result(3.0),
        "bfloat16": result(3.01),
        "fp8_current": result(3.05),
        "mxfp4": result(3.3),
        "mxfp4_stochastic": result(3.2),
        study.SLOW_BASELINE: result(5.0),
        "bf16_weights": result(6.0),
        "bf16_weights_stochastic": result(5.05),
        "fixed16_weights": result(5.1),
        "fixed16_weights_stochastic": result(5.0),
        "qat_w4a8": result(3.1),
        study.POST_TRAINING: result(3.1),
    }
    found = study.claims(results)
    assert [claim.holds for claim in found] == [True, False, True, True, True, False, False]
    assert found[1].measured == "+1.67 %"
    assert found[4].measured == "50 % and 98 %"
    results["mxfp4"] = result(3.1)
    assert not study.claims(results)[2].holds


def test_a_rate_at_an_edge_of_those_tried_is_said_to_be_one():
    results = {study.BASELINE: result(3.0), study.SLOW_BASELINE: result(5.0)}

    def caption(rate):
        tuning = {2e-3: 3.1, 4e-3: 3.0, 8e-3: 3.2}
        return study.report(study.SMALL, rate, tuning, results).tables[0].caption

    assert "(3.100 at 0.002, 3.000 at 0.004, 3.200 at 0.008)" in caption(4e-3)
    assert "3.200 at 0.008, at an edge)" in caption(8e-3)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="no precision policy 'fp9'"):
        study.Config(study.SMALL.model, study.SMALL.data, arms=("fp9",))
    with pytest.raises(ConfigError, match="slow_share is 2.0"):
        study.Config(study.SMALL.model, study.SMALL.data, slow_share=2.0)
