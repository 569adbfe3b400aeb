"""Attention on a mesh: each device computes its rows of the batch and its heads, in a ring its part of the length too.

In a ring (Liu et al. 2023, arXiv 2310.01889) each device keeps its queries while keys and values go round; partial
results are joined by their log-sum-exps. A block of keys that lies `n` blocks back is at a static offset from the
queries, so every implementation serves; blocks that no query of a device sees are not computed, and those that no
device sees (beyond the window) not even sent. With a causal mask the devices at the beginning of the length have less
to compute than those at its end and wait for them.

Keys and values travel as one array, so that each transfer waits for the one before it: XLA's CPU runtime mixes up the
collectives of a `shard_map` that do not depend on each other (jaxlib 0.10.2; all of them have channel 1).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import mesh_axes
from pallas_kernels.attention.api import combine, flash_attention, flash_decode
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
    _check_axes(mesh, ("batch", batch_axes, q, 0), ("heads of q", head_axes, q, 2), ("heads of k", head_axes, k, 2))
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
    _check_axes(mesh, ("batch", batch_axes, q, 0), ("heads of q", head_axes, q, 2), ("heads of k", head_axes, k, 1))
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


def flash_attention_ring(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    sequence_axis: str,
    batch_axes: Axes = None,
    head_axes: Axes = None,
    mesh: Mesh | None = None,
    causal: bool = True,
    window: int | None = None,
    segment_ids: jax.Array | None = None,
    bias: jax.Array | None = None,
    **options,
) -> jax.Array:
    """`flash_attention` of queries to their own keys, the length too cut over a mesh axis; exact up to rounding.

    Nothing of the forward pass is kept for the backward pass but the arguments: it goes round once more. Other
    arguments and errors are those of `flash_attention_sharded`.
    """
    if q.shape[1] != k.shape[1]:
        raise AttentionError(f"{q.shape[1]} queries and {k.shape[1]} keys, expected as many: a ring is self-attention")
    parts = _check_axes(
        mesh,
        ("batch", batch_axes, q, 0),
        ("heads of q", head_axes, q, 2),
        ("heads of k", head_axes, k, 2),
        ("length", sequence_axis, q, 1),
    )
    heads = PartitionSpec(batch_axes, sequence_axis, head_axes, None)
    rows, whole_rows = PartitionSpec(batch_axes, sequence_axis), PartitionSpec(batch_axes)

    @jax.checkpoint
    def local(q, held, segment_ids, kv_segments, bias):
        length, own = q.shape[1], jax.lax.axis_index(sequence_axis)
        send = functools.partial(
            jax.lax.ppermute, axis_name=sequence_axis, perm=[(i, (i + 1) % parts) for i in range(parts)]
        )

        def attend(back, blocks_back, held):
            k, v = jnp.split(held, [q.shape[-1]], axis=-1)

            def block(whole):
                return jax.lax.dynamic_slice_in_dim(whole, (own - back) % parts * length, length, axis=1)

            return flash_attention(
                q,
                k,
                v,
                causal=causal,
                window=window,
                q_offset=blocks_back * length,
                segment_ids=None if segment_ids is None else (segment_ids, block(kv_segments)),
                bias=None if bias is None else block(bias),
                return_lse=True,
                **options,
            )

        def nothing(held):
            shape = q.shape[0], q.shape[2], length
            return jnp.zeros_like(q), jnp.full(shape, -jnp.inf, jnp.promote_types(q.dtype, jnp.float32))

        found = [attend(0, 0, held)]
        for back in range(1, _steps(parts, length, causal, window)):
            held = send(held)
            # Past the row's beginning the ring goes on with its end: keys that come after the queries.
            later = nothing if causal else functools.partial(attend, back, back - parts)
            found.append(jax.lax.cond(own >= back, functools.partial(attend, back, back), later, held))
        return combine(*map(list, zip(*found)))[0]

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, heads, rows, whole_rows, whole_rows),
        out_specs=heads,
        check_vma=False,
    )(q, jnp.concatenate([k, v], axis=-1), segment_ids, segment_ids, bias)


def _steps(parts: int, length: int, causal: bool, window: int | None) -> int:
    """How many blocks of keys, its own and those before, any device sees."""
    if not causal or window is None:
        return parts
    # The first query of a block and the last key `n` blocks back lie (n - 1) * length + 1 apart.
    return min(parts, 1 if window == 1 else 2 + (window - 2) // length)


def _check_axes(mesh: Mesh | None, *cuts: tuple[str, Axes, jax.Array, int]) -> int:
    """Raises `AttentionError` unless the axes exist and divide what is cut; returns the parts of the last."""
    known = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    for name, axes, x, axis in cuts:
        for axis_name in mesh_axes.names(axes):
            if axis_name not in known.shape:
                raise AttentionError(f"the mesh {dict(known.shape)} has no axis '{axis_name}'")
        parts = mesh_axes.parts(axes, known)
        if x.shape[axis] % parts:
            raise AttentionError(f"{x.shape[axis]} ({name}) is not divisible by {parts}, the size of mesh axes {axes}")
    return parts
