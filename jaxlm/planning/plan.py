"""Compiles a program for machines that are not here, and says what it would take of a chip: memory, work, time."""

import contextlib
import dataclasses
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxlm.core import trees
from jaxlm.planning import hlo
from jaxlm.planning.topology import Chip, Topology


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip. The first group is arithmetic over the shapes, the second the compiler's.

    `temporaries` is what the compiler reports beside arguments and outputs: stored activations, gradients, gathered
    weights, buffers. `peak` is its figure of the most that lives at one time, which decides whether a TPU program
    loads; it is below `total`, since buffers of `temporaries` share places.
    """

    kinds: Mapping[str, float]
    """Of the arguments: parameters, optimizer state, batch, ..."""
    arguments: float
    outputs: float
    temporaries: float
    aliased: float
    peak: float | None

    @property
    def total(self) -> float:
        return self.arguments + self.outputs + self.temporaries - self.aliased


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step if nothing else took time, and what the compiler's own cycle counts add up to."""

    compute: float
    memory: float
    network: float
    compiler: float | None

    @property
    def roofline(self) -> float:
        """Compute, memory and network all overlapped: no step is faster."""
        return max(self.compute, self.memory, self.network)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A program on a topology. `memory`, `costs` and `times` are `None` when the compiler refused it, the last
    two also where the installed libtpu is too new for jax to read its programs."""

    topology: str
    chip: Chip
    chips: int
    kinds: Mapping[str, float]
    compile_seconds: float
    model_flops: float
    """Of one step and chip, as the model's mathematics needs them."""
    executed_flops: float
    """With what is computed again in the backward pass."""
    memory: Memory | None = None
    costs: hlo.Costs | None = None
    times: Times | None = None
    refusal: str | None = None
    """What the compiler said."""
    needed: float | None = None
    """Bytes a chip, by the compiler's message."""
    limit: float | None = None
    """Bytes that the compiler has on a chip; by default the chip's memory."""

    @property
    def fits(self) -> bool:
        """The compiler accepted it, and its peak is within the chip's memory (a GPU's compiler refuses nothing)."""
        return self.memory is not None and (self.memory.peak or self.memory.total) <= self.chip.memory

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilization of a step that takes so long."""
        return self.model_flops / (seconds * self.chip.flops)


def make_plan(
    lowered: Any, topology: Topology, arguments: Mapping[str, Any], *, model_flops: float, executed_flops: float
) -> Plan:
    """Compiles `lowered` (from `jax.jit(...).lower` on the topology's devices) and reads what came out.

    `arguments` names the trees of `ShapeDtypeStruct`s (with shardings) that were lowered; FLOPs are those of one step
    on all chips.
    """
    chips = len(topology.devices)
    known = {
        "topology": topology.name,
        "chip": topology.chip,
        "chips": chips,
        "kinds": {name: shard_bytes(tree) for name, tree in arguments.items()},
        "model_flops": model_flops / chips,
        "executed_flops": executed_flops / chips,
    }
    start = time.monotonic()
    try:
        with _without_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed, limit = parse_refusal(str(error))
        seconds = time.monotonic() - start
        return Plan(**known, compile_seconds=seconds, refusal=str(error), needed=needed, limit=limit)
    seconds = time.monotonic() - start
    sizes = compiled.memory_analysis()
    memory = Memory(
        known["kinds"],
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.alias_size_in_bytes,
        getattr(sizes, "peak_memory_in_bytes", 0) or None,
    )
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        # A newer libtpu has instructions that this jaxlib cannot read: what they cost stays unknown.
        said = str(error).splitlines()[0]
        warnings.warn(f"jax cannot read this libtpu's program (jax[tpu] has the one that fits): {said}", stacklevel=2)
        return Plan(**known, compile_seconds=seconds, memory=memory)
    costs = hlo.analyze(text)
    times = estimate(topology.chip, executed_flops / chips, costs)
    return Plan(**known, compile_seconds=seconds, memory=memory, costs=costs, times=times)


def estimate(chip: Chip, flops: float, costs: hlo.Costs) -> Times:
    """The least times that a step of one chip takes for its products, its memory traffic and its collectives."""
    return Times(
        compute=flops / chip.flops,
        memory=costs.bytes_moved / chip.bandwidth,
        network=sum(c.sent for c in costs.collectives) / chip.interconnect,
        compiler=costs.cycles / chip.clock if costs.cycles and chip.clock else None,
    )


def shard_bytes(tree: Any) -> float:
    """Bytes of one device's part of the arrays of a tree of `ShapeDtypeStruct`s with shardings."""

    def part(x: Any) -> jax.ShapeDtypeStruct:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return float(trees.num_bytes(jax.tree.map(part, tree)))


def parse_refusal(message: str) -> tuple[float | None, float | None]:
    """Bytes needed and bytes there are, from the message of a compiler that ran out of memory."""
    size = r"([\d.]+)([KMGT]?)"
    for pattern in (rf"Used {size} of {size}", rf"\({size}\) exceeds [^(]*\({size}\)"):
        if match := re.search(pattern, message):
            needed, needed_unit, limit, limit_unit = match.groups()
            return float(needed) * _unit(needed_unit), float(limit) * _unit(limit_unit)
    return None, None


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Programs for absent devices go into JAX's persistent cache but cannot be read from it again."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _unit(letter: str) -> int:
    return 1024 ** "_KMGT".index(letter) if letter else 1
