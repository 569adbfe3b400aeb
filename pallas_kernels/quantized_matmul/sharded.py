"""Quantized products on a mesh: each device multiplies its rows with its part of the matrix."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import mesh_axes
from pallas_kernels.mesh_axes import Axes
from pallas_kernels.quantized_matmul.layout import Packed

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a product lies on the ambient mesh, in mesh axes: what a kernel needs there, XLA cannot divide one.

    `rows`: one entry for each axis of `x` but the last; one that does not divide its axis is dropped. `blocked` and
    `free`: the matrix's axis along which blocks lie, and its other one. A matrix that is stored over other mesh axes
    too is gathered, packed.
    """

    rows: tuple[Axes, ...] = ()
    blocked: Axes = None
    free: Axes = None


def cannot(shards: Shards, w: Packed, int8_activations: bool) -> str | None:
    """Why the ambient mesh cannot be divided so (a phrase for an error), or `None`."""
    if reason := mesh_axes.why_not(shards, *shards.rows, shards.blocked, shards.free):
        return reason
    blocked, free = mesh_axes.parts(shards.blocked), mesh_axes.parts(shards.free)
    if w.shape[-3 - w.axis] % free:
        return f"{w.shape[-3 - w.axis]} columns in {free} parts"
    if w.blocks > 1 and w.blocks % blocked:
        return f"{w.blocks} blocks of {w.group} in {blocked} parts: blocks would straddle them"
    if w.blocks == 1 and blocked > 1 and w.bits < 8:
        return f"one block of {w.group} packed weights in {blocked} parts: it would straddle them"
    if w.codes.shape[w.axis] % blocked:
        return f"{w.codes.shape[w.axis]} rows of codes in {blocked} parts"
    if int8_activations and blocked > 1:
        return f"a scale for each row of x, which lies in {blocked} parts"
    return None


def local_shapes(w: Packed, shards: Shards) -> Packed:
    """Shapes of a device's part of the matrix."""
    blocked, free = mesh_axes.parts(shards.blocked), mesh_axes.parts(shards.free)

    def cut(array: Array) -> Any:
        shape = list(array.shape)
        shape[-3 - w.axis] //= free
        if shape[w.axis] > 1:
            shape[w.axis] //= blocked
        return jax.ShapeDtypeStruct(shape, array.dtype)

    return jax.tree.map(cut, w)


def multiply(run: Callable, x: Array, w: Packed, shards: Shards, transposed: bool) -> Array:
    """`run(x, w)` on each device's part; parts of a sum over a divided axis are added in float32."""
    rows = mesh_axes.dividing(shards.rows, x.shape[:-1])
    sums_blocks = (w.axis == -2) != transposed
    into, out = (shards.blocked, shards.free) if sums_blocks else (shards.free, shards.blocked)
    spec = (shards.blocked, shards.free) if w.axis == -2 else (shards.free, shards.blocked)
    whole = (None, shards.free) if w.axis == -2 else (shards.free, None)
    # One scale a column serves all parts; several are divided like the blocks they belong to.
    per_block = spec if w.blocks > 1 else whole
    specs = jax.tree.map(lambda a: PartitionSpec(*per_block), w)
    specs = dataclasses.replace(specs, codes=PartitionSpec(*spec))

    def part(x: Array, w: Packed) -> Array:
        if into is None:
            return run(x, w)
        return jax.lax.psum(run(x, w).astype(jnp.float32), into).astype(x.dtype)

    return jax.shard_map(
        part, in_specs=(PartitionSpec(*rows, into), specs), out_specs=PartitionSpec(*rows, out), check_vma=False
    )(x, w)
