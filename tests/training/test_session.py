"""A run in a folder over its whole life: nothing grows, clocks may jump, what was owed is made up for."""

import gc
import json
import os
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.core.errors import CheckpointError, NonFiniteError
from jaxlm.core.sharding import MeshConfig, make_mesh
from jaxlm.data.pipeline import BatchSource, make_train_iterator
from jaxlm.data.sources import Document
from jaxlm.data.store import build_store
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.models import Decoder, DecoderConfig
from jaxlm.objectives import CausalLM
from jaxlm.optim import adamw
from jaxlm.reporting.run_folder import read_metrics, series
from jaxlm.training import Checkpoints, Interrupted, Program, train_in_folder
from jaxlm.training.callbacks import Log

CLOCKS = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def program():
    model = Decoder(DecoderConfig(vocab_size=260, num_layers=1, embed_dim=8, num_heads=1, mlp_dim=8, max_length=16))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Program(model, CausalLM(model), adamw(1e-2, axes=model.axes()), mesh)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    sources = {name: [Document(f"{name} {i} " * 9, f"{name}{i}") for i in range(40)] for name in ("ab", "cde")}
    return build_store(tmp_path_factory.mktemp("store") / "s", sources, ByteTokenizer(), seed=0, progress=False)


def number(params):
    """Something of the parameters, in place of an evaluation."""
    return {"eval/text/loss": float(np.asarray(jax.tree.leaves(params)[0]).ravel()[0])}


def train(out, program, store, steps, evaluate=None, **options):
    batches = make_train_iterator(store, batch_size=2, length=16, seed=0, weights=[1, 2])
    options = {"checkpoint_every": 10, "evaluate_every": 10, "seed": 0, "learning_rate": lambda step: 1e-2, **options}
    try:
        return train_in_folder(out, program, batches, steps=steps, evaluate=evaluate or number, **options)
    finally:
        batches.close()


