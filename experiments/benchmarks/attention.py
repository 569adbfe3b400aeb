"""Speed and memory of attention's implementations, on whatever machine this runs.

    python -m experiments.benchmarks.attention [--lengths 4096 16384] [--rounds 5] [--out FILE]

Forward, forward with backward, and one-token decoding, at shapes of real models, beside `jax.nn.dot_product_attention`
(XLA, and cuDNN on GPUs) and `tokamax` if it is installed. All programs of a row are compiled first and then take turns;
the fastest call counts. TFLOP/s count the visible query-key pairs only: `4 * head_dim` operations a pair and head
forward (two products), `14 * head_dim` with backward (seven products); GB/s of decoding count the filled cache, read
once. Both are also given as ratios to what this machine reaches on a large matrix product and on a large copy. Memory
is the temporary memory of the compiled program. On CPUs the default is one row, the blocked implementation and the
reference at length 4096 (about a minute on two cores).
"""

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import runner
from experiments.benchmarks import harness
from experiments.checks import check_counts
from jaxlm.core.errors import ConfigError, nearest
from pallas_kernels.attention import AttentionError, flash_attention, flash_decode

# Heads, key/value heads, head_dim, window.
MODELS = {
    "llama-1b": (32, 8, 64, None),
    "llama-7b": (32, 32, 128, None),
    "llama-8b": (32, 8, 128, None),
    "gemma-2b, local": (8, 4, 256, 4096),
    "cpu": (4, 2, 64, None),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured. Empty lists mean what suits the platform."""

    models: tuple[str, ...] = ()
    """Shapes, by name: llama-1b, llama-7b, llama-8b, "gemma-2b, local", cpu."""
    lengths: tuple[int, ...] = ()
    """Tokens of a row; also the filled slots of the cache."""
    tokens: int = 16384
    """Tokens of a batch, except on CPUs (one row)."""
    decode_batch: int = 16
    """Rows of the decoding batch."""
    rounds: int = 5
    """How often the programs take turns."""
    out: Path | None = None
    """Where the figures go, as JSON."""

    def __post_init__(self):
        check_counts(self, "tokens", "decode_batch", "rounds")
        for name in self.models:
            if name not in MODELS:
                raise ConfigError(f"models has '{name}': {nearest(name, MODELS)}")
        if self.lengths and min(self.lengths) < 1:
            raise ConfigError(f"lengths are {self.lengths}, expected at least 1")


def run(config: Config) -> list[dict[str, Any]]:
    """Measures and prints; one row an implementation, shape, and kind of work."""
    platform = jax.default_backend()
    on_cpu = platform == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    ceilings = measured_ceilings(dtype, 1024 if on_cpu else 8192)
    rows = []
    for name in config.models or (("cpu",) if on_cpu else tuple(m for m in MODELS if m != "cpu")):
        for length in config.lengths or ((4096,) if on_cpu else (4096, 16384)):
            batch = 1 if on_cpu else max(1, config.tokens // length)
            for work in ("forward", "forward and backward", "decode"):
                if work == "decode":
                    made = decoding(name, length, config.decode_batch, dtype)
                else:
                    made = attention(name, length, batch, dtype, backward=work != "forward")
                facts = {"model": name, "length": length, "work": work}
                rows += _measured(*made, rounds=config.rounds, ceilings=ceilings, facts=facts)
    _print(rows)
    device = {"platform": platform, "device": jax.devices()[0].device_kind, **ceilings}
    settings = dataclasses.asdict(dataclasses.replace(config, out=None))
    harness.save(config.out, {"config": settings, "device": device, "rows": rows})
    return rows


def measured_ceilings(dtype, size: int) -> dict[str, float]:
    """TFLOP/s of a square matrix product and GB/s of a copy (read and written) on this machine."""
    x = jnp.ones((size, size), dtype)
    product = min(_seconds(jax.jit(lambda x: x @ x), (x,), 5))
    big = jnp.ones((64 * size * 1024,), jnp.float32)
    copy = min(_seconds(jax.jit(lambda x: x + 1), (big,), 5))
    return {"matmul_tflops": 2 * size**3 / product / 1e12, "copy_gbs": 2 * big.nbytes / copy / 1e9}


def attention(model: str, length: int, batch: int, dtype, backward: bool):
    """The programs, their arguments, and the operations and bytes of one call."""
    heads, kv_heads, dim, window = MODELS[model]
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (batch, length, heads, dim), *((batch, length, kv_heads, dim),) * 2
    args = tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    local = None if window is None else (window - 1, 0)

    def ours(implementation):
        return lambda q, k, v: flash_attention(q, k, v, window=window, implementation=implementation)

    def jax_nn(implementation):
        return lambda q, k, v: jax.nn.dot_product_attention(
            q, k, v, is_causal=True, local_window_size=local, implementation=implementation
        )

    programs = {name: ours(name) for name in ("tpu", "gpu", "blocked", "reference")}
    programs |= {"jax.nn xla": jax_nn("xla")}
    if jax.default_backend() == "gpu":
        programs["jax.nn cudnn"] = jax_nn("cudnn")
    if importlib.util.find_spec("tokamax") is not None:
        programs["tokamax"] = _tokamax(local)
    if backward:
        programs = {name: jax.grad(_summed(f), (0, 1, 2)) for name, f in programs.items()}
    reach = min(window or length, length)
    pairs = reach * (reach + 1) // 2 + (length - reach) * reach
    flops = (14 if backward else 4) * dim * pairs * heads * batch
    return programs, args, flops, None


def decoding(model: str, length: int, batch: int, dtype):
    """One token a row against a full cache."""
    heads, kv_heads, dim, window = MODELS[model]
    q = jax.random.normal(jax.random.key(0), (batch, 1, heads, dim), dtype)
    k, v = (jax.random.normal(jax.random.key(i), (batch, kv_heads, length, dim), dtype) for i in (1, 2))
    lengths = jnp.full((batch,), length, jnp.int32)

    def ours(implementation):
        return lambda q, k, v, n: flash_decode(q, k, v, n, window=window, implementation=implementation)

    read = 2 * batch * kv_heads * min(window or length, length) * dim * k.dtype.itemsize
    return {name: ours(name) for name in ("tpu", "reference")}, (q, k, v, lengths), None, read


def _tokamax(local) -> Callable:
    import tokamax

    return lambda q, k, v: tokamax.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)


def _summed(f: Callable) -> Callable:
    return lambda *args: jnp.sum(f(*args).astype(jnp.float32))


def _measured(programs, args, flops, read, *, rounds: int, ceilings, facts) -> list[dict[str, Any]]:
    compiled, refused = {}, []
    for name, f in programs.items():
        try:
            compiled[name] = jax.jit(f).lower(*args).compile()
        except AttentionError:  # made for another platform or shape
            continue
        except Exception as error:  # a library that refuses the shape, a program that does not fit
            refused.append({**facts, "implementation": name, "error": f"{type(error).__name__}: {error}"[:300]})
    seconds = {name: [] for name in compiled}
    for turn in range(rounds + 1):
        for name, program in compiled.items():
            spent = _seconds(program, args, 1)
            seconds[name] += spent if turn else []
    rows = []
    for name, program in compiled.items():
        best = min(seconds[name])
        row = {**facts, "implementation": name, "seconds": best, "median_seconds": statistics.median(seconds[name])}
        row["temporary_mb"] = program.memory_analysis().temp_size_in_bytes / 1e6
        if flops is not None:
            row["tflops"] = flops / best / 1e12
            row["of_matmul"] = row["tflops"] / ceilings["matmul_tflops"]
        if read is not None:
            row["gbs"] = read / best / 1e9
            row["of_copy"] = row["gbs"] / ceilings["copy_gbs"]
        rows.append(row)
    return rows + refused


def _seconds(f: Callable, args: tuple, calls: int) -> list[float]:
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        found.append(time.perf_counter() - start)
    return found


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Attention (fastest call)")
    names = ("model", "length", "work", "implementation")
    for name in (*names, "ms", "TFLOP/s", "of matmul", "GB/s", "of copy", "temporary MB"):
        table.add_column(name, justify="left" if name in names else "right")
    for row in rows:
        facts = [str(row[name]) for name in names]
        if "error" in row:
            table.add_row(*facts, row["error"].split("\n")[0][:60])
            continue
        numbers = {"tflops": ".2f", "of_matmul": ".2f", "gbs": ".1f", "of_copy": ".2f", "temporary_mb": ",.0f"}
        shown = [format(row[name], form) if name in row else "" for name, form in numbers.items()]
        table.add_row(*facts, f"{1e3 * row['seconds']:.2f}", *shown)
    Console().print(table)


if __name__ == "__main__":
    runner.tool(__name__)
