"""Fine-tuning end to end on a tiny model: results that open again, resuming, every objective, wrong options."""

import dataclasses
import json
import shutil

import pytest

from experiments import chat, finetune, runner
from jaxlm.core.errors import CheckpointError, ConfigError, DataError
from jaxlm.interop import load
from jaxlm.weights import LowRank

SMOKE = finetune.PRESETS["smoke"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A finished smoke run."""
    out = tmp_path_factory.mktemp("finetune") / "run"
    assert runner.execute(finetune, ["--preset", "smoke", "--out", str(out)]) == 0
    return out


def test_a_run_leaves_an_adapter_and_a_report(tuned):
    report = json.loads((tuned / "report.json").read_text())
    assert [s["prompt"] for s in report["samples"]] == ["1+1? (before)", "1+1? (after)"]
    assert "12 examples from 12 records" in report["summary"]
    assert report["numbers"]["steps"] == 4
    found = load(tuned)
    assert isinstance(found.params["blocks"][0]["mlp"]["up"]["kernel"], LowRank)
    assert found.tokenizer.decode(found.tokenizer.encode("7")) == "7"


def test_a_resumed_run_ends_with_the_same_bytes(tuned, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(tuned, again)
    shutil.rmtree(again / "checkpoints" / "4")
    shutil.rmtree(again / "adapter")
    # (The base lies in the run folder, so the adapter names another path.)
    finetune.run(SMOKE, again)
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (tuned / name).read_bytes()


def test_a_changed_base_is_refused(tuned, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(tuned, again)
    weights = again / "base" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DataError, match="not the model that this run began with"):
        finetune.run(SMOKE, again)


@pytest.mark.parametrize(
    ("objective", "method", "merge"),
    [("dpo", "lora", False), ("ipo", "full", False), ("kto", "lora", True), ("orpo", "full", False)],
)
def test_preferences_are_trained_on(tmp_path, objective, method, merge):
    config = dataclasses.replace(SMOKE, objective=objective, method=method, merge=merge, steps=2, prompts=())
    report = finetune.run(config, tmp_path / "run")
    assert report.numbers["loss, held out"] > 0
    assert load(tmp_path / "run").config.num_layers == 4
    assert (tmp_path / "run" / ("adapter" if (method, merge) == ("lora", False) else "model")).is_dir()


def test_a_batch_may_be_counted_in_samples(tmp_path):
    config = dataclasses.replace(SMOKE, batch_samples=6, micro_batches=2, steps=3, prompts=())
    report = finetune.run(config, tmp_path / "run")
    assert "6 samples a batch, in 16 rows" in report.summary  # two micro-batches on eight devices
    assert report.numbers["loss, held out"] > 0
    batches, _, steps = finetune.recorded_batches(config, tmp_path / "run")
    assert steps == 3
    assert [batches[i]["segment_ids"].max(axis=1).sum() for i in range(3)] == [6, 6, 6]
    with pytest.raises(ConfigError, match="batch_samples is 6, expected at least 1, with the objective 'sft'"):
        dataclasses.replace(config, objective="dpo")


def test_the_papers_recipes_have_their_schedules():
    tulu, lab = (finetune.PRESETS[name].optimizer.schedule(1000) for name in ("tulu", "lab"))
    assert [round(float(tulu(step)) * 1e6, 3) for step in (0, 15, 30, 515, 1000)] == [0, 10, 20, 10, 0]
    assert {round(float(lab(step)) * 1e6, 3) for step in (0, 500, 999)} == {20}


def test_chat_talks_to_the_result(tuned, capsys):
    options = ["--model", str(tuned), "--prompt", "1+1?", "2+2?", "--max_new_tokens", "4", "--temperature", "0"]
    assert runner.execute_tool(chat, options) == 0
    assert capsys.readouterr().out.startswith("> 1+1?\n")


def test_an_unfinished_run_is_no_model(tuned, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(tuned, again)
    shutil.rmtree(again / "adapter")
    with pytest.raises(CheckpointError, match="without its result"):
        load(again)


def test_a_command_that_lacks_something_leaves_no_folder_in_the_way(tmp_path, capsys):
    out = tmp_path / "run"
    assert runner.execute(finetune, ["--out", str(out)]) == 2
    assert "which model" in capsys.readouterr().err
    assert not out.exists()
    assert runner.execute(finetune, ["--model", "tiny", "--data.sequence_length", "9999", "--out", str(out)]) == 2
    assert (out / "base").exists()  # something was made: nothing is removed
    missing = tmp_path / "other"
    assert runner.execute(finetune, ["--model", "x.gguf", "--data.path", "a.jsonl", "--out", str(missing)]) != 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "dop"}, "objective is 'dop'.*dpo"),
        ({"method": "full", "packed": True}, "packed weights cannot be trained"),
        ({"beta": 0.1}, "beta is of preference objectives"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMOKE, **changes)


def test_what_is_missing_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="which model"):
        finetune.run(finetune.PRESETS["small"], tmp_path)
    with pytest.raises(ConfigError, match="on what"):
        finetune.run(dataclasses.replace(SMOKE, model="x"), tmp_path)
    long = dataclasses.replace(SMOKE, data=finetune.ChatDataConfig(sequence_length=100))
    with pytest.raises(ConfigError, match="sequence_length is 100.*context is 64"):
        finetune.run(long, tmp_path / "long")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    data = dataclasses.replace(SMOKE.data, path=(str(bad),))
    with pytest.raises(DataError, match=r"bad.jsonl line 1.*no assistant turn"):
        finetune.run(dataclasses.replace(SMOKE, data=data), tmp_path / "bad")
