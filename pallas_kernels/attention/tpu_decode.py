"""A few queries against a cache on TPUs: each head's filled slots are read once, a block at a time.

The grid is (batch, key/value heads, blocks of slots). Blocks before a row's first slot that is seen and behind its last
are neither fetched (the index map stays where it is) nor computed. The queries of a group are the rows of one product.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.problem import HIDDEN, MASKED, Structure
from pallas_kernels.attention.tiles import LANES, TPU_DECODE_SLOTS, round_up


def attention(
    structure: Structure,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    starts: jax.Array,
    block: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`q` `[b, k, g, t, d]`, the cache `[b, k, slots, d]`, `lengths` and `starts` `[b]`: results and log-sum-exps."""
    batch, kv_heads, group, queries, head_dim = q.shape
    capacity = k.shape[2]
    block = min(block or TPU_DECODE_SLOTS[max(q.dtype.itemsize, k.dtype.itemsize)], round_up(capacity, LANES))
    rows = group * queries
    padded = round_up(rows, 32 // q.dtype.itemsize)  # whole registers
    q = jnp.pad(q.reshape(batch, kv_heads, rows, head_dim), ((0, 0), (0, 0), (0, padded - rows), (0, 0)))
    # The first slot that a row's first query sees, and the end of those that its last sees.
    first = starts
    if structure.window is not None:
        first = jnp.maximum(starts, lengths + structure.q_offset - structure.window + 1)
    end = jnp.clip(lengths + structure.q_offset + queries, 0, lengths)
    # One block at least, so that there is always one to fetch.
    low = jnp.clip(first // block, 0, (capacity - 1) // block)
    high = jnp.maximum(-(-end // block), low + 1)

    def cache_at(b, h, j, low, high, *_):
        return b, h, jnp.minimum(low[b] + j, high[b] - 1), 0

    def row_at(b, h, j, *_):
        return b, h, 0, 0

    out, lse = pl.pallas_call(
        functools.partial(_kernel, structure, queries, block, capacity),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, kv_heads, -(-capacity // block)),
            in_specs=[
                pl.BlockSpec((1, 1, padded, head_dim), row_at),
                pl.BlockSpec((1, 1, block, head_dim), cache_at),
                pl.BlockSpec((1, 1, block, head_dim), cache_at),
            ],
            out_specs=[
                pl.BlockSpec((1, 1, padded, head_dim), row_at),
                pl.BlockSpec((1, 1, padded, LANES), row_at),
            ],
            scratch_shapes=[
                pltpu.VMEM((padded, LANES), jnp.float32),
                pltpu.VMEM((padded, LANES), jnp.float32),
                pltpu.VMEM((padded, head_dim), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, padded, LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="decode_kernel",
    )(low, high, lengths, starts, q, k, v)
    out = out[:, :, :rows].reshape(batch, kv_heads, group, queries, head_dim)
    return out, lse[:, :, :rows, 0].reshape(batch, kv_heads, group, queries)


def _kernel(structure, queries, block, capacity, low, high, lengths, starts, q_ref, k_ref, v_ref, *rest):
    out_ref, lse_ref, top_ref, total_ref, sum_ref = rest
    row, step = pl.program_id(0), pl.program_id(2)

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, MASKED, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    @pl.when(low[row] + step < high[row])
    def _():
        q = q_ref[0, 0]
        k, v = k_ref[0, 0].astype(q.dtype), v_ref[0, 0].astype(q.dtype)
        start = (low[row] + step) * block
        if capacity % block:  # what lies beyond the cache is undefined, and 0 * NaN is NaN
            beyond = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) + start >= capacity
            v = jnp.where(beyond, jnp.zeros_like(v), v)
        logits = _dot(q, k, 1) * structure.scale
        if structure.softcap is not None:
            logits = structure.softcap * jnp.tanh(logits / structure.softcap)
        slots = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + start
        places = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0), jnp.int32(queries)) + lengths[row]
        allowed = structure.allowed(places, slots) & (slots < lengths[row]) & (slots >= starts[row])
        logits = jnp.where(allowed, logits, MASKED)
        before = top_ref[...]
        top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weights, decay = jnp.exp(logits - top[:, :1]), jnp.exp(before - top)
        total_ref[...] = decay * total_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        sum_ref[...] = decay[:, :1] * sum_ref[...] + _dot(weights.astype(v.dtype), v, 0)
        top_ref[...] = top

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        top, total = top_ref[...], total_ref[...]
        empty = top < HIDDEN
        total = jnp.where(empty, 1.0, total)
        out_ref[0, 0] = jnp.where(empty[:, :1], 0.0, sum_ref[...] / total[:, :1]).astype(out_ref.dtype)
        lse_ref[0, 0] = jnp.where(empty, -jnp.inf, top + jnp.log(total))


def _dot(a, b, axis: int):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
