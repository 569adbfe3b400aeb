"""What a model's weights take, by kind of weight, to the byte."""

import dataclasses
import math
from typing import Any

import jax

from jaxlm.core import trees
from jaxlm.weights import LowRank, Quantized, Weight, nbytes


@dataclasses.dataclass(frozen=True)
class Kind:
    """Weights of one kind: how many numbers they stand for, and the bytes that they take with all their scales."""

    parameters: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.bytes / max(self.parameters, 1)


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """`kinds`: from a name such as `float32` or `int4, blocks of 32` to its share; `str()` is a table."""

    kinds: dict[str, Kind]

    @property
    def bytes(self) -> int:
        return sum(kind.bytes for kind in self.kinds.values())

    @property
    def parameters(self) -> int:
        return sum(kind.parameters for kind in self.kinds.values())

    def __str__(self) -> str:
        rows = [*self.kinds.items(), ("total", Kind(self.parameters, self.bytes))]
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            f"{name:{width}}  {kind.parameters:>15,} weights  {kind.bytes:>15,} bytes  {kind.bits:6.3f} bits each"
            for name, kind in rows
        )


def memory_report(params: Any) -> MemoryReport:
    """The bytes of parameters (arrays, their shapes, or weights of any class) by kind of weight."""
    kinds: dict[str, Kind] = {}

    def add(name: str, parameters: int, size: int) -> None:
        had = kinds.get(name, Kind(0, 0))
        kinds[name] = Kind(had.parameters + parameters, had.bytes + size)

    def visit(leaf: Any) -> None:
        match leaf:
            case LowRank():
                visit(leaf.base)
                add("low-rank updates", 0, nbytes((leaf.a, leaf.b)))
            case Quantized():
                add(_format(leaf), math.prod(leaf.shape), nbytes(leaf))
            case Weight():
                add(type(leaf).__name__, math.prod(leaf.shape), nbytes(leaf))
            case _:
                add(str(leaf.dtype), math.prod(leaf.shape), trees.num_bytes(leaf))

    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Weight)):
        visit(leaf)
    return MemoryReport(dict(sorted(kinds.items())))


def _format(w: Quantized) -> str:
    blocks = w.scale.shape[w.axis]
    size = "one block" if blocks == 1 else f"blocks of {w.shape[w.axis] // blocks}"
    return f"int{w.bits}, {size}" + (", minimum" if w.minimum is not None else "")
