"""Several programs measured in turn: each in a process of its own, a few calls at a time, round after round.

A machine's speed drifts within minutes, so what is compared has to run side by side; but two programs in one process
share allocator, threads and memory. Hence workers: a worker is a function `make(**settings) -> (facts, once)`, named as
`module:function`, called in a fresh process with an environment of its own. `facts` (JSON) is what setting up had to
say; `once()` does the work to be timed and returns when it is done.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Makes glibc's malloc ask for huge pages, which it does only at the start of a process. XLA's CPU runtime allocates
and frees its buffers in every step; with pages of 4 KiB, faulting them in is up to a fifth of a training step."""


class Worker:
    """A process that sets up `target` and then runs it when told to."""

    def __init__(self, target: str, settings: Mapping[str, Any], env: Mapping[str, str] | None = None):
        self.target = target
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the process)
        command = [sys.executable, "-m", "experiments.benchmarks._worker", target, json.dumps(settings)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self.facts = self._receive()
        self.seconds: list[float] = []
        self.peak_bytes = 0

    def run(self, count: int) -> None:
        """`count` calls; their seconds are added to `seconds`."""
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        answer = self._receive()
        self.seconds += answer["seconds"]
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{self.target} ended early:\n{self._errors.read()[-4000:]}")
        return json.loads(line)


def in_turn(workers: Sequence[Worker], *, rounds: int, calls: int) -> None:
    """`rounds` times, `calls` of each worker, one worker after the other."""
    for _ in range(rounds):
        for worker in workers:
            time.sleep(0.1)  # until the threads of the previous worker no longer wait for work in a loop
            worker.run(calls)


def summary(worker: Worker) -> dict[str, Any]:
    """`seconds` of the fastest call (others may use the machine), their median, and the memory it took."""
    return {
        **worker.facts,
        "seconds": min(worker.seconds),
        "median_seconds": statistics.median(worker.seconds),
        "peak_mb": worker.peak_bytes / 1e6,
    }


def has_torch() -> bool:
    """Whether the other side of a comparison is installed (the extra `bench`)."""
    return all(util.find_spec(name) is not None for name in ("torch", "transformers"))


WITHOUT_TORCH = "PyTorch and transformers are not installed: our side alone (pip install '.[bench]' adds theirs)"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    packages = ("jax", "flax", "torch", "transformers")
    versions = {name: metadata.version(name) for name in packages if util.find_spec(name) is not None}
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def save(path: Path | None, content: Mapping[str, Any]) -> None:
    """Writes the figures, with machine and versions, as JSON; nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), **content}, indent=2) + "\n")


def peak_bytes() -> int:
    """The most memory that this process has held."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
