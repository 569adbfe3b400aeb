"""What is written down of steps that went wrong: which ones, and where their batches come from."""

import json
import math
import os

import numpy as np
import pytest

from jaxlm.training.incidents import LIMIT, Incidents


def watch(folder, losses, threshold=6.0, incidents=None, start=1, **metrics):
    incidents = incidents or Incidents(folder, lambda index: {"index": index, "rows": []}, threshold=threshold)
    for step, loss in enumerate(losses, start):
        incidents.on_metrics(step, {"loss": loss, **metrics})
    return incidents


def noisy(count, spikes=()):
    losses = (3 + 0.05 * np.random.default_rng(0).normal(size=count)).tolist()
    for i in spikes:
        losses[i] += 2
    return losses


def steps(folder):
    return sorted(int(path.stem) for path in folder.glob("*.json"))


def test_spikes_are_found_and_written_with_their_batch(tmp_path):
    watch(tmp_path, noisy(200, spikes=(5, 60, 61, 150)))
    assert steps(tmp_path) == [61, 62, 151]  # nothing is known yet at 5, and no spike hides the next one
    entry = json.loads((tmp_path / "00000061.json").read_text())
    assert entry["kind"] == "spike of the loss"
    assert entry["batch"] == {"index": 60, "rows": []}
    known = np.array(noisy(60, spikes=(5,)))
    middle = np.median(known)
    expected = middle + 6 * max(1.4826 * np.median(np.abs(known - middle)), 0.01 * middle)
    assert entry["bound"] == pytest.approx(expected)
    assert expected < 4.0 < entry["metrics"]["loss"]


def test_the_bound_is_the_median_and_six_deviations():
    losses = noisy(64)
    incidents = watch(None, losses)
    middle = np.median(losses)
    assert incidents.bound() == pytest.approx(middle + 6 * 1.4826 * np.median(np.abs(np.array(losses) - middle)))
    assert watch(None, [2.0] * 20).bound() == pytest.approx(2.0 + 6 * 0.02)  # no noise: a hundredth of the median
    assert watch(None, losses, threshold=0).bound() is None


@pytest.mark.parametrize(
    ("metrics", "kind"),
    [({"skipped": 1.0}, "not finite, skipped"), ({"spike_skipped": 1.0}, "spike of the gradient, skipped")],
)
def test_skipped_steps_are_written_and_others_are_not(tmp_path, metrics, kind):
    incidents = watch(tmp_path, noisy(20))
    assert not tmp_path.exists() or steps(tmp_path) == []
    watch(tmp_path, [math.nan if "skipped" in metrics else 3.0], incidents=incidents, start=21, **metrics)
    assert json.loads((tmp_path / "00000021.json").read_text())["kind"] == kind
    assert incidents.bound() is not None


def test_a_resumed_run_finds_the_same(tmp_path):
    losses = noisy(120, spikes=(70, 100))
    watch(tmp_path / "whole", losses)
    first = watch(tmp_path / "resumed", losses[:80])
    again = Incidents(tmp_path / "resumed", lambda index: {"index": index, "rows": []})
    again.set_state(json.loads(json.dumps(first.get_state())))
    watch(None, losses[80:], incidents=again, start=81)
    assert steps(tmp_path / "resumed") == steps(tmp_path / "whole") == [71, 101]
    for name in os.listdir(tmp_path / "whole"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "resumed" / name).read_text()


def test_there_is_an_end_to_it(tmp_path):
    watch(tmp_path, [3.0] * (LIMIT + 50), skipped=1.0)
    assert len(steps(tmp_path)) == LIMIT


def test_a_full_disk_does_not_stop_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxlm.training.incidents.write_json", full)
    with pytest.warns(RuntimeWarning, match="No space left on device; training goes on"):
        watch(tmp_path, [3.0], skipped=1.0)
