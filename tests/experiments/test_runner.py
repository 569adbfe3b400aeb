"""The command line of an experiment: options, folders, errors and exit codes, and what is left behind."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from experiments import runner
from jaxlm.core.errors import ConfigError
from jaxlm.reporting.report import load

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODULE = "experiments.optimization.fake"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The fake experiment, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(MODULE, HERE / "fake_experiment.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, MODULE, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def call(module, *argv):
    """The exit code, also when tyro ends the process itself."""
    try:
        return runner.execute(module, argv)
    except SystemExit as end:
        return end.code


def test_a_run_leaves_config_metrics_report_and_page(fake, capsys):
    assert call(fake) == 0
    out = Path("runs/fake-small")
    assert sorted(os.listdir(out)) == [
        "config.json",
        "figures",
        "metrics.jsonl",
        "report.html",
        "report.json",
    ]
    report = load(out / "report.json")
    assert (report.experiment, report.preset) == ("optimization.fake", "small")
    assert report.command == f"python -m {MODULE}"
    assert report.config == {"steps": 100, "fail": "", "descent": {"learning_rate": 0.1, "momentum": False}}
    assert report.config == json.loads((out / "config.json").read_text())
    assert [figure.title for figure in report.figures] == ["Loss"]
    assert os.listdir(out / "figures") == ["loss.png"]
    assert report.seconds >= 0
    assert report.environment["jax"]
    said = capsys.readouterr().out
    assert "descent.learning_rate  0.1" in said
    assert "holds: the distance falls below 0.01" in said
    assert "DOES NOT HOLD: the minimum is reached" in said


@pytest.mark.parametrize("spelling", [["--preset", "smoke"], ["--preset=smoke"]])
def test_options_start_from_the_preset(fake, spelling):
    assert call(fake, *spelling, "--descent.learning_rate", "0.5", "--descent.momentum", "True", "--out", "a b") == 0
    report = load("a b/report.json")
    assert report.preset == "smoke"
    assert report.config == {"steps": 3, "fail": "", "descent": {"learning_rate": 0.5, "momentum": True}}
    assert report.command.endswith("--out 'a b'")


def test_default_folder_is_named_after_slug_and_preset(fake):
    assert call(fake, "--preset", "smoke") == 0
    assert os.path.exists("runs/fake-smoke/report.html")


def test_help_explains_presets_and_every_field(fake, capsys):
    assert call(fake, "--help") == 0
    text = capsys.readouterr().out
    for part in (
        "  Claim: the distance to the minimum shrinks by the same factor in every step.\n",
        "--preset {smoke,small,paper}",
        "--out PATH",
        "--descent.learning_rate FLOAT",
        "Step size, relative to the gradient. (default: 0.1)",
        "How to descend.",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--preset", "smal"], "no preset 'smal': did you mean 'small'? (valid: paper, small, smoke)"),
        (["--preset"], "no preset ''"),
        (
            ["--descent.learning_rte", "1"],
            "no option '--descent.learning_rte': did you mean --descent.learning_rate?",
        ),
        (["--learning-rate=1"], "no option '--learning-rate': did you mean --descent.learning_rate?"),
        (["--zzz", "1"], "no option '--zzz' (all of them: python -m experiments.optimization.fake --help)"),
        (["extra"], "unexpected word 'extra'"),
        (["--steps", "many"], "invalid literal for int()"),
        (["--steps"], "Missing value for argument '--steps'"),
        (["--descent.learning_rate", "-1"], "learning_rate is -1.0, expected >= 0"),
        (["--out", "file"], "--out file: is a file, expected a folder"),
    ],
)
def test_bad_words_are_named_before_anything_happens(fake, capsys, argv, words):
    Path("file").touch()
    assert call(fake, *argv) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert os.listdir() == ["file"]


def test_a_folder_of_another_config_is_refused_with_the_differences(fake, capsys):
    assert call(fake, "--out", "run") == 0
    before = Path("run/report.json").read_bytes()
    assert call(fake, "--out", "run", "--descent.learning_rate", "0.2", "--steps", "5") == 2
    said = capsys.readouterr().err
    assert "run holds a run with another config" in said
    assert "  descent.learning_rate: 0.1 -> 0.2\n  steps: 100 -> 5\n" in said
    assert Path("run/report.json").read_bytes() == before
    assert call(fake, "--out", "run") == 0  # the same config goes on


def test_a_folder_from_before_a_field_existed_counts_its_default(fake):
    assert call(fake, "--out", "run") == 0
    config = json.loads(Path("run/config.json").read_text())
    del config["descent"]["momentum"]
    Path("run/config.json").write_text(json.dumps(config))
    assert call(fake, "--out", "run") == 0
    assert call(fake, "--out", "run", "--descent.momentum", "True") == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"steps": 1', r"config.json line 1 column \d+: not JSON"), ('{"layers": 3}', "layers: 3 -> (absent)")],
)
def test_a_folder_with_a_broken_or_foreign_config_is_refused(fake, capsys, content, words):
    Path("run").mkdir()
    Path("run/config.json").write_text(content)
    assert call(fake, "--out", "run") == 2
    said = capsys.readouterr().err
    assert (words in said) or ("not JSON" in words and "not JSON" in said)
    assert Path("run/config.json").read_text() == content


@pytest.mark.parametrize(
    ("fail", "code", "words"),
    [
        ("nan", 1, "error: loss is NaN at step 1\n"),
        ("checkpoint", 1, "error: step 10 is damaged\n"),
        ("data", 2, "error: train.jsonl line 3: no field 'text'\n"),
        (
            "disk",
            1,
            "error: No space left on device: run/report.json; when that is mended, the same command goes on: "
            f"python -m {MODULE} --fail disk\n",
        ),
        ("forget", 2, f"error: {MODULE}.run returned NoneType, expected a Report\n"),
        ("interrupt", 130, f"interrupted; resume with: python -m {MODULE} --fail interrupt\n"),
    ],
)
def test_failures_of_a_run_are_one_line_and_a_code(fake, capsys, fail, code, words):
    assert call(fake, "--fail", fail) == code
    assert capsys.readouterr().err.lstrip("\n") == words
    assert not os.path.exists("runs/fake-small/report.json")


def test_a_folder_that_cannot_be_written_to_is_named_before_anything_happens(fake, capsys, monkeypatch):
    def read_only(*_):
        raise OSError(30, "Read-only file system", "run/config.json")

    monkeypatch.setattr(runner, "write_json", read_only)
    assert call(fake, "--out", "run") == 2
    said = capsys.readouterr()
    assert said.err == "error: --out run: cannot write there: Read-only file system\n"
    assert said.out == ""


def test_a_read_that_hangs_does_not_keep_the_process(tmp_path):
    """An orderly exit would wait for the thread of Grain's that hangs in the source."""
    program = """
import sys, time, types
from experiments import runner
from jaxlm.data import pipeline
from jaxlm.data.sources import Document
from jaxlm.data.store import build_store
from jaxlm.data.tokenizers import ByteTokenizer
from dataclasses import dataclass

def run(config):
    store = build_store(sys.argv[1], {"book": [Document("some words", "a")]}, ByteTokenizer(), seed=0, progress=False)
    pipeline.BatchSource.__getitem__ = lambda self, step: time.sleep(600)
    next(pipeline.make_train_iterator(store, batch_size=1, length=4, seed=0, timeout=0.1))

@dataclass(frozen=True)
class Config:
    pass

sys.modules["tool"] = module = types.ModuleType("tool")
module.Config, module.run = Config, run
runner.tool("tool", [])
"""
    words = [sys.executable, "-c", program, str(tmp_path / "store")]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "error: batch of step 1 from 'book' in" in ended.stderr
    assert "nothing came within 0.1 s" in ended.stderr
    assert ended.returncode == 2


