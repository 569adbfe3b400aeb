"""Training processes killed at any moment: every one resumes, and what comes out is the uninterrupted run to the bit.

Nothing in the program helps: the moments are found from outside, by watching the files of the run.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxlm.reporting.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TEXT = str(ROOT / "jaxlm" / "core")
STEPS, CHECKPOINT, EVALUATION = 60, 3, 5
CLOCKS = ("seconds", "tokens_per_second", "mfu", "resumed_at")
PATIENCE = 240.0


class Starter:
    """Starts `experiments.pretrain` again and again: as a command, or (`forked`) by `starter.py`, which is quicker."""

    def __init__(self, *, forked):
        self.environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        self._helper = None
        if forked:
            command = [sys.executable, str(Path(__file__).with_name("starter.py"))]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._helper = subprocess.Popen(command, cwd=ROOT, env=self.environment, **pipes)

    def start(self, words, environment, log):
        """The id of the process, and a function that waits for its end and gives the exit code."""
        if self._helper is None:
            command = [sys.executable, "-m", "experiments.pretrain", *words]
            with open(log, "a") as out:
                everything = {**self.environment, **environment}
                process = subprocess.Popen(command, cwd=ROOT, env=everything, stdout=out, stderr=out)
            return process.pid, process.wait
        request = {"argv": words, "env": environment, "log": str(log)}
        self._helper.stdin.write(json.dumps(request) + "\n")
        self._helper.stdin.flush()
        return int(self._helper.stdout.readline()), lambda: int(self._helper.stdout.readline())

    def close(self):
        if self._helper is not None:
            self._helper.stdin.close()
            self._helper.wait(PATIENCE)


class Runs:
    """A run folder and a cache, and the processes that train in them, one after the other."""

    def __init__(self, folder, starter):
        folder.mkdir()
        self.out, self.cache, self.log = folder / "run", folder / "cache", folder / "log.txt"
        self._starter = starter

    def start(self):
        words = ["--preset", "smoke", "--steps", str(STEPS), "--checkpoint_every", str(CHECKPOINT)]
        words += ["--evaluate_every", str(EVALUATION), "--evaluate_batches", "1", "--sample_tokens", "2"]
        words += ["--data.path", TEXT, "--out", str(self.out)]
        self.pid, self._exit_code = self._starter.start(words, {"JAXLM_CACHE": str(self.cache)}, self.log)

    def alive(self):
        """Whether it runs: a process that ended waits as a zombie, or is gone."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        return False

    def wait(self):
        """The exit code of the process."""
        deadline = time.monotonic() + PATIENCE
        while self.alive():
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"it hangs: {self.log.read_text()[-3000:]}")
            time.sleep(0.01)
        return self._exit_code()

    def finish(self):
        self.start()
        assert self.wait() == 0, self.log.read_text()[-3000:]

    def strike(self, moment, chance):
        """Starts a process and kills it at a moment; whether it was still there to be killed."""
        if moment == "data":
            shutil.rmtree(self.cache, ignore_errors=True)
        seen = self.reached(moment)
        self.start()
        if moment == "start":
            time.sleep(chance.uniform(0.0, 2.0))
        else:
            self._await(moment, seen, chance)
        if moment in ("deadline", "twice"):
            self._kill(signal.SIGTERM)
            time.sleep(chance.uniform(0.0, 0.1))
        struck = self._kill(signal.SIGTERM if moment == "twice" else signal.SIGKILL)
        return self.wait() != 0 and struck

    def _await(self, moment, seen, chance):
        """Waits until the moment has come for the n-th time in this process, and a little longer."""
        times = chance.randint(1, {"data": 1, "write": 4, "evaluation": 3}.get(moment, 20))
        deadline, count = time.monotonic() + PATIENCE, 0
        while self.alive() and count < times:
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            now = self.reached(moment)
            count += len(now - seen)
            seen = seen | now
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, {"data": 0.02, "write": 0.03, "evaluation": 0.01}.get(moment, 0.05)))

    def reached(self, moment):
        """What says that a moment has come; each thing is new once."""
        if moment == "data":
            return {path.name for path in self.cache.glob("corpora/*/.*.partial")}
        if moment == "write":
            found = set()
            for path in (self.out / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    found.add((path.name, path.stat().st_ino, path.stat().st_ctime_ns // 10**9))
            return found
        lines = self.lines()
        if moment == "evaluation":  # the step before it has been logged, and it itself not
            with contextlib.suppress(ValueError, IndexError):
                row = json.loads(lines[-1])
                return {len(lines)} if row["step"] % EVALUATION == 0 and "train/loss" in row else set()
            return set()
        return set(range(len(lines)))

    def _kill(self, signum):
        if not self.alive():
            return False
        os.kill(self.pid, signum)
        return True

    def lines(self):
        path = self.out / "metrics.jsonl"
        return path.read_bytes().splitlines() if path.exists() else []

    def measured(self):
        """What was logged of each step and does not depend on the machine's speed, and whether all attempts agree."""
        rows = {row["step"]: {k: v for k, v in row.items() if k not in CLOCKS} for row in read_metrics(self.out)}
        for line in self.lines():
            row = json.loads(line)
            again = {k: v for k, v in row.items() if k not in CLOCKS}
            assert again.items() <= rows[row["step"]].items(), f"step {row['step']} was logged with other values"
        return rows

    def leftovers(self):
        """Temporary files and folders of killed processes."""
        found = [*self.out.rglob("*.partial"), *self.cache.rglob("*.partial")]
        return [*found, *(self.out / "checkpoints").glob("*.orbax-checkpoint-tmp*")]


def check_finished(runs, expected):
    assert runs.measured() == expected
    assert runs.leftovers() == []
    kept = sorted(int(p.name) for p in (runs.out / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [STEPS - CHECKPOINT, STEPS]
    assert sorted(p.name for p in (runs.out / "checkpoints").iterdir()) == sorted([*map(str, kept), "sums"])
    assert len(list((runs.out / "checkpoints" / "sums").iterdir())) == len(kept)
    assert (runs.out / "report.json").is_file()


def uninterrupted(folder, starter):
    """What a process logs that nobody kills."""
    runs = Runs(folder, starter)
    runs.finish()
    expected = runs.measured()
    assert sorted(expected) == list(range(STEPS + 1))
    assert sum("eval/core/loss" in row for row in expected.values()) == STEPS // EVALUATION + 1
    return expected


def test_processes_killed_while_they_read_write_and_evaluate_resume_to_the_same_bits(tmp_path):
    with contextlib.closing(Starter(forked=True)) as starter:
        expected = uninterrupted(tmp_path / "whole", starter)
        runs, chance = Runs(tmp_path / "killed", starter), random.Random(4)
        for moment in ("data", "write", "evaluation", "deadline"):
            assert runs.strike(moment, chance), moment
            assert len(runs.leftovers()) <= 2
        runs.finish()
    assert runs.log.read_text().count("resuming after step") >= 2
    check_finished(runs, expected)


@pytest.mark.release
@pytest.mark.parametrize(("kills", "forked"), [(60, True), (10, False)])
def test_many_kills_in_a_row(kills, forked, tmp_path):
    """Over the whole life of processes; a run that ends nevertheless is checked, and the next one begins."""
    with contextlib.closing(Starter(forked=forked)) as starter:
        chance, expected = random.Random(0), uninterrupted(tmp_path / "whole", starter)
        moments = ["start", "data", "write", "write", "evaluation", "step", "step", "deadline", "twice"]
        killed, ended = [], 0
        runs = Runs(tmp_path / "0", starter)
        while len(killed) < kills:
            moment = chance.choice(moments)
            if runs.strike(moment, chance):
                killed.append(moment)
                print(f"kill {len(killed)}: {moment}, {len(runs.lines())} lines", flush=True)
                assert len(runs.leftovers()) <= 3
            elif (runs.out / "report.json").is_file():
                check_finished(runs, expected)
                ended += 1
                runs = Runs(tmp_path / str(ended), starter)
        runs.finish()
    check_finished(runs, expected)
