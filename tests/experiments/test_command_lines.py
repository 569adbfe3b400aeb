"""The command line of every module that can be run: help, options that do not exist, settings that cannot work."""

import importlib
import json

import pytest

from experiments import catalog, runner
from jaxlm.core.configs import from_dict, to_dict

MODULES = [entry.module for entry in catalog.entries() if entry.slug != "cluster"]  # has words of its own
PRESETS = [m for m in MODULES if hasattr(importlib.import_module(m), "TOPOLOGIES") or ".optimization." in m]
PRESETS += ["experiments.finetune"]


def call(name, *argv):
    """The exit code of a command, which ends before anything runs."""
    module = importlib.import_module(name)
    execute = runner.execute if name in PRESETS else runner.execute_tool
    try:
        return execute(module, argv)
    except SystemExit as end:
        return end.code


NEEDED = {
    "experiments.chat": ["--model", "x"],
    "experiments.evaluate": ["--model", "x", "--tasks", "gsm8k"],
    "experiments.generate": ["--checkpoint", "x"],
    "experiments.inspect_batch": ["x"],
}


@pytest.mark.parametrize("name", MODULES)
def test_help_and_unknown_options(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(name, "--help") == 0
    said = capsys.readouterr().out
    assert f"usage: python -m {name}" in said
    first = importlib.import_module(name).__doc__.splitlines()[0]
    assert first[:40] in said
    assert call(name, *NEEDED.get(name, []), "--no_such_option", "1") == 2
    assert "no option '--no_such_option'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


SAID = {
    "experiments.pretrain": (["--steps", "0"], "steps is 0, expected at least 1"),
    "experiments.finetune": (["--method", "lorra"], "method is 'lorra': did you mean 'lora'"),
    "experiments.generate": ([], "which run?"),
    "experiments.evaluate": (["--model", "x"], "on what?"),
    "experiments.chat": ([], "which model?"),
    "experiments.plan": (["--members", "0"], "members is 0"),
    "experiments.inspect_batch": (["x", "--step", "one"], "invalid literal for int()"),
    "experiments.benchmarks.attention": (["--models", "lama-1b"], "models has 'lama-1b': did you mean 'llama-1b'"),
    "experiments.benchmarks.cross_entropy": (["--rounds", "0"], "rounds is 0"),
    "experiments.benchmarks.data_loading": (["--processes", "3"], "processes has 3, expected divisors of batch 512"),
    "experiments.benchmarks.decode": (["--batches", "0"], "batches are (0,)"),
    "experiments.benchmarks.population": (["--members", "0"], "members is 0"),
    "experiments.benchmarks.quantized_matmul": (["--length", "1"], "length is 1, expected at least 2"),
    "experiments.benchmarks.smollm2": (["--rows", "0"], "rows is 0"),
    "experiments.benchmarks.train_step": (["--steps", "0"], "steps is 0"),
    "experiments.optimization.cast": (["--arms", "cst"], "no arm 'cst': did you mean 'cast'"),
    "experiments.optimization.implicit_bias_flatness": (
        ["--at", "5", "4"],
        "at is (5, 4), expected steps that increase",
    ),
    "experiments.optimization.infinite_compute": (["--at", "9"], "at is 9"),
    "experiments.optimization.low_precision_training": (["--rates", "0"], "rates are (0.0,)"),
    "experiments.optimization.memory_efficient_pretraining": (["--cycle", "0"], "cycle is 0"),
    "experiments.optimization.minicpm": (["--rates", "-1"], "rates are (-1.0,)"),
    "experiments.optimization.natural_galore": (["--tools.rank", "0"], "rank is 0"),
    "experiments.optimization.optimizer_benchmark": (["--model.embed_dim", "16"], "has rank 24, model.embed_dim is 16"),
    "experiments.optimization.rewarm": (["--seeds", "0"], "seeds are (0,)"),
    "experiments.optimization.rich_lazy_rank": (["--linear.ranks", "41"], "ranks are (41,), expected 1 to 40"),
    "experiments.optimization.scale": (["--variance_batches", "1"], "variance_batches is 1"),
    "experiments.optimization.sft_recipe": (["--early", "1"], "early is 1.0"),
}


@pytest.mark.parametrize("name", MODULES)
def test_settings_that_cannot_work_are_named(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, said = SAID[name]
    assert call(name, *words) == 2
    found = capsys.readouterr()
    # What tyro says stands in a box, in lines that are broken anywhere.
    assert said in " ".join(found.err.replace("│", " ").split())
    assert "Traceback" not in found.err
    assert found.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_those_that_their_json_says(name):
    module = importlib.import_module(name)
    for preset in module.PRESETS.values():
        assert from_dict(module.Config, json.loads(json.dumps(to_dict(preset)))) == preset
