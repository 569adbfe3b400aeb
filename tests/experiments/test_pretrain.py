"""The main job from end to end: train, stop in every way, resume to the same bits, sample, evaluate, refuse."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import evaluate, generate, pretrain, runner
from jaxlm.core.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from jaxlm.core.policies import PrecisionConfig
from jaxlm.core.sharding import MeshConfig
from jaxlm.data.prepare import DataConfig
from jaxlm.evals import likelihood  # noqa: F401 (imports are timed out of the tests)
from jaxlm.reporting.run_folder import read_metrics, series
from jaxlm.training import load_run
from jaxlm.weights import LowPrecision

ROOT = Path(__file__).resolve().parents[2]
TEXT = str(ROOT / "jaxlm" / "core")


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("cache"))
    old = os.environ.get("JAXLM_CACHE")
    os.environ["JAXLM_CACHE"] = folder
    yield folder
    if old is None:
        del os.environ["JAXLM_CACHE"]
    else:
        os.environ["JAXLM_CACHE"] = old


def config(**changes):
    smoke = pretrain.PRESETS["smoke"]
    data = dataclasses.replace(smoke.data, path=(TEXT,))
    changes = {"steps": 8, "checkpoint_every": 3, "sample_tokens": 4, "mesh": MeshConfig(data=1, fsdp=8), **changes}
    return dataclasses.replace(smoke, data=data, **changes)


def losses(folder):
    steps, values = series(read_metrics(folder), "train/loss")
    return dict(zip(steps, values, strict=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    runner.open_run_folder(out, config())
    return out, pretrain.run(config(), out)


def test_a_run_leaves_what_it_promises(finished):
    out, report = finished
    assert sorted(losses(out)) == list(range(1, 9))
    for name in ("config.json", "metrics.jsonl", "tokenizer", "checkpoints/8", "tensorboard"):
        assert (out / name).exists(), name
    ((_, before, after, *_),) = report.tables[0].rows
    assert after < before < 9.5
    assert [s.prompt for s in report.samples] == ["def "]
    rows = read_metrics(out)
    assert {"train/loss", "grad_norm", "learning_rate", "tokens_per_second"} <= set(rows[1])
    tokens = [row["tokens"] for row in rows if "tokens" in row]
    assert tokens == [8 * 64] * 8


class Stop(Exception):
    pass


@pytest.mark.parametrize("at", [1, 5, 8])
def test_a_run_that_died_goes_on_with_the_same_losses(at, finished, tmp_path, monkeypatch):
    from jaxlm.data.pipeline import TrainIterator

    original = TrainIterator.__next__

    def dies(self):
        if self.next_step == at - 1:
            raise Stop
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainIterator, "__next__", dies)
        with pytest.raises(Stop):
            pretrain.run(config(), tmp_path)
    assert sorted(losses(tmp_path)) == list(range(1, at - 1)) or at <= 2
    pretrain.run(config(), tmp_path)
    assert losses(tmp_path) == losses(finished[0])


def test_a_finished_run_started_again_reports_again_and_trains_nothing(finished, tmp_path):
    out, first = finished
    lines = (out / "metrics.jsonl").read_text().count('"train/loss"')
    again = pretrain.run(config(), out)
    assert again.samples == first.samples
    assert (out / "metrics.jsonl").read_text().count('"train/loss"') == lines


def test_a_signal_saves_the_running_step(finished, tmp_path, monkeypatch):
    from jaxlm.training.callbacks import Log

    original = Log.on_metrics

    def interrupts(self, step, metrics):
        original(self, step, metrics)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "on_metrics", interrupts)
        with pytest.raises(KeyboardInterrupt, match="SIGTERM after step 5"):
            pretrain.run(config(), tmp_path)
    assert (tmp_path / "checkpoints" / "5").is_dir()
    pretrain.run(config(), tmp_path)
    assert losses(tmp_path) == losses(finished[0])


@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=2, fsdp=2, tensor=2)])
def test_other_meshes_give_the_same_losses_up_to_rounding(mesh, finished, tmp_path):
    pretrain.run(config(mesh=mesh), tmp_path)
    expected = losses(finished[0])
    got = losses(tmp_path)
    np.testing.assert_allclose([got[s] for s in expected], list(expected.values()), rtol=1e-5)


def test_a_model_trained_for_few_bits_is_served_in_them(tmp_path):
    few = config(precision=PrecisionConfig("bitnet"), steps=2)
    runner.open_run_folder(tmp_path, few)
    assert len(pretrain.run(few, tmp_path).samples) == 1
    run = load_run(tmp_path)
    kernel = run.params["blocks"][0]["mlp"]["up"]["kernel"]
    assert isinstance(kernel, LowPrecision)
    assert kernel.policy.name == "bitnet"
    assert runner.execute_tool(generate, ["--checkpoint", str(tmp_path), "--prompt", "a", "--max_new_tokens", "2"]) == 0


@pytest.mark.release
@pytest.mark.parametrize("name", ["fp8_delayed", "mxfp4_stochastic", "bf16_weights_stochastic", "float16"])
def test_runs_under_a_precision_policy_resume_to_the_same_losses(name, tmp_path, monkeypatch):
    from jaxlm.data.pipeline import TrainIterator

    original = TrainIterator.__next__

    def dies(self):
        if self.next_step == 4:
            raise Stop
        return original(self)

    few = config(precision=PrecisionConfig(name))
    pretrain.run(few, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(TrainIterator, "__next__", dies)
        with pytest.raises(Stop):
            pretrain.run(few, tmp_path / "died")
    pretrain.run(few, tmp_path / "died")
    assert losses(tmp_path / "died") == losses(tmp_path / "whole")


def test_a_policy_that_the_devices_cannot_follow_is_refused_before_data_are_read(tmp_path):
    native = PrecisionConfig("fp8_current", "native")
    with pytest.raises(ConfigError, match="of which cpu has no products: implementation 'emulated'"):
        pretrain.run(config(precision=native), tmp_path)
    sent = PrecisionConfig(communication="int8")
    with pytest.raises(ConfigError, match="gradients are sent in few bits over mesh.data alone"):
        pretrain.run(config(precision=sent), tmp_path)


def test_a_run_can_be_loaded_and_sampled(finished, capsys):
    out, _ = finished
    run = load_run(out)
    assert run.step == 8
    assert run.model.config == config().model
    assert runner.execute_tool(generate, ["--checkpoint", str(out), "--prompt", "def ", "--max_new_tokens", "5"]) == 0
    one = capsys.readouterr().out
    assert one.startswith("def ")
    words = ["--checkpoint", str(out), "--prompt", "def ", "--num_samples", "3", "--max_new_tokens", "5"]
    assert runner.execute_tool(generate, words) == 0
    three = capsys.readouterr().out
    assert three.count("--- sample") == 3
    assert runner.execute_tool(generate, [*words, "--seed", "1"]) == 0
    assert capsys.readouterr().out != three


def test_evaluation_from_the_command_line_agrees_with_the_library(finished, capsys, tmp_path):
    out, _ = finished
    text = tmp_path / "note.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 40)
    result = tmp_path / "result.json"
    words = ["--checkpoint", str(out), "--data.path", str(text), "--json", str(result), "--batch_size", "4"]
    assert runner.execute_tool(evaluate, words) == 0
    assert "bits per byte" in capsys.readouterr().out
    found = json.loads(result.read_text())["results"]["note"]
    run = load_run(out)
    ids = [run.tokenizer.special_ids["bos"], *run.tokenizer.encode(text.read_text()), run.tokenizer.special_ids["eos"]]
    assert found["tokens"] == len(ids) - 1
    assert found["bytes"] == text.stat().st_size
    length, total = 64, 0.0
    import jax
    import jax.numpy as jnp

    for start in range(0, len(ids) - 1, length):
        part = jnp.asarray(ids[start : start + length + 1], jnp.int32)[None]
        logp = jax.nn.log_softmax(run.model.apply({"params": run.params}, part[:, :-1]))
        total -= float(jnp.take_along_axis(logp, part[:, 1:, None], -1).sum())
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(total / np.log(2) / text.stat().st_size, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 12}, ConfigError, "batch of 12 rows is not divisible by 8"),
        ({"mesh": MeshConfig(data=2, tensor=4)}, ConfigError, "num_heads 2 is not divisible by mesh.tensor 4"),
        ({"mesh": MeshConfig(data=3)}, ConfigError, "does not fit on 8 devices"),
        ({"steps": 0}, ConfigError, "steps is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_any_compute(changes, error, message, tmp_path):
    with pytest.raises(error, match=message):
        pretrain.run(config(**changes), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_vocabulary_beyond_the_models_is_refused(tmp_path):
    model = dataclasses.replace(config().model, vocab_size=100)
    with pytest.raises(ConfigError, match="the tokenizer has 259 ids but model.vocab_size is 100"):
        pretrain.run(config(model=model), tmp_path)


@pytest.mark.parametrize("weights", [(-0.1,), (0.0,), (float("nan"),), (1.0, 2.0)])
def test_bad_mixture_weights_are_refused(weights):
    with pytest.raises(ConfigError, match="mixture weight"):
        DataConfig(path=(TEXT,), weights=weights)


def test_a_loss_that_is_not_finite_stops_the_run_by_its_step_and_keeps_the_checkpoint(tmp_path):
    from jaxlm.optim import OptimizerConfig

    wild = OptimizerConfig(learning_rate=1e30, warmup=0.0, clip_norm=None)
    with pytest.raises(NonFiniteError, match="of step [0-9]+ is not finite"):
        pretrain.run(config(optimizer=wild, checkpoint_every=1), tmp_path)
    assert any(p.name.isdigit() for p in (tmp_path / "checkpoints").iterdir())


def test_changed_data_is_refused_on_resume(finished, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("some words to learn\n" * 400)
    changed = dataclasses.replace(config(steps=3), data=dataclasses.replace(config().data, path=(str(text),)))
    pretrain.run(changed, tmp_path / "run")
    (text / "a.txt").write_text("other words to learn\n" * 400)
    with pytest.raises(DataError, match="trained on other data: fingerprint"):
        pretrain.run(dataclasses.replace(changed, steps=6), tmp_path / "run")


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no run folder"):
        load_run(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        load_run(tmp_path)


def test_another_config_in_the_folder_is_refused_with_the_difference(finished):
    out, _ = finished
    with pytest.raises(CheckpointError, match="steps: 8 -> 9"):
        runner.open_run_folder(out, config(steps=9))


@pytest.mark.slow
def test_killed_and_terminated_processes_resume_to_the_same_bits(tmp_path, cache):
    def command(out):
        words = ["--preset", "smoke", "--steps", "12", "--checkpoint_every", "2", "--sample_tokens", "2"]
        return [sys.executable, "-m", "experiments.pretrain", *words, "--data.path", TEXT, "--out", str(out)]

    def start(out):
        env = {**os.environ, "JAXLM_CACHE": cache, "JAX_PLATFORMS": "cpu"}
        return subprocess.Popen(
            command(out), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def wait_for_step(out, process, step):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            path = out / "metrics.jsonl"
            if path.exists() and f'"step": {step},' in path.read_text():
                return
            time.sleep(0.005)
        raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")

    whole = start(tmp_path / "whole")
    assert whole.communicate(timeout=300)[0]
    assert whole.returncode == 0
    expected = losses(tmp_path / "whole")

    killed = start(tmp_path / "killed")
    wait_for_step(tmp_path / "killed", killed, 5)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    ended = start(tmp_path / "killed")
    wait_for_step(tmp_path / "killed", ended, 9)
    ended.send_signal(signal.SIGTERM)
    output = ended.communicate(timeout=300)[0]
    assert ended.returncode in (0, 130, 143), output  # it may have finished before the signal came
    last = start(tmp_path / "killed")
    assert "resuming after step" in last.communicate(timeout=300)[0]
    assert last.returncode == 0
    assert losses(tmp_path / "killed") == expected