def measured(out):
    """All that was logged and does not depend on the speed of the machine, line by line."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in (*CLOCKS, "resumed_at")} for line in lines]


def interrupt_at(step, monkeypatch):
    """SIGTERM while the step after `step` runs."""
    original = Log.on_metrics

    def on_metrics(self, number, metrics):
        original(self, number, metrics)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Log, "on_metrics", on_metrics)


class Growth:
    """Watches this process from an evaluation, which comes every so many steps."""

    def __init__(self, program, store, monkeypatch):
        from jaxlm.data.pipeline import eval_batches
        from jaxlm.decoding import DecoderStepper, GenerationConfig, generate_text
        from jaxlm.evals import likelihood, make_sums

        self.seen = []
        sums = program.jit(make_sums(program.objective, np.ones(260, np.int32)))
        settings = GenerationConfig(max_new_tokens=3, temperature=1.0)
        stepper = DecoderStepper(program.model)

        class Known(Checkpoints):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                opened.append(self)

        opened = []
        monkeypatch.setattr("jaxlm.training.session.Checkpoints", Known)

        def evaluate(params):
            batches = eval_batches(store, 0, batch_size=2, length=16, max_batches=2)
            found = likelihood(sums, params, batches, program.put)
            generate_text(stepper, params, ByteTokenizer(), ["a"], settings)
            opened[-1].wait()  # so that no file of a save is open
            gc.collect()
            self.seen.append(
                {
                    "files": len(os.listdir("/proc/self/fd")),
                    "threads": threading.active_count(),
                    "system threads": len(os.listdir("/proc/self/task")),
                    "compiled": len(self.compiled),
                    "megabytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6,
                }
            )
            return {"eval/text/loss": found.loss}

        self.evaluate, self.compiled = evaluate, []

    def __enter__(self):
        def listen(event, seconds, **about):
            if event == "/jax/core/compile/backend_compile_duration":
                self.compiled.append(about.get("fun_name", "").removeprefix("jit(").removesuffix(")"))

        self._listen = listen
        jax.monitoring.register_event_duration_secs_listener(listen)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def of(self, name):
        return [seen[name] for seen in self.seen]


def check_growth(growth, settled):
    """After `settled` evaluations nothing is compiled any more, and files and threads stay what they are."""
    assert growth.compiled.count("sums") == 1, growth.compiled
    assert growth.compiled.count("step") <= 1, growth.compiled  # an earlier test may have compiled it
    assert len(set(growth.of("compiled")[settled:])) == 1, growth.compiled
    for name, slack in (("files", 1), ("threads", 1), ("system threads", 3)):
        later = growth.of(name)[settled:]
        assert max(later) <= min(later) + slack, (name, later)


def test_a_run_of_300_steps_compiles_once_and_keeps_its_files_and_threads(program, store, tmp_path, monkeypatch):
    with Growth(program, store, monkeypatch) as growth:
        train(tmp_path, program, store, 300, growth.evaluate, checkpoint_every=30, evaluate_every=30)
    assert len(growth.seen) == 11
    check_growth(growth, settled=3)


@pytest.mark.release
def test_a_run_of_20000_steps_does_not_grow(program, store, tmp_path, monkeypatch):
    with Growth(program, store, monkeypatch) as growth:
        train(tmp_path, program, store, 20_000, growth.evaluate, checkpoint_every=250, evaluate_every=250)
    assert len(growth.seen) == 81
    for name in growth.seen[0]:
        print(name, [round(seen[name]) for seen in growth.seen[::8]])  # pytest -s shows it
    check_growth(growth, settled=3)
    memory = growth.of("megabytes")
    # From step 2,500 on; twice as many steps may not need twice as much more.
    assert max(memory[-10:]) - max(memory[10:20]) < 15


def test_clocks_may_jump(program, store, tmp_path, monkeypatch):
    train(tmp_path / "plain", program, store, 20)
    ticks = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 2e9 - 1e6 * next(ticks))
    monkeypatch.setattr(time, "time_ns", lambda: int(2e18) - 10**15 * next(ticks))
    with monkeypatch.context() as patch:
        interrupt_at(13, patch)
        with pytest.raises(Interrupted):
            train(tmp_path / "odd", program, store, 20)
    (first,) = os.listdir(tmp_path / "odd" / "tensorboard")
    train(tmp_path / "odd", program, store, 20)
    assert measured(tmp_path / "odd") == measured(tmp_path / "plain")
    assert min(series(read_metrics(tmp_path / "odd"), "seconds")[1]) > 0
    events = sorted(os.listdir(tmp_path / "odd" / "tensorboard"))
    assert events[0] == first  # TensorBoard reads them in this order
    assert len(events) == 2
    assert sorted(p.name for p in (tmp_path / "odd" / "checkpoints").iterdir() if p.name.isdigit()) == ["14", "20"]


class Killed(BaseException):
    pass


def test_an_evaluation_that_was_cut_off_after_its_checkpoint_is_made_up_for(program, store, tmp_path):
    calls = []

    def evaluate(params):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return number(params)

    with pytest.raises(Killed):
        train(tmp_path / "cut", program, store, 20, evaluate)
    train(tmp_path / "cut", program, store, 20, evaluate)
    calls = [1, 1, 1]
    train(tmp_path / "whole", program, store, 20, evaluate)
    cut, whole = (
        [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_metrics(tmp_path / name)]
        for name in ("cut", "whole")
    )
    assert cut == whole
    assert series(cut, "eval/text/loss")[0] == [0, 10, 20]


def test_a_run_whose_last_checkpoint_is_lost_says_so_and_goes_on(program, store, tmp_path, monkeypatch):
    original = Checkpoints.save

    def full(self, step, state, meta):
        if step > 10:
            self._failed(step, OSError(28, "No space left on device"))
            return False
        return original(self, step, state, meta)

    monkeypatch.setattr(Checkpoints, "save", full)
    with (
        pytest.warns(UserWarning, match="step 20 could not be saved"),
        pytest.raises(CheckpointError, match=r"last checkpoint is not saved \(.*No space left.*there: \[10\]"),
    ):
        train(tmp_path / "run", program, store, 20)
    monkeypatch.undo()
    assert json.loads((tmp_path / "run" / "data.json").read_text())["next_step"] == 0
    train(tmp_path / "run", program, store, 20)
    train(tmp_path / "plain", program, store, 20)
    found, plain = (dict(zip(*series(read_metrics(tmp_path / n), "train/loss"))) for n in ("run", "plain"))
    assert found == plain


def test_the_message_of_a_signal_is_true(program, store, tmp_path, monkeypatch, capsys):
    interrupt_at(4, monkeypatch)
    with pytest.raises(Interrupted):
        train(tmp_path / "good", program, store, 20)
    assert "the checkpoint of step 5 is saved" in capsys.readouterr().err
    monkeypatch.setattr(Checkpoints, "save", lambda self, *_: False)
    with pytest.raises(Interrupted):
        train(tmp_path / "bad", program, store, 20)
    assert "NOT saved; the last checkpoint is that of step none" in capsys.readouterr().err


def test_a_step_that_is_not_finite_leaves_its_batch_for_replay(program, store, tmp_path, monkeypatch):
    original = BatchSource.__getitem__

    def poisoned(self, step):
        batch = original(self, step)
        if step in (6, 8):
            batch["loss_weights"][1, 3] = np.nan
        return batch

    monkeypatch.setattr(BatchSource, "__getitem__", poisoned)
    train(tmp_path / "skip", program, store, 20, non_finite="skip")
    assert sorted(p.name for p in (tmp_path / "skip" / "incidents").iterdir()) == ["00000007.json", "00000009.json"]
    entry = json.loads((tmp_path / "skip" / "incidents" / "00000007.json").read_text())
    assert (entry["step"], entry["kind"], entry["batch"]["index"]) == (7, "not finite, skipped", 6)
    assert [row["source"] for row in entry["batch"]["rows"]] == ["ab", "cde"]
    with pytest.raises(NonFiniteError, match="step 7 is not finite"):
        train(tmp_path / "stop", program, store, 20)
    assert (tmp_path / "stop" / "incidents" / "00000007.json").is_file()
