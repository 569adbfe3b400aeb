"""Benchmarks that suit this machine, one after the other, into one JSON file.

    python -m experiments.benchmarks --out figures.json
    python -m experiments.benchmarks --only train_step decode

Not among them: `smollm2`, which needs a package with its weights, and `population`, which writes no figures. Each runs
as its own command (`python -m experiments.benchmarks.NAME`), so that one which fails does not take the others along:
its error is what the file then holds of it.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments import runner
from experiments.benchmarks import harness
from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.json_files import write_json

# Options that keep the whole within its time.
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "attention": ("--rounds", "3"),
    "quantized_matmul": ("--rounds", "5"),
    "cross_entropy": ("--rounds", "3"),
    "train_step": ("--rounds", "2"),
    "decode": ("--rounds", "2"),
    "data_loading": ("--rounds", "3"),
}
ACCELERATOR = {"quantized_matmul": ("--preset", "accelerator")}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which benchmarks."""

    only: tuple[str, ...] = ()
    """Names; by default all of these."""
    out: Path = Path("benchmarks.json")
    """Where the figures go."""

    def __post_init__(self):
        for name in self.only:
            if name not in BENCHMARKS:
                raise ConfigError(f"no benchmark '{name}': {nearest(name, BENCHMARKS)}")


def run(config: Config) -> None:
    """Runs them and writes the file after each."""
    import jax

    platform = jax.default_backend()
    found: dict[str, Any] = {"machine": harness.machine(), "platform": platform, "benchmarks": {}}
    for name in config.only or BENCHMARKS:
        options = BENCHMARKS[name] + (() if platform == "cpu" else ACCELERATOR.get(name, ()))
        found["benchmarks"][name] = _run(name, options)
        write_json(config.out, found)
    print(f"figures: {config.out}")


def _run(name: str, options: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder) / "figures.json", time.monotonic()
        command = [sys.executable, "-m", f"experiments.benchmarks.{name}", *options, "--out", str(out)]
        failed = subprocess.run(command).returncode
        found = json.loads(out.read_text()) if out.exists() else {}
        if failed:
            found["error"] = f"exit code {failed}"
        return {**found, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    runner.tool(__name__)
