"""Time and memory of the fused cross-entropy, beside that which holds all logits.

    python -m experiments.benchmarks.cross_entropy [--vocab 8192 65536] [--out FILE]

Forward and backward, gradients of the activations and of the head; memory is the compiler's own figure of temporary
buffers. All in one process and in turn; about a minute on two cores.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from experiments import runner
from experiments.benchmarks import harness
from experiments.checks import check_counts
from jaxlm.core.errors import ConfigError
from pallas_kernels.cross_entropy import cross_entropy


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    tokens: int = 1024
    embed: int = 256
    vocab: tuple[int, ...] = (8192, 65536)
    dtype: Literal["float32", "bfloat16"] = "float32"
    rounds: int = 5
    """How often the implementations take turns. The fastest call counts."""
    out: Path | None = None
    """Where the figures go, as JSON."""

    def __post_init__(self):
        check_counts(self, "tokens", "embed", "rounds")
        if not self.vocab or min(self.vocab) < 1:
            raise ConfigError(f"vocab is {self.vocab}, expected sizes of at least 1")


def run(config: Config) -> list[dict[str, Any]]:
    """Measures and prints; one row a vocabulary and implementation."""
    rows = []
    for vocab in config.vocab:
        x = jax.random.normal(jax.random.key(0), (config.tokens, config.embed), config.dtype)
        head = jax.random.normal(jax.random.key(1), (config.embed, vocab), config.dtype) / config.embed**0.5
        targets = jax.random.randint(jax.random.key(2), (config.tokens,), 0, vocab)

        def loss(x, head, targets, implementation):
            return jnp.mean(cross_entropy(x, head, targets, implementation=implementation)[0])

        programs, seconds = {}, {}
        for name in ("reference", "auto"):
            both = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=3)
            programs[name] = both.lower(x, head, targets, name).compile()
            jax.block_until_ready(programs[name](x, head, targets))
            seconds[name] = float("inf")
        for _ in range(config.rounds):
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(x, head, targets))
                seconds[name] = min(seconds[name], time.perf_counter() - start)
        for name, program in programs.items():
            rows.append(
                {
                    "vocab": vocab,
                    "implementation": name,
                    "seconds": seconds[name],
                    "temporary_mb": program.memory_analysis().temp_size_in_bytes / 1e6,
                    # Logits, and the two gradients' products; computing logits again is not counted.
                    "tflop_per_second": 6 * config.tokens * config.embed * vocab / seconds[name] / 1e12,
                    "ratio": seconds["reference"] / seconds[name],
                }
            )
    _print(rows)
    settings = dataclasses.asdict(dataclasses.replace(config, out=None))
    device = {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind}
    harness.save(config.out, {"config": settings, **device, "rows": rows})
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Cross-entropy, forward and backward (ratio: speed to that of the reference)")
    for name in ("vocab", "implementation", "ms", "temporary MB", "TFLOP/s", "ratio"):
        table.add_column(name, justify="left" if name == "implementation" else "right")
    for row in rows:
        table.add_row(
            f"{row['vocab']:,}",
            row["implementation"],
            f"{1e3 * row['seconds']:.1f}",
            f"{row['temporary_mb']:,.1f}",
            f"{row['tflop_per_second']:.3f}",
            f"{row['ratio']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    runner.tool(__name__)
