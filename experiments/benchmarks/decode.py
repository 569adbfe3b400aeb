"""Speed of greedy generation, beside `transformers.generate` with the same weights and prompts.

    python -m experiments.benchmarks.decode [--batches 1 16] [--rounds 5] [--out FILE]

Each side runs in its own process and they take turns. A call is a whole generation: prompts in, tokens out, prefill
included, after one call that compiles. The sides' tokens are compared: in float32 greedy tokens agree until two logits
are closer than rounding. About two minutes on two cores.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import runner
from experiments.benchmarks import harness
from experiments.benchmarks.llama import Size, load_into, read_params, write_weights
from experiments.checks import check_counts
from jaxlm.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    model: Size = Size()
    batches: tuple[int, ...] = (1, 16)
    """Rows that are generated together."""
    prompt: int = 64
    """Tokens of each prompt."""
    new_tokens: int = 128
    """Tokens to generate for each."""
    rounds: int = 5
    """How often the sides take turns. The fastest call counts."""
    out: Path | None = None
    """Where the figures go, as JSON."""

    def __post_init__(self):
        check_counts(self, "prompt", "new_tokens", "rounds")
        if not self.batches or min(self.batches) < 1:
            raise ConfigError(f"batches are {self.batches}, expected at least 1")


def run(config: Config) -> list[dict[str, Any]]:
    """Measures and prints; one row a side and batch size."""
    sides = ["jaxlm"] + ["torch"] * harness.has_torch()
    if len(sides) == 1:
        print(harness.WITHOUT_TORCH)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        write_weights(weights, config.model)
        for batch in config.batches:
            settings = {
                "size": dataclasses.asdict(config.model),
                "batch": batch,
                "prompt": config.prompt,
                "new_tokens": config.new_tokens,
                "weights": str(weights),
            }
            workers = [
                harness.Worker(f"{__spec__.name}:{side}", settings, harness.HUGE_PAGES if side == "jaxlm" else None)
                for side in sides
            ]
            harness.in_turn(workers, rounds=config.rounds, calls=1)
            for side, worker in zip(sides, workers, strict=True):
                found = harness.summary(worker)
                tokens = np.array(found.pop("tokens"))
                expected = np.array(workers[0].facts["tokens"])
                speed = batch * config.new_tokens / found["seconds"]
                agreement = float((tokens == expected).mean())
                rows.append({"side": side, "batch": batch, "tokens_per_second": speed, "agreement": agreement, **found})
                worker.close()
    _print(rows)
    harness.save(config.out, {"config": dataclasses.asdict(dataclasses.replace(config, out=None)), "rows": rows})
    return rows


def jaxlm(
    size: dict[str, int], batch: int, prompt: int, new_tokens: int, weights: str
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Our side, in its own process."""
    from jaxlm.decoding import DecoderStepper, GenerationConfig, generate
    from jaxlm.models import Decoder

    config = Size(**size).decoder(prompt + new_tokens)
    params = read_params(Path(weights), config)
    stepper, prompts = DecoderStepper(Decoder(config)), _prompts(size["vocab_size"], batch, prompt).tolist()
    settings = GenerationConfig(max_new_tokens=new_tokens, temperature=0.0)

    def once() -> np.ndarray:
        return generate(stepper, params, prompts, settings).tokens[:, 0]

    return {"tokens": once().tolist()}, once


def torch(
    size: dict[str, int], batch: int, prompt: int, new_tokens: int, weights: str
) -> tuple[dict[str, Any], Callable[[], None]]:
    """Transformers' side, in its own process."""
    import torch

    model = Size(**size).transformers(prompt + new_tokens).eval()
    load_into(model, Path(weights))
    ids = torch.from_numpy(_prompts(size["vocab_size"], batch, prompt)).long()

    def once() -> np.ndarray:
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        return found[:, prompt:].numpy()

    return {"tokens": once().tolist()}, once


def _prompts(vocab_size: int, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length), dtype=np.int32)


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Greedy generation (fastest call; ratio: tokens/s of ours to this side's)")
    for name in ("batch", "side", "tokens/s", "ms a call", "peak MB", "same tokens", "ratio"):
        table.add_column(name, justify="left" if name == "side" else "right")
    ours = {row["batch"]: row["tokens_per_second"] for row in rows if row["side"] == "jaxlm"}
    for row in rows:
        table.add_row(
            str(row["batch"]),
            row["side"],
            f"{row['tokens_per_second']:,.0f}",
            f"{1e3 * row['seconds']:.0f}",
            f"{row['peak_mb']:,.0f}",
            f"{row['agreement']:.1%}",
            f"{ours[row['batch']] / row['tokens_per_second']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    runner.tool(__name__)
