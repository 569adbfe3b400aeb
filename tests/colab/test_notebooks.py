"""Every notebook runs from its first cell to its last, at the sizes it shows or smaller ones."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

COLAB = Path(__file__).resolve().parents[2] / "colab"

# What is made smaller for the test: text of a cell and what it becomes.
SMALLER = {
    "01_pretrain.ipynb": {
        "steps, batch_size = 150, 16": "steps, batch_size = 6, 4",
        "sequence_length=128)": f"sequence_length=32, path=({str(COLAB.parent / 'jaxlm')!r},))",
        "num_layers=4, embed_dim=128, num_heads=4, mlp_dim=344": "num_layers=2, embed_dim=32, num_heads=2, mlp_dim=64",
        "max_new_tokens=48": "max_new_tokens=4",
    },
}


@pytest.mark.parametrize("path", sorted(COLAB.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(COLAB.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), "notebooks are kept without outputs"
    for old, new in SMALLER[path.name].items():
        cells = [cell for cell in notebook.cells if old in cell.source]
        assert cells, f"{path.name} has no cell with {old!r}"
        for cell in cells:
            cell.source = cell.source.replace(old, new)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "parameters on cpu" in text
    assert "bits_per_byte" in text
