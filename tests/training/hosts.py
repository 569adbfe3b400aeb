"""Several real processes on this machine, joined as the hosts of a cluster are; and the run that they train.

Run as a module this is one such process: `python -m tests.training.hosts SETTINGS` with a JSON object for `train`.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS, LENGTH, BATCH = 64, 16, 8


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended, and how long after the first of its group; `code` is `None` if it never did."""

    code: int | None
    output: str
    seconds: float


def run_together(
    count: int,
    command: Sequence[str],
    *,
    devices: int = 1,
    seconds: float = 400,
    hanging: Sequence[int] = (),
    env: dict[str, str] | None = None,
) -> list[Ended]:
    """`command` in `count` processes that find one another, each with so many devices.

    All have ended when it returns: those in `hanging` are killed after the others, and all of them after `seconds`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for index in range(count):
        several = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        settings = {
            **(several if count > 1 else {}),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAXLM_HUGE_PAGES": "0",
            "PYTHONPATH": str(ROOT),
            **(env or {}),
        }
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **settings},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return _wait(processes, seconds, set(hanging))


def _wait(processes: list[subprocess.Popen], seconds: float, hanging: set[int]) -> list[Ended]:
    ended: dict[int, float] = {}
    deadline = time.monotonic() + seconds
    try:
        while len(hanging | ended.keys()) < len(processes) and time.monotonic() < deadline:
            now = time.monotonic()
            for index, process in enumerate(processes):
                if index not in ended and process.poll() is not None:
                    ended[index] = now
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    outputs = [process.communicate()[0] for process in processes]
    if len(hanging | ended.keys()) < len(processes):
        raise AssertionError(f"not ended after {seconds} s:\n" + "\n---\n".join(outputs))
    first = min(ended.values())
    return [
        Ended(p.returncode if i in ended else None, outputs[i], ended.get(i, first) - first)
        for i, p in enumerate(processes)
    ]


def worker(**settings: Any) -> list[str]:
    """The command of a process that calls `train(**settings)`."""
    return [sys.executable, "-m", "tests.training.hosts", json.dumps(settings)]


def build_rows(folder: Path) -> None:
    """A store whose rows are its documents, each beginning with its own number."""
    from jaxlm.data.sources import Document
    from jaxlm.data.store import build_store
    from jaxlm.data.tokenizers import ByteTokenizer

    texts = (f"{i:03d} " + chr(ord("a") + i % 26) * (LENGTH - 5) for i in range(ROWS))
    documents = [Document(text, str(i)) for i, text in enumerate(texts)]
    build_store(folder, {"rows": documents}, ByteTokenizer(), seed=1, progress=False)


def row_numbers(inputs: Any) -> list[int]:
    """The numbers of the rows of a batch, from their text."""
    return [int(bytes(row[1:4].tolist())) for row in inputs]


class Recorded:
    """Training batches; writes down the numbers of the rows that are read, and misbehaves after a given step."""

    def __init__(self, batches: Any, path: Path, after: int = -1, send: int = 0):
        self.batches, self.path, self.after, self.send = batches, path, after, send

    def __next__(self) -> Any:
        step = self.batches.next_step
        if step == self.after:
            os.kill(os.getpid(), self.send)
        batch = next(self.batches)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "rows": row_numbers(batch["inputs"])}) + "\n")
        return batch

    def provenance(self, step: int) -> Any:
        return self.batches.provenance(step)

    def get_state(self) -> Any:
        return self.batches.get_state()

    def set_state(self, state: Any) -> None:
        self.batches.set_state(state)


def train(
    store: str,
    out: str,
    rows: str,
    *,
    steps: int,
    mesh: dict[str, int] | None = None,
    checkpoint_every: int = 3,
    culprit: int = -1,
    after: int = -1,
    send: int = 0,
    devices: Any = None,
) -> None:
    """Trains a tiny decoder on a store of `build_rows`, resuming what is in `out`.

    Process `culprit` sends itself the signal `send` when it is to read the batch after step `after`.
    """
    import jax

    from jaxlm.core import distributed
    from jaxlm.core.sharding import MeshConfig, make_mesh
    from jaxlm.data.pipeline import make_train_iterator
    from jaxlm.data.store import open_store
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM
    from jaxlm.optim import OptimizerConfig
    from jaxlm.testing import tiny_config
    from jaxlm.training import Program, exclusive, train_in_folder

    distributed.initialize()
    model = Decoder(tiny_config("llama", num_layers=2, vocab_size=264, max_length=LENGTH))
    tx = OptimizerConfig(learning_rate=0.01, warmup=0.0).make(8, model.axes())
    program = Program(model, CausalLM(model), tx, make_mesh(MeshConfig(**(mesh or {})), devices))
    index, count = program.data_share
    batches = make_train_iterator(
        open_store(Path(store)), batch_size=BATCH, length=LENGTH, seed=5, process_index=index, process_count=count
    )
    here = jax.process_index()
    path = Path(rows) / f"{index}-of-{count}-{here}.jsonl"
    recorded = Recorded(batches, path, after if here == culprit else -1, send)
    try:
        with exclusive(out):
            train_in_folder(Path(out), program, recorded, steps=steps, seed=0, checkpoint_every=checkpoint_every)
    finally:
        batches.close()


if __name__ == "__main__":
    from jaxlm.core.distributed import leave
    from jaxlm.core.errors import JaxlmError

    code = 0
    try:
        train(**json.loads(sys.argv[1]))
    except JaxlmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        code = 130
    leave(code)
