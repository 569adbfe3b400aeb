"""Cross-entropy on a mesh: each device computes its tokens over its part of the vocabulary."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import mesh_axes
from pallas_kernels.mesh_axes import Axes

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Shards:
    """How the arrays lie on the ambient mesh, in mesh axes: what kernels need there, XLA cannot divide one.

    `rows`: one entry for each axis of `targets`; one that does not divide its axis is dropped. `vocab`: the head's
    columns. A head that is stored over other mesh axes too is gathered.
    """

    rows: tuple[Axes, ...] = ()
    vocab: Axes = None


def cannot(shards: Shards, vocab: int) -> str | None:
    """Why the ambient mesh cannot be divided so (a phrase for an error), or `None`."""
    if reason := mesh_axes.why_not(shards, *shards.rows, shards.vocab):
        return reason
    if vocab % mesh_axes.parts(shards.vocab):
        return f"a vocabulary of {vocab} in {mesh_axes.parts(shards.vocab)} parts"
    return None


def local_shapes(x: Array, head: Array, shards: Shards, transposed: bool) -> tuple[Any, Any]:
    """Of a device's tokens `[tokens, embed]` and of its part of the head."""
    tokens = math.prod(x.shape[:-1]) // math.prod(mesh_axes.parts(part) for part in _rows(x, shards))
    shape = list(head.shape)
    shape[0 if transposed else 1] //= mesh_axes.parts(shards.vocab)
    return jax.ShapeDtypeStruct((tokens, x.shape[-1]), x.dtype), jax.ShapeDtypeStruct(tuple(shape), head.dtype)


def statistics(run: Callable, x: Array, head: Array, targets: Array, shards: Shards, transposed: bool) -> tuple:
    """`run(x, head, targets)`, which is `reference.statistics`, over the devices; all are `[rows]`."""
    rows, head_spec = _specs(x, shards, transposed)
    vocab = shards.vocab

    def part(x: Array, head: Array, targets: Array) -> tuple:
        lse, picked, top = run(x, head, targets - _first_column(head, vocab, transposed))
        if vocab is not None:
            # Each token's target is in one part; in the others its logit is 0.
            highest, top = jax.lax.pmax(jnp.stack([lse, top]), vocab)
            total, picked = jax.lax.psum(jnp.stack([jnp.exp(lse - highest), picked]), vocab)
            lse = highest + jnp.log(total)
        return lse, picked, top

    return jax.shard_map(
        part, in_specs=(PartitionSpec(*rows, None), head_spec, rows), out_specs=(rows, rows, rows), check_vma=False
    )(x, head, targets)


def gradients(
    run: Callable, x: Array, head: Array, targets: Array, numbers: tuple, shards: Shards, transposed: bool
) -> tuple[Array, Array]:
    """`run(x, head, targets, *numbers)`, the implementations' `gradients`, over the devices, added up in float32."""
    rows, head_spec = _specs(x, shards, transposed)
    row_axes = tuple(name for part in rows for name in mesh_axes.names(part))

    def total(x: Array, axes: Axes) -> Array:
        return jax.lax.psum(x.astype(jnp.float32), axes).astype(x.dtype) if axes else x

    def part(x: Array, head: Array, targets: Array, *numbers: Array) -> tuple[Array, Array]:
        dx, dhead = run(x, head, targets - _first_column(head, shards.vocab, transposed), *numbers)
        return total(dx, shards.vocab), total(dhead, row_axes)

    tokens = PartitionSpec(*rows, None)
    return jax.shard_map(
        part, in_specs=(tokens, head_spec, *[rows] * 4), out_specs=(tokens, head_spec), check_vma=False
    )(x, head, targets, *numbers)


def _specs(x: Array, shards: Shards, transposed: bool) -> tuple[PartitionSpec, PartitionSpec]:
    head = (shards.vocab, None) if transposed else (None, shards.vocab)
    return PartitionSpec(*_rows(x, shards)), PartitionSpec(*head)


def _rows(x: Array, shards: Shards) -> tuple[Axes, ...]:
    return mesh_axes.dividing(shards.rows, x.shape[:-1])


def _first_column(head: Array, vocab: Axes, transposed: bool) -> Array | int:
    return 0 if vocab is None else jax.lax.axis_index(vocab) * head.shape[0 if transposed else 1]

