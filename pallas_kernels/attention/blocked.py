"""Attention in plain JAX, a block of queries at a time: for CPUs, and wherever no kernel fits.

Each block of queries (a static slice) sees the static slice of keys that its structure lets it reach; only its logits
are held. Long sequences have long blocks, so that there are few of them, and a loop over each block's parts: without a
loop XLA's CPU backend works on several blocks at once and holds the logits of all. Products take a part with its group
and tokens merged, `[b, k, g * tokens, ...]`: with an axis of its own for the group they run a third slower.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.problem import HIDDEN, MASKED, Operands, Structure
from pallas_kernels.attention.vjp import Passes

PART = 128
"""Queries whose logits are held at a time."""


class Block(NamedTuple):
    """Queries `start` to `end` (several whole parts, or one) and the keys `first` to `last` that they reach."""

    start: int
    end: int
    first: int
    last: int


def blocks(structure: Structure, queries: int, keys: int) -> list[Block]:
    """The blocks of queries with the keys they reach."""
    size = max(PART, PART * math.ceil(queries / 8 / PART))
    whole = queries // PART * PART
    edges = sorted({*range(0, whole, size), whole, queries})
    found = []
    for start, end in zip(edges, edges[1:]):
        first, last = structure.visible(start, end, keys)
        found.append(Block(start, end, first, max(first, last)))
    return found


def forward(structure: Structure, operands: Operands) -> tuple[jax.Array, jax.Array]:
    q = operands.q
    outs, norms = [], []
    for block in blocks(structure, q.shape[3], operands.k.shape[2]):
        if block.first == block.last:
            shape = *q.shape[:3], block.end - block.start
            outs.append(jnp.zeros((*shape, q.shape[-1]), q.dtype))
            norms.append(jnp.full((*shape, 1), -jnp.inf, jnp.float32))
            continue

        def part(none, rows, block=block):
            return none, _part_forward(structure, operands, block, *rows)

        _, (out, norm) = _over_parts(part, None, operands, block, ())
        outs.append(out)
        norms.append(norm)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(norms, axis=3)[..., 0]


def backward(structure: Structure, operands: Operands, grad: jax.Array, lse: jax.Array, delta: jax.Array):
    q, k, v, bias = operands[:4]
    rows = grad, lse[..., None], delta[..., None]
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dbias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    for block in blocks(structure, q.shape[3], k.shape[2]):
        start, end, first, last = block
        if first == last:
            dq.append(jnp.zeros((*q.shape[:3], end - start, q.shape[-1]), jnp.float32))
            continue

        def part(sums, rows, block=block):
            dq, *more = _part_backward(structure, operands, block, *rows)
            return more if sums is None else jax.tree.map(jnp.add, sums, more), (dq,)

        (dk_part, dv_part, dbias_part), (dq_part,) = _over_parts(part, None, operands, block, rows)
        dq.append(dq_part)
        dk = dk.at[:, :, first:last].add(dk_part)
        dv = dv.at[:, :, first:last].add(dv_part)
        if dbias is not None:
            dbias = dbias.at[:, first:last].add(dbias_part)
    return jnp.concatenate(dq, axis=3).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias


PASSES = Passes(forward, backward)


def _over_parts(part, sums, operands: Operands, block: Block, rows: tuple[jax.Array, ...]):
    """`part(sums, (start, segments, q, *rows))` for each part of a block; results joined along the queries (axis 3)."""
    rows = [x[:, :, :, block.start : block.end] for x in (operands.q, *rows)]
    segments = None if operands.q_segments is None else operands.q_segments[:, block.start : block.end]
    count = (block.end - block.start) // PART
    if count <= 1:
        return part(sums, (block.start, segments, *rows))

    def cut(x, axis):
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, PART, *x.shape[axis + 1 :]), axis, 0)

    starts = block.start + PART * jnp.arange(count)
    xs = starts, None if segments is None else cut(segments, 1), *(cut(x, 3) for x in rows)
    shapes = jax.eval_shape(lambda xs: part(None, jax.tree.map(lambda x: x[0], xs))[0], xs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    sums, found = jax.lax.scan(part, zeros, xs)
    return sums, [jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[-1]) for x in found]


def _part_forward(structure: Structure, operands: Operands, block: Block, start, segments, q):
    v = operands.v
    logits, _ = _logits(structure, operands, block, start, segments, q)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = _product("bkts,bksd->bktd", weights.astype(v.dtype), v[:, :, block.first : block.last])
    out, norm = out / total, top + jnp.log(total)
    if structure.empty_rows:
        out, norm = jnp.where(top < HIDDEN, 0.0, out), jnp.where(top < HIDDEN, -jnp.inf, norm)
    return _split(out.astype(q.dtype), q), _split(norm, q)


def _part_backward(structure: Structure, operands: Operands, block: Block, start, segments, q, grad, lse, delta):
    k, v, bias = operands[1:4]
    keys = slice(block.first, block.last)
    logits, slope = _logits(structure, operands, block, start, segments, q)
    weights = jnp.exp(logits - _merge(lse))
    dweights = _product("bktd,bksd->bkts", _merge(grad), v[:, :, keys])
    dlogits = weights * (dweights - _merge(delta))
    dbias = None if bias is None else jnp.sum(dlogits, axis=(1, 2))
    if slope is not None:
        dlogits = dlogits * slope
    if structure.scale != 1.0:
        dlogits = dlogits * structure.scale
    dlogits, weights = dlogits.astype(k.dtype), weights.astype(v.dtype)
    dq = _split(_product("bkts,bksd->bktd", dlogits, k[:, :, keys]), q)
    dk = _product("bkts,bktd->bksd", dlogits, _merge(q))
    return dq, dk, _product("bkts,bktd->bksd", weights, _merge(grad)), dbias


def _logits(structure: Structure, operands: Operands, block: Block, start, segments, q):
    """Masked float32 logits of one part `[b, k, g * tokens, keys]`, and the soft cap's derivative."""
    k, bias, kv_segments, keys = operands.k, operands.bias, operands.kv_segments, slice(block.first, block.last)
    logits = _product("bktd,bksd->bkts", _merge(q), k[:, :, keys])
    if structure.scale != 1.0:
        logits = logits * structure.scale
    slope = None
    if structure.softcap is not None:
        capped = jnp.tanh(logits / structure.softcap)
        logits, slope = structure.softcap * capped, 1.0 - jnp.square(capped)
    if bias is not None:
        logits = logits + bias[:, None, None, keys]
    numbers = jnp.arange(start, block.end) if isinstance(start, int) else start + jnp.arange(PART)
    allowed = structure.allowed(numbers[None, :, None], jnp.arange(block.first, block.last)[None, None, :])
    if segments is not None:
        same = segments[:, :, None] == kv_segments[:, None, keys]
        allowed = same if allowed is None else allowed & same
    if allowed is None:
        return logits, slope
    return jnp.where(jnp.tile(allowed, (1, q.shape[2], 1))[:, None], logits, MASKED), slope


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _merge(x: jax.Array) -> jax.Array:
    """`[b, k, g, tokens, n]` as `[b, k, g * tokens, n]`."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _split(x: jax.Array, q: jax.Array) -> jax.Array:
    """The inverse of `_merge`, with the group of `q`."""
    return x.reshape(*x.shape[:2], q.shape[2], -1, x.shape[-1])
