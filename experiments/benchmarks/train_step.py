"""Speed, compile time and memory of the training step, beside the same Llama in PyTorch.

    python -m experiments.benchmarks.train_step [--precisions float32] [--rounds 8] [--out FILE]

Both sides start from the same weights, see the same batch and take AdamW steps; each runs in its own process and they
take turns. PyTorch is `transformers`' Llama with scaled-dot-product attention, as it is ("eager") and under
`torch.compile`, bfloat16 by CPU autocast; ours is a Llama-shaped `Decoder`, bfloat16 being the format of the operands
of matrix products. About three minutes on two cores.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments import runner
from experiments.benchmarks import harness
from experiments.benchmarks.llama import Size, load_into, read_params, write_weights
from experiments.checks import check_counts

LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    model: Size = Size()
    batch: int = 16
    """Rows of a batch."""
    length: int = 256
    """Tokens of a row."""
    precisions: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    rounds: int = 6
    """How often the sides take turns."""
    steps: int = 3
    """Steps of one turn. The fastest of all rounds counts."""
    compiled: bool = True
    """Whether `torch.compile` takes part (it takes half a minute to compile)."""
    out: Path | None = None
    """Where the figures go, as JSON."""

    def __post_init__(self):
        check_counts(self, "batch", "length", "rounds", "steps")


def run(config: Config) -> list[dict[str, Any]]:
    """Measures and prints; one row a side and precision."""
    sides = ["jaxlm"]
    if harness.has_torch():
        sides += ["torch"] + ["torch.compile"] * config.compiled
    else:
        print(harness.WITHOUT_TORCH)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        write_weights(weights, config.model)
        for precision in config.precisions:
            workers = [_worker(side, config, precision, weights) for side in sides]
            harness.in_turn(workers, rounds=config.rounds, calls=config.steps)
            for side, worker in zip(sides, workers, strict=True):
                tokens = config.batch * config.length / min(worker.seconds)
                rows.append(
                    {"side": side, "precision": precision, "tokens_per_second": tokens, **harness.summary(worker)}
                )
                worker.close()
    _print(rows)
    harness.save(config.out, {"config": dataclasses.asdict(dataclasses.replace(config, out=None)), "rows": rows})
    return rows


def jaxlm(
    size: dict[str, int], batch: int, length: int, precision: str, weights: str
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Our side, in its own process."""
    import jax
    import optax

    from jaxlm.core.precision import Precision
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM
    from jaxlm.training import init_state, make_step

    config = Size(**size).decoder(length, precision=Precision(matmul=precision))
    tx = optax.adamw(LEARNING_RATE, *BETAS, weight_decay=WEIGHT_DECAY)
    state = init_state(read_params(Path(weights), config), tx, jax.random.key(0))
    inputs, targets = _tokens(size["vocab_size"], batch, length)
    data = {"inputs": inputs, "targets": targets, "loss_weights": np.ones((batch, length), np.float32)}
    data = jax.device_put(data)

    start = time.perf_counter()
    step = jax.jit(make_step(CausalLM(Decoder(config)), tx), donate_argnums=0).lower(state, None, data).compile()
    compile_seconds = time.perf_counter() - start
    state, metrics = step(state, None, data)
    loss = float(metrics["loss"][0] / metrics["loss"][1])

    def once() -> None:
        nonlocal state
        state, metrics = step(state, None, data)
        jax.block_until_ready((state, metrics))

    return {"first_loss": loss, "compile_seconds": compile_seconds}, once


def torch(
    size: dict[str, int], batch: int, length: int, precision: str, weights: str, compiled: bool
) -> tuple[dict[str, Any], Callable[[], None]]:
    """PyTorch's side, in its own process."""
    import torch

    shape = Size(**size)
    model = shape.transformers(length)
    load_into(model, Path(weights))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    inputs, targets = (torch.from_numpy(x).long() for x in _tokens(shape.vocab_size, batch, length))

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    forward = torch.compile(loss_of) if compiled else loss_of

    def once() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = forward(inputs, targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    start = time.perf_counter()
    loss = once()
    first = time.perf_counter() - start
    start = time.perf_counter()
    once()
    return {"first_loss": loss, "compile_seconds": max(0.0, first - (time.perf_counter() - start))}, once


def _worker(side: str, config: Config, precision: str, weights: Path) -> harness.Worker:
    settings = {
        "size": dataclasses.asdict(config.model),
        "batch": config.batch,
        "length": config.length,
        "precision": precision,
        "weights": str(weights),
    }
    if side == "jaxlm":
        return harness.Worker(f"{__spec__.name}:jaxlm", settings, harness.HUGE_PAGES)
    return harness.Worker(f"{__spec__.name}:torch", {**settings, "compiled": side == "torch.compile"})


def _tokens(vocab_size: int, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, vocab_size, (batch, length + 1), dtype=np.int32)
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Training step (fastest call; ratio: tokens/s of ours to this side's)")
    for name in ("precision", "side", "tokens/s", "ms/step", "median", "compile s", "peak MB", "first loss", "ratio"):
        table.add_column(name, justify="left" if name in ("precision", "side") else "right")
    ours = {row["precision"]: row["tokens_per_second"] for row in rows if row["side"] == "jaxlm"}
    for row in rows:
        table.add_row(
            row["precision"],
            row["side"],
            f"{row['tokens_per_second']:,.0f}",
            f"{1e3 * row['seconds']:.0f}",
            f"{1e3 * row['median_seconds']:.0f}",
            f"{row['compile_seconds']:.1f}",
            f"{row['peak_mb']:,.0f}",
            f"{row['first_loss']:.4f}",
            f"{ours[row['precision']] / row['tokens_per_second']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    runner.tool(__name__)
