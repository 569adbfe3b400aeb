import json

import jax
import pytest

from jaxlm.reporting.run_folder import read_metrics
from jaxlm.training import Evaluate, Log, Profile
from jaxlm.training.hardware import model_flops_utilization, peak_flops
from jaxlm.training.run_log import RunLog


class State:
    trainable = {"w": 2.0}


METRICS = {"loss": 3.5, "grad_norm": 0.5, "skipped": 0.0, "tokens": 64.0, "seconds": 0.5, "tokens_per_second": 128.0}


def test_metrics_and_evaluations_reach_the_log(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        Log(log, learning_rate=lambda step: 0.1 * step, flops_per_token=100.0).on_metrics(3, METRICS)
        evaluation = Evaluate(lambda params: {"eval/text/loss": params["w"]}, log)
        evaluation.at_step(3, State())
    (row,) = read_metrics(tmp_path)
    assert row["train/loss"] == 3.5
    assert row["grad_norm"] == 0.5
    assert row["learning_rate"] == pytest.approx(0.2)  # the third step has index 2
    assert row["eval/text/loss"] == 2.0
    assert "mfu" not in row  # a CPU has no published peak
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 3


def test_peaks_are_found_by_the_names_that_jax_gives():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5") == 459e12
    assert peak_flops("TPU v4") == 275e12
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("cpu") is None
    assert model_flops_utilization(1000.0, 1e9, "TPU v4", 4) == pytest.approx(1e12 / (4 * 275e12))


def test_a_trace_is_written_for_the_steps_asked_for(tmp_path):
    profile = Profile(tmp_path, first=2, steps=2)
    for step in range(1, 6):
        jax.block_until_ready(jax.numpy.ones(8) + step)
        profile.on_metrics(step, METRICS)
        assert profile.running == (step in (2, 3))
    assert list(tmp_path.rglob("*.xplane.pb"))
