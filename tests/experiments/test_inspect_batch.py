"""The batch of a step, made again from the run folder, is the one that training got."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import finetune, inspect_batch, pretrain, runner
from jaxlm.core.errors import CheckpointError, ConfigError, DataError
from jaxlm.data.pipeline import TrainIterator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def capture(kind, seen):
    """Keeps every batch that `next` hands out."""
    original = kind.__next__

    def __next__(self):
        batch = original(self)
        seen[self.next_step] = batch
        return {name: np.array(x) for name, x in batch.items()}

    return __next__


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    text = tmp_path_factory.mktemp("text")
    for name in ("configs", "trees"):
        (text / name).mkdir()
        shutil.copy(ROOT / "jaxlm" / "core" / f"{name}.py", text / name / "source.py")
    smoke = pretrain.PRESETS["smoke"]
    paths = (str(text / "configs"), str(text / "trees"))
    data = dataclasses.replace(smoke.data, path=paths, weights=(0.25, 0.75), validation_fraction=0.2)
    config = dataclasses.replace(smoke, data=data, steps=5, prompts=())
    out, seen = tmp_path_factory.mktemp("runs") / "run", {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainIterator, "__next__", capture(TrainIterator, seen))
        runner.open_run_folder(out, config)
        pretrain.run(config, out)
    return out, seen


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


@pytest.mark.parametrize("kept", ["checkpoints", "nothing but the beginning"])
def test_every_step_of_a_pretraining_run(pretrained, tmp_path, kept):
    out, seen = pretrained
    folder = tmp_path / "run"
    shutil.copytree(out, folder)
    if kept != "checkpoints":
        shutil.rmtree(folder / "checkpoints")
        (folder / "metrics.jsonl").unlink()
    before = sorted(os.listdir(folder))
    for step in range(1, 6):
        found = inspect_batch.rebuild(folder, step)
        assert_same(found.batch, seen[step])
        assert (found.logged is None) == (kept != "checkpoints")
    if found.logged:
        assert found.logged["learning_rate"] == pytest.approx(found.learning_rate)
    sources = [row["source"] for row in found.provenance["rows"]]
    assert sources.count("trees") == 6  # three quarters of 8 rows
    assert sorted(os.listdir(folder)) == before


def test_what_is_printed_and_written_is_the_text(pretrained, tmp_path, capsys):
    out, seen = pretrained
    file = tmp_path / "batch.json"
    words = [str(out), "--step", "3", "--rows", "2", "5", "--json", str(file)]
    assert runner.execute_tool(inspect_batch, words) == 0
    printed = capsys.readouterr().out
    assert "step 3 of 5, pretrain" in printed
    assert "mixture (tokens): configs 0.25, trees 0.75" in printed
    assert [line for line in printed.splitlines() if line.startswith("row ")][0].startswith("row 2: ")
    written = json.loads(file.read_text())
    assert written["numbers"] == [2, 5]
    np.testing.assert_array_equal(written["arrays"]["targets"], seen[3]["targets"][[2, 5]])
    shown = bytes(i for i in seen[3]["inputs"][5] if i < 256).decode()
    assert repr(shown)[1:20] in printed


def test_what_cannot_be_shown_is_named(pretrained, tmp_path):
    out, _ = pretrained
    for step in (0, 6):
        with pytest.raises(ConfigError, match=f"--step {step}: the run has 5 steps"):
            inspect_batch.rebuild(out, step)
    with pytest.raises(ConfigError, match="--rows 8: the batch has 8 rows"):
        inspect_batch.rebuild(out, 1).check_rows((8,))
    with pytest.raises(CheckpointError, match="not a run folder"):
        inspect_batch.rebuild(tmp_path, 1)
    (tmp_path / "config.json").write_text('{"learning_rates": 1}')
    with pytest.raises(CheckpointError, match="another experiment"):
        inspect_batch.rebuild(tmp_path, 1)
    early = tmp_path / "early"
    early.mkdir()
    shutil.copy(out / "config.json", early)
    with pytest.raises(CheckpointError, match="no data.json"):
        inspect_batch.rebuild(early, 1)


def test_data_that_changed_are_refused(pretrained, tmp_path):
    out, _ = pretrained
    folder = tmp_path / "run"
    shutil.copytree(out, folder)
    config = json.loads((folder / "config.json").read_text())
    text = tmp_path / "trees"
    shutil.copytree(config["data"]["path"][1], text)
    (text / "source.py").write_text((text / "source.py").read_text() + "# one line more\n" * 20)
    config["data"]["path"][1] = str(text)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="trained on other data: fingerprint"):
        inspect_batch.rebuild(folder, 1)


@pytest.mark.parametrize(("objective", "words"), [("sft", "weight 1 x"), ("dpo", "rejected"), ("kto", "mismatched")])
def test_every_step_of_a_fine_tuning_run(objective, words, tmp_path, capsys):
    from jaxlm.data import chat_batches

    config = dataclasses.replace(finetune.PRESETS["smoke"], objective=objective, steps=2, prompts=())
    out, seen = tmp_path / "run", {}
    kind = chat_batches.ExampleBatches
    runner.open_run_folder(out, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__next__", capture(kind, seen))
        finetune.run(config, out)
    for step in (1, 2):
        assert_same(inspect_batch.rebuild(out, step).batch, seen[step])
    assert runner.execute_tool(inspect_batch, [str(out), "--step", "2"]) == 0
    assert words in capsys.readouterr().out