def test_debug_shows_where_and_a_bug_is_not_hidden(fake, capsys):
    assert call(fake, "--fail", "nan", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"):
        runner.execute(fake, ["--fail", "bug", "--out", "other"])


def test_a_damaged_log_does_not_cost_the_report(fake, capsys):
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text("broken\n")
    assert call(fake, "--out", "run") == 0
    assert "warning: no curves: run/metrics.jsonl line 1" in capsys.readouterr().err
    assert load("run/report.json").figures == ()


def test_a_config_may_not_use_the_names_of_the_command_line(fake, capsys):
    @dataclasses.dataclass(frozen=True)
    class Config:
        out: str = "x"

    fake.Config, fake.PRESETS = Config, {"small": Config()}
    assert call(fake) == 2
    assert "Config has a field 'out'" in capsys.readouterr().err


def test_a_tool_has_options_and_errors_but_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    @dataclasses.dataclass(frozen=True)
    class Config:
        checkpoint: str
        """A run folder."""
        seed: int = 0

    def run(config):
        if config.seed:
            raise ConfigError(f"seed is {config.seed}")
        print(f"sampling from {config.checkpoint}")

    generate = types.ModuleType("experiments.generate")
    generate.Config, generate.run = Config, run
    assert runner.execute_tool(generate, ["--checkpoint", "runs/x"]) == 0
    assert capsys.readouterr().out == "sampling from runs/x\n"
    assert runner.execute_tool(generate, ["--checkpoint", "x", "--sed", "1"]) == 2
    assert "did you mean --seed?" in capsys.readouterr().err
    assert runner.execute_tool(generate, ["--checkpoint", "x", "--seed", "1"]) == 2
    assert capsys.readouterr().err == "error: seed is 1\n"
    with pytest.raises(SystemExit) as end:
        runner.execute_tool(generate, [])
    assert end.value.code == 2
    assert "--checkpoint" in capsys.readouterr().err
    assert os.listdir() == []


@pytest.fixture
def python(tmp_path):
    """Runs `python ...` where the fake experiment is one of the experiments."""
    home = tmp_path / "experiments"
    shutil.copytree(ROOT / "experiments", home, ignore=shutil.ignore_patterns("__pycache__", "results"))
    (home / "optimization").mkdir(exist_ok=True)
    shutil.copy(HERE / "fake_experiment.py", home / "optimization" / "fake.py")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "JAX_PLATFORMS": "cpu"}
    for name in ("GLIBC_TUNABLES", "JAXLM_RESTARTED", "JAXLM_HUGE_PAGES"):
        env.pop(name, None)

    def start(*argv, **more):
        command = [sys.executable, *argv]
        # Where the tests run in the background of a shell, Ctrl-C is ignored, and processes inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                command, cwd=tmp_path, env=env | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        finally:
            signal.signal(signal.SIGINT, before)

    return start


def test_as_a_process_with_huge_pages_it_runs_once(python):
    from experiments.launch import _glibc_has_huge_pages

    process = python("-m", MODULE, "--preset", "smoke", "--out", "a b")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    expected = "glibc.malloc.hugetlb=1" if _glibc_has_huge_pages() else None
    assert f"tunables {expected}" in out
    assert out.count("run folder: a b") == 1


def test_as_a_process_it_can_be_interrupted_and_names_what_is_missing(python):
    waiting = python("-m", MODULE, "--fail", "wait", JAXLM_HUGE_PAGES="0")
    wrong = python("-m", "experiments.optimization.fak")
    while (line := waiting.stdout.readline()) != "waiting\n":
        assert line, waiting.stderr.read()
        assert "tunables glibc" not in line
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert err.strip() == f"interrupted; resume with: python -m {MODULE} --fail wait"
    _, err = wrong.communicate(timeout=60)
    assert wrong.returncode == 2
    assert err.startswith(f"error: no experiment 'experiments.optimization.fak': did you mean {MODULE}?")
