import dataclasses
import json

import pytest

from experiments import runner
from experiments.optimization import rich_lazy_rank as study
from experiments.optimization.rich_lazy_rank_runs import Measure, train_linear
from jaxlm.core.errors import ConfigError


def test_smoke(tmp_path):
    assert runner.execute(study, ["--preset", "smoke", "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = report["tables"][0]["rows"]
    assert [row[0] for row in rows] == ["linear"] * 3 + ["match"] * 2 + ["decoder"] * 2
    assert len(list((tmp_path / "run" / "members").glob("*.npz"))) == 4


def test_the_linear_testbed_agrees_with_what_is_known():
    # Measured independently with 6 other seeds: 0.15, 0.36, 0.51, 0.70; changes 1.51, 1.03, 0.93, 0.88.
    config = dataclasses.replace(study.SMALL, seeds=(11, 12, 13, 14, 15, 16))
    low, high = (train_linear(config, 1.0, rank) for rank in (1, 40))
    assert all(m.reached for m in low + high)
    assert study._mean(low, "kernel") == pytest.approx(0.15, abs=0.05)
    assert study._mean(high, "kernel") == pytest.approx(0.70, abs=0.05)
    assert study._mean(low, "weights") == pytest.approx(1.51, abs=0.1)
    assert study._mean(high, "weights") == pytest.approx(0.88, abs=0.1)
    (aligned, *_) = train_linear(config, 3.0, None)
    assert aligned.kernel == pytest.approx(0.997, abs=0.003)
    assert aligned.weights == pytest.approx(0.02, abs=0.03)


def measures(kernels, weights, reached=True):
    return {
        rank: [Measure(k, k, w, reached=reached), Measure(k + 0.1, k, w)]
        for rank, k, w in zip((1, 8, 64), kernels, weights)
    }


def test_claims_are_judged_by_the_order_of_all_ranks():
    good, bad = measures((0.1, 0.2, 0.3), (3.0, 2.0, 1.0)), measures((0.1, 0.3, 0.2), (3.0, 1.0, 2.0))
    linear, aligned = {1.0: good, 3.0: good}, {1.0: [Measure(1, 1, 0)], 3.0: [Measure(0.99, 1, 0)]}
    found = study.claims(linear, aligned, {("choice", "frobenius"): good, ("choice", "spectral"): bad}, good)
    assert [c.holds for c in found] == [True] * 4 + [True] * 3 + [False] * 2 + [True] * 2
    assert not study.claims(linear, {3.0: [Measure(0.9, 1, 0)]}, {}, {})[3].holds


def test_networks_of_another_loss_are_not_compared():
    halted = measures((0.1, 0.2, 0.3), (3.0, 2.0, 1.0), reached=False)
    linear, aligned = {1.0: halted}, {1.0: [Measure(1, 1, 0)]}
    first = study.claims(linear, aligned, {}, {})[0]
    assert first.holds  # by the seed that is left
    assert first.measured.startswith("0.2 (rank 1)")
    assert "Of 2 seeds, 1 reach" in first.note
    none = {rank: [m._replace(reached=False) for m in found] for rank, found in halted.items()}
    assert not study.claims({1.0: none}, aligned, {}, {})[0].holds


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="stop_at has 1 losses for 3 tasks"):
        study.RecurrentConfig(stop_at=(0.1,))
    with pytest.raises(ConfigError, match="ranks are \\(1, 100\\), expected 1 to 64"):
        study.RecurrentConfig(ranks=(1, 100))
    with pytest.raises(ConfigError, match="seeds are"):
        study.Config(seeds=(1, 1))
