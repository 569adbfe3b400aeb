"""Attention on a mesh: each device computes its rows of the batch and its heads."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.attention.api import flash_attention, flash_decode
from pallas_kernels.attention.errors import AttentionError

Axes = str | Sequence[str] | None


def flash_attention_sharded(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    batch_axes: Axes = None,
    head_axes: Axes = None,
    mesh: Mesh | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    bias: jax.Array | None = None,
    return_lse: bool = False,
    **options,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`flash_attention` under `jax.shard_map`: the batch cut over `batch_axes` of the mesh, heads over `head_axes`.

    `mesh` is by default the ambient one (`jax.set_mesh`). Lengths stay whole. Raises `AttentionError` when the axes do
    not divide the batch or the key/value heads.
    """
    _check(mesh, batch_axes, head_axes, q, k.shape[2])
    heads = PartitionSpec(batch_axes, None, head_axes, None)
    rows = PartitionSpec(batch_axes, None)

    def local(q, k, v, segment_ids, bias):
        return flash_attention(q, k, v, segment_ids=segment_ids, bias=bias, return_lse=return_lse, **options)

    lse = PartitionSpec(batch_axes, head_axes, None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, heads, heads, rows, rows),
        out_specs=(heads, lse) if return_lse else heads,
        check_vma=False,
    )(q, k, v, segment_ids, bias)


def flash_decode_sharded(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    batch_axes: Axes = None,
    head_axes: Axes = None,
    mesh: Mesh | None = None,
    starts: jax.Array | None = None,
    return_lse: bool = False,
    **options,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`flash_decode` under `jax.shard_map`, with `batch_axes`, `head_axes` and `mesh` as in `flash_attention_sharded`.

    The cache `[batch, kv_heads, capacity, head_dim]` lies with its rows and heads; its slots are whole.
    """
    _check(mesh, batch_axes, head_axes, q, k.shape[1])
    heads, cache = PartitionSpec(batch_axes, None, head_axes, None), PartitionSpec(batch_axes, head_axes, None, None)
    rows = PartitionSpec(batch_axes)

    def local(q, k, v, lengths, starts):
        return flash_decode(q, k, v, lengths, starts=starts, return_lse=return_lse, **options)

    lse = PartitionSpec(batch_axes, head_axes, None)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, cache, cache, rows, rows),
        out_specs=(heads, lse) if return_lse else heads,
        check_vma=False,
    )(q, k, v, lengths, starts)


def _check(mesh: Mesh | None, batch_axes: Axes, head_axes: Axes, q: jax.Array, kv_heads: int) -> None:
    known = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    for name, axes, size in (
        ("batch", batch_axes, q.shape[0]),
        ("heads of q", head_axes, q.shape[2]),
        ("heads of k", head_axes, kv_heads),
    ):
        parts = 1
        for axis_name in (axes,) if isinstance(axes, str) else axes or ():
            if axis_name not in known.shape:
                raise AttentionError(f"the mesh {dict(known.shape)} has no axis '{axis_name}'")
            parts *= known.shape[axis_name]
        if size % parts:
            raise AttentionError(f"{size} ({name}) is not divisible by {parts}, the size of mesh axes {axes}")
