"""Several real processes, joined by `jax.distributed`, train as one: losses, rows, stops, deaths, restarts.

Losses of differently divided batches differ by rounding: they are compared to 1e-5, relative.
"""

import json
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import pretrain, runner
from tests.training import hosts

TOLERANCE = 1e-5


def losses(out: Path, name: str = "train/loss") -> dict[int, float]:
    """The last value logged for each step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def rows_read(folder: Path) -> dict[int, dict[str, list[int]]]:
    """`step -> file of a process -> rows`; what was read again after a restart counts once."""
    found: dict[int, dict[str, list[int]]] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            found.setdefault(record["step"], {})[path.stem] = record["rows"]
    return found


def check_same_losses(got: dict[int, float], expected: dict[int, float]) -> None:
    assert sorted(got) == sorted(expected)
    np.testing.assert_allclose([got[s] for s in sorted(got)], [expected[s] for s in sorted(got)], rtol=TOLERANCE)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hosts") / "store"
    hosts.build_rows(folder)
    return folder


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    """The run of one process and device that is never stopped: its losses, and its rows by step."""
    folder = tmp_path_factory.mktemp("alone")
    train_here(store, folder, steps=8)
    return losses(folder / "out"), {step: files["0-of-1-0"] for step, files in rows_read(folder).items()}


def train_here(store: Path, folder: Path, *, devices: int = 1, **settings) -> None:
    where = {"store": str(store), "out": str(folder / "out"), "rows": str(folder)}
    hosts.train(**where, devices=jax.devices()[:devices], **settings)


def train_together(count: int, store: Path, folder: Path, *, steps: int = 8, **settings) -> list[hosts.Ended]:
    options = {name: settings.pop(name) for name in ("devices", "hanging", "env") if name in settings}
    where = {"store": str(store), "out": str(folder / "out"), "rows": str(folder)}
    return hosts.run_together(count, hosts.worker(**where, steps=steps, **settings), **options)


def check_rows_once(folder: Path, expected: dict[int, list[int]]) -> None:
    """Every step had the rows of the uninterrupted run, and no row was trained on twice or left out."""
    seen = []
    for step, rows in expected.items():
        files = rows_read(folder)[step]
        # The processes of one attempt divide a batch; attempts with different numbers of processes read the same. One
        # in which a process died has less of it, and another one after it.
        read = []
        for count in {name.split("-of-")[1].split("-")[0] for name in files}:
            attempt = {name: files[name] for name in sorted(files) if f"-of-{count}-" in name}
            share = hosts.BATCH // int(count)
            for name, part in attempt.items():
                first = share * int(name.split("-of-")[0])
                assert part == rows[first : first + share]
            read.append(len(attempt) == int(count))
        assert any(read), (step, files)
        seen += rows
    assert sorted(seen) == list(range(hosts.ROWS))


def test_a_signal_to_one_of_two_processes_stops_both_and_one_process_goes_on(store, alone, tmp_path):
    ended = train_together(2, store, tmp_path, culprit=1, after=2, send=signal.SIGTERM, checkpoint_every=100)
    assert [e.code for e in ended] == [130, 130], ended
    stops = {e.output.strip().splitlines()[-1] for e in ended}
    assert len(stops) == 1
    assert "stopped by SIGTERM after step" in stops.pop()
    stopped = max(losses(tmp_path / "out"))
    assert 3 <= stopped <= 6
    assert [p.name for p in (tmp_path / "out" / "checkpoints").glob("[0-9]*")] == [str(stopped)]
    train_here(store, tmp_path, steps=8)
    check_same_losses(losses(tmp_path / "out"), alone[0])
    check_rows_once(tmp_path, alone[1])
    assert min(losses(tmp_path / "out", "resumed_at")) == stopped + 1


def test_two_processes_run_an_experiment_as_one(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXLM_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} bottles of beer on the wall, {i} bottles of beer.\n" for i in range(400)))
    options = ["--preset", "smoke", "--data.path", str(text), "--evaluate_every", "2"]

    def command(name: str) -> list[str]:
        return [*options, "--out", str(tmp_path / name)]

    module = [sys.executable, "-m", "experiments.pretrain"]
    ended = hosts.run_together(2, [*module, *command("two"), "--mesh.data", "1", "--mesh.fsdp", "2"])
    assert [e.code for e in ended] == [0, 0], ended
    assert "report:" in ended[0].output
    assert "report:" not in ended[1].output
    assert runner.execute(pretrain, command("one")) == 0
    for name in ("train/loss", "eval/text/loss", "eval/text/bits_per_byte"):
        check_same_losses(losses(tmp_path / "two", name), losses(tmp_path / "one", name))
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert two["samples"] == one["samples"]
    assert len((tmp_path / "two" / "metrics.jsonl").read_text().splitlines()) == len(
        (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    )


NAMED = ("ProcessLostError", "the JAX distributed service detected fatal errors")
"""What a process says that stops because another has gone: ours, or JAX's own."""


