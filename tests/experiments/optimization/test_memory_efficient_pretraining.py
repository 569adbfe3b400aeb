import json

import pytest

from experiments import runner
from experiments.bases import ArmResult
from experiments.optimization import memory_efficient_pretraining as study
from jaxlm.core.errors import ConfigError


def result(loss):
    return ArmResult({}, 1.0, (loss, loss), (loss,) * 200, 0.1, None)


def test_smoke(tmp_path):
    assert runner.execute(study, ["--preset", "smoke", "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row[0] for row in report["tables"][0]["rows"]] == ["full", "sltrain", "sltrain, restarts"]
    assert len(report["claims"]) == 2


def test_claims_are_judged_by_the_losses():
    losses = {"full": 3.0, "low_rank": 3.2, "low_rank, restarts": 3.25, "sltrain": 3.1, "sltrain, restarts": 3.05}
    results = {name: result(loss) for name, loss in losses.items()}
    found = study.claims(study.SMALL, results, {"full": 100, "low_rank": 45})
    assert [c.holds for c in found] == [True, True, False, True, True]


def test_every_arm_is_what_its_name_says():
    arms = {name: study.make_arm(study.SMALL, name, (1e-3,)) for name in study.ARMS}
    assert [arm.parametrization.name for arm in arms.values()] == [
        "dense", "low_rank", "low_rank", "sltrain", "sltrain", "dense", "dense", "lora", "relora"
    ]  # fmt: skip
    assert {name for name, arm in arms.items() if arm.optimizer.reset_every} == {
        "low_rank, restarts", "sltrain, restarts", "relora"
    }  # fmt: skip
    assert [arms[name].optimizer.name for name in ("full", "galore", "fira")] == ["adamw", "galore", "fira"]


def test_sizes_of_the_published_models():
    """Adam's is the paper's; low rank has fewer parameters, SLTrain a few more, ReLoRA's base has no state."""
    rows = {name: study._paper_row(name, "llama-60m") for name in ("full", "low_rank", "sltrain", "relora")}
    assert rows["full"][2:] == (pytest.approx(58.07, abs=0.01), pytest.approx(0.35, abs=0.01))
    assert rows["low_rank"][2] < rows["sltrain"][2] < rows["full"][2] < rows["relora"][2]
    assert rows["low_rank"][3] < rows["relora"][3] < rows["full"][3]


def test_arms_that_need_another_are_refused_without_it():
    with pytest.raises(ConfigError, match="runs at the rate of 'sltrain': add that arm"):
        study.Config(study.SMALL.model, study.SMALL.data, arms=("sltrain, restarts",))
