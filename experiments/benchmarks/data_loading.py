"""Rows a second of the training data's reader, in one process and in several that each read their part of a batch.

    python -m experiments.benchmarks.data_loading [--processes 1 2 4 8] [--rounds 5] [--out FILE]

A store of random tokens is built in a temporary folder (and so lies in the page cache: this measures the reader, not
the disk). Each process reads its rows of every global batch, as the hosts of a run do, all at the same time; a batch
is as fast as the slowest of them. `scaling` is the rate beside that of one process. It cannot be above the number of
cores: with 8 processes on 8 cores or more, expect 6 or more. About a minute.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from experiments import runner
from experiments.benchmarks import harness
from experiments.checks import check_counts
from jaxlm.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    processes: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of processes; each divides `batch`."""
    batch: int = 512
    """Rows of a global batch."""
    length: int = 1024
    """Tokens of a row."""
    tokens: int = 20_000_000
    """In the store."""
    steps: int = 10
    """Batches that are read in one turn."""
    rounds: int = 5
    """How often the sides take turns. The fastest of all rounds counts."""
    out: Path | None = None
    """Where the figures go, as JSON."""

    def __post_init__(self):
        check_counts(self, "batch", "length", "tokens", "steps", "rounds")
        if not self.processes:
            raise ConfigError("processes is empty")
        for count in self.processes:
            if count < 1 or self.batch % count:
                raise ConfigError(f"processes has {count}, expected divisors of batch {self.batch}")


def run(config: Config) -> list[dict[str, Any]]:
    """Measures and prints; one row for each number of processes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "store", config.tokens)
        sides = {count: _side(count, config, folder) for count in config.processes}
        for _ in range(config.rounds):
            for workers in sides.values():
                with ThreadPoolExecutor(len(workers)) as pool:
                    list(pool.map(lambda worker: worker.run(1), workers))
        for count, workers in sides.items():
            # Of the slowest process in each turn, the fastest turn.
            seconds = min(max(turn) for turn in zip(*(worker.seconds for worker in workers), strict=True))
            tokens = [worker.facts["tokens_per_batch"] for worker in workers]
            rate = config.steps * config.batch / seconds
            rows.append({"processes": count, "rows_per_second": rate, "tokens_read_by_each": tokens})
            for worker in workers:
                worker.close()
    alone = rows[0]["rows_per_second"] / rows[0]["processes"]
    for row in rows:
        row["scaling"] = row["rows_per_second"] / alone
        each = row["tokens_read_by_each"][0]
        print(
            f"{row['processes']:3} processes  {row['rows_per_second']:10,.0f} rows/s  {row['scaling']:5.2f} x  "
            f"{each:9,} tokens of a batch read by each"
        )
    print(f"({os.cpu_count()} cores)")
    harness.save(config.out, {"config": dataclasses.asdict(dataclasses.replace(config, out=None)), "rows": rows})
    return rows


def _side(count: int, config: Config, folder: str) -> list[harness.Worker]:
    settings = {"store": f"{folder}/store", "batch": config.batch, "length": config.length, "steps": config.steps}
    target = "experiments.benchmarks.data_loading:reader"
    return [harness.Worker(target, {**settings, "index": index, "count": count}) for index in range(count)]


def build(folder: Path, tokens: int) -> None:
    """A store of documents of random bytes, 100 to 4,000 tokens each."""
    from jaxlm.data.sources import Document
    from jaxlm.data.store import build_store
    from jaxlm.data.tokenizers import ByteTokenizer

    rng = np.random.default_rng(0)

    def documents():
        left = tokens
        while left > 0:
            size = min(left, int(rng.integers(100, 4000)))
            left -= size
            yield Document(rng.integers(32, 127, size, dtype=np.uint8).tobytes().decode(), str(left))

    build_store(folder, {"random": documents()}, ByteTokenizer(), seed=0, progress=False)


def reader(
    store: str, batch: int, length: int, steps: int, index: int, count: int
) -> tuple[dict[str, Any], Callable[[], None]]:
    """One process that reads its part of `steps` batches at each call."""
    from jaxlm.data.pipeline import make_train_iterator
    from jaxlm.data.store import open_store

    options = {"batch_size": batch, "length": length, "seed": 0, "buffer": 0}
    batches = make_train_iterator(open_store(store), process_index=index, process_count=count, **options)
    first = next(batches)

    def once() -> None:
        for _ in range(steps):
            next(batches)

    return {"tokens_per_batch": int(first["inputs"].size)}, once


if __name__ == "__main__":
    runner.tool(__name__)