@pytest.mark.parametrize(
    ("count", "culprit", "then"),
    [
        pytest.param(4, 2, 2, marks=pytest.mark.slow),
        pytest.param(2, 0, 4, marks=pytest.mark.release),
        pytest.param(2, 1, 2, marks=pytest.mark.release),
    ],
)
def test_when_one_is_killed_the_others_stop_and_the_run_goes_on_with_any_number(
    count, culprit, then, store, alone, tmp_path
):
    ended = train_together(count, store, tmp_path, culprit=culprit, after=5, send=signal.SIGKILL, checkpoint_every=2)
    assert ended[culprit].code == -signal.SIGKILL
    for index, other in enumerate(ended):
        if index != culprit:
            assert other.code not in (0, None)
            assert any(name in other.output for name in NAMED), other.output
            assert other.seconds < 30  # the connection broke: nobody waited for heartbeats
    again = train_together(then, store, tmp_path, checkpoint_every=2)
    assert [e.code for e in again] == [0] * then, again
    assert "resuming after step" in again[0].output
    check_same_losses(losses(tmp_path / "out"), alone[0])
    check_rows_once(tmp_path, alone[1])


@pytest.mark.release
def test_when_one_hangs_the_others_stop_after_the_heartbeats(store, alone, tmp_path):
    ended = train_together(
        2,
        store,
        tmp_path,
        culprit=1,
        after=5,
        send=signal.SIGSTOP,
        checkpoint_every=2,
        hanging=[1],
        env={"JAXLM_HEARTBEAT_SECONDS": "10"},
    )
    assert ended[1].code is None
    assert ended[0].code not in (0, None)
    assert any(name in ended[0].output for name in NAMED), ended[0].output
    train_here(store, tmp_path, steps=8)
    check_same_losses(losses(tmp_path / "out"), alone[0])


@pytest.mark.parametrize(
    ("count", "devices", "mesh", "parts"),
    [
        pytest.param(4, 1, {"data": 2, "fsdp": 2}, 4, marks=pytest.mark.slow),
        pytest.param(2, 2, {"data": 1, "fsdp": 2, "tensor": 2}, 2, marks=pytest.mark.slow),
        # An axis that is not the batch's lies across the processes.
        pytest.param(2, 1, {"data": 1, "tensor": 2}, 1, marks=pytest.mark.slow),
        pytest.param(4, 1, {"data": 2, "sequence": 2}, 2, marks=pytest.mark.release),
    ],
)
def test_meshes_across_processes(count, devices, mesh, parts, store, alone, tmp_path):
    ended = train_together(count, store, tmp_path, mesh=mesh, devices=devices)
    assert [e.code for e in ended] == [0] * count, ended
    check_same_losses(losses(tmp_path / "out"), alone[0])
    for step, files in rows_read(tmp_path).items():
        assert len(files) == count
        by_part: dict[str, set[tuple[int, ...]]] = {}
        for name, rows in files.items():
            by_part.setdefault(name.rsplit("-", 1)[0], set()).add(tuple(rows))
        # Processes that share a part of the batch read the same rows of it.
        assert sorted(by_part) == [f"{index}-of-{parts}" for index in range(parts)]
        assert all(len(seen) == 1 for seen in by_part.values())
        assert [row for name in sorted(by_part) for row in by_part[name].pop()] == alone[1][step]
