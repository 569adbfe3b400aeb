"""The list of experiments from source alone, the commands of `python -m experiments`, the page of claims."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import __main__ as command
from experiments import catalog, gallery
from jaxlm.core.errors import DataError
from jaxlm.reporting import Claim, Report
from jaxlm.reporting.report import save

MAIN = '\nif __name__ == "__main__":\n    runner.main(__name__)\n'


@pytest.fixture
def home(tmp_path):
    files = {
        "pretrain.py": '"""Trains a small decoder.\n\nMore."""' + MAIN,
        "runner.py": '"""Not runnable."""',
        "__main__.py": '"""Hidden."""' + MAIN,
        "optimization/scale.py": '"""SCALE beats SGD.\n"""\nimport no_such_module' + MAIN,
        "optimization/rewarm.py": "import no_such_module" + MAIN.replace('"', "'"),
        "adaptation/lora_sb.py": '"""LoRA-SB."""' + MAIN,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_entries_are_read_without_importing(home):
    found = [(e.area, e.slug, e.claim) for e in catalog.entries(home)]
    assert found == [
        ("", "pretrain", "Trains a small decoder."),
        ("adaptation", "lora_sb", "LoRA-SB."),
        ("optimization", "rewarm", "(no docstring)"),
        ("optimization", "scale", "SCALE beats SGD."),
    ]
    assert catalog.entries(home)[-1].module == "experiments.optimization.scale"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("experiments.optimization.scal", "did you mean experiments.optimization.scale?"),
        ("experiments.scale", "did you mean experiments.optimization.scale?"),
        ("experiments.optimisation.rewarm", "did you mean experiments.optimization.rewarm?"),
        (
            "experiments.optimization",
            "is an area, with experiments.optimization.rewarm, experiments.optimization.scale",
        ),
        ("experiments.zzz", "no experiment 'experiments.zzz': (all of them: python -m experiments list)"),
    ],
)
def test_unknown_modules_get_the_nearest_names(home, module, words):
    assert words in catalog.unknown(module, home)


@pytest.fixture
def here(home, monkeypatch):
    """The commands see the modules of `home`."""
    known = catalog.entries(home)
    monkeypatch.setattr(catalog, "entries", lambda: known)
    monkeypatch.setattr(gallery, "entries", lambda: known)
    return home


def test_list_shows_areas_names_and_claims(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert command.main(["list"]) == 0
    assert capsys.readouterr().out == (
        "main jobs   python -m experiments.<name>\n"
        "  pretrain  Trains a small decoder.\n"
        "\n"
        "adaptation   python -m experiments.adaptation.<name>\n"
        "  lora_sb   LoRA-SB.\n"
        "\n"
        "optimization   python -m experiments.optimization.<name>\n"
        "  rewarm    (no docstring)\n"
        "  scale     SCALE beats SGD.\n"
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lst"], "no command 'lst': did you mean 'list'?"),
        (["scale"], "'scale' is an experiment: run it with python -m experiments.optimization.scale"),
        (["list", "all"], "'list' takes no more words, but got: all"),
    ],
)
def test_wrong_words_are_named(here, capsys, argv, words):
    assert command.main(argv) == 2
    assert words in capsys.readouterr().err


def test_help(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert command.main(argv) == 0
        assert "python -m experiments list | gallery" in capsys.readouterr().out


def test_a_reader_that_has_read_enough_is_no_error():
    words = [sys.executable, "-c", "import sys, experiments.__main__ as m; sys.exit(m.main(['list']))"]
    root = Path(__file__).parent.parent.parent
    listing = subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    listing.stdout.close()
    _, err = listing.communicate(timeout=60)
    assert (listing.returncode, err) == (0, b"")


def test_list_and_the_package_import_nothing_heavy():
    program = (
        "import sys, jaxlm, jaxlm.reporting, experiments.runner\n"
        "from experiments.__main__ import main\n"
        "assert main(['list']) == 0\n"
        "heavy = {'jax', 'numpy', 'matplotlib', 'tensorboardX', 'tyro', 'rich', 'flax', 'optax'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent.parent)


def result(**changes):
    report = Report(
        "SCALE | a *title*",
        claims=(
            Claim("column < row\nat every size", "39.89 vs 79.27", 41.0, True),
            Claim("a | b", 1, None, False, "tried `x`"),
        ),
        experiment="optimization.scale",
        preset="small",
        command="python -m experiments.optimization.scale",
        seconds=252.0,
        environment={
            "cpu": "A CPU",
            "cores": "2",
            "jax": "0.10.2",
            "commit": "abc",
            "date": "2026-01-02 03:04 UTC",
        },
    )
    return dataclasses.replace(report, **changes)


def test_the_page_of_claims(here, tmp_path):
    results, out = tmp_path / "results", tmp_path / "README.md"
    save(result(), results / "scale.json")
    save(result(experiment="pretrain", title="Pretraining", claims=()), results / "pretrain.json")
    save(result(experiment="adaptation.lora_sb", title="LoRA-SB", claims=()), results / "lora_sb.json")
    assert gallery.write(results, out) == f"{out}: 3 experiments, 2 claims, 1 hold"
    text = out.read_text()
    assert "**1 of 2 claims hold, in 3 experiments.**" in text
    order = [
        "## main jobs",
        "### [Pretraining](pretrain.py)",
        "## adaptation",
        "### [LoRA-SB]",
        "## optimization",
    ]
    assert sorted(order, key=text.index) == order
    assert "### [SCALE \\| a \\*title\\*](optimization/scale.py)" in text
    assert "| column &lt; row at every size | 39.89 vs 79.27 | 41 | holds |" in text
    assert "| a \\| b<br>*tried \\`x\\`* | 1 | – | **does not hold** |" in text
    assert "4 min 12 s · A CPU, 2 cores · jax 0.10.2 · commit abc · 2026-01-02 03:04 UTC" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 5, line


def test_without_results_the_page_says_so(here, tmp_path):
    assert gallery.write(tmp_path / "results", tmp_path / "README.md").endswith("0 experiments, 0 claims, 0 hold")
    assert "No results are kept yet." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "experiment", "words"),
    [
        (
            "scale",
            "optimization.scal",
            "no experiment 'optimization.scal': did you mean 'optimization.scale'",
        ),
        ("rewarm", "optimization.scale", "expected the file's own slug"),
    ],
)
def test_results_of_no_experiment_are_named(here, tmp_path, name, experiment, words):
    save(result(experiment=experiment), tmp_path / "results" / f"{name}.json")
    with pytest.raises(DataError, match=f"{name}.json: .*{words}"):
        gallery.write(tmp_path / "results", tmp_path / "README.md")


def test_the_kept_page_is_the_one_its_results_give():
    page = gallery.page(gallery.read_results(catalog.HOME / "results", catalog.entries()))
    assert (catalog.HOME / "README.md").read_text() == page, "run python -m experiments gallery"
