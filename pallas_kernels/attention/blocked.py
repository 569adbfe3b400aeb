"""Attention in plain JAX, a block of queries at a time: for CPUs, and wherever no kernel fits.

Each block of queries (a static slice) sees the static slice of keys that its structure lets it reach; only its logits
are held. Products take a block with its group and tokens merged, `[b, k, g * tokens, ...]`: with an axis of its own for
the group XLA's CPU backend runs them a third slower.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.attention.problem import HIDDEN, MASKED, Operands, Structure
from pallas_kernels.attention.vjp import Passes

Block = tuple[int, int, int, int]  # first query, end; first key, end


def blocks(structure: Structure, queries: int, keys: int) -> list[Block]:
    """The blocks of queries with the keys they reach."""
    size = max(128, 128 * math.ceil(queries / 8 / 128))
    found = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        first, last = structure.visible(start, end, keys)
        found.append((start, end, first, max(first, last)))
    return found


def forward(structure: Structure, operands: Operands) -> tuple[jax.Array, jax.Array]:
    q, k, v = operands[:3]
    outs, norms = [], []
    for block in blocks(structure, q.shape[3], k.shape[2]):
        start, end, first, last = block
        if first == last:
            rows = (*q.shape[:2], q.shape[2] * (end - start))
            outs.append(jnp.zeros((*rows, q.shape[-1]), q.dtype))
            norms.append(jnp.full((*rows, 1), -jnp.inf, jnp.float32))
            continue
        logits, _ = _block_logits(structure, operands, block)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _product("bkts,bksd->bktd", weights.astype(v.dtype), v[:, :, first:last])
        out, norm = out / total, top + jnp.log(total)
        if structure.empty_rows:
            out, norm = jnp.where(top < HIDDEN, 0.0, out), jnp.where(top < HIDDEN, -jnp.inf, norm)
        outs.append(out.astype(q.dtype))
        norms.append(norm)
    return _join(outs, q.shape[2]), _join(norms, q.shape[2])[..., 0]


def backward(structure: Structure, operands: Operands, grad: jax.Array, lse: jax.Array, delta: jax.Array):
    q, k, v, bias = operands[:4]
    lse, delta = lse[..., None], delta[..., None]
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dbias = None if bias is None else jnp.zeros(bias.shape, jnp.float32)
    for block in blocks(structure, q.shape[3], k.shape[2]):
        start, end, first, last = block
        if first == last:
            dq.append(jnp.zeros((*q.shape[:2], q.shape[2] * (end - start), q.shape[-1]), jnp.float32))
            continue
        logits, slope = _block_logits(structure, operands, block)
        weights = jnp.exp(logits - _merge(lse, start, end))
        block_grad = _merge(grad, start, end)
        dweights = _product("bktd,bksd->bkts", block_grad, v[:, :, first:last])
        dlogits = weights * (dweights - _merge(delta, start, end))
        if dbias is not None:
            dbias = dbias.at[:, first:last].add(jnp.sum(dlogits, axis=(1, 2)))
        if slope is not None:
            dlogits = dlogits * slope
        if structure.scale != 1.0:
            dlogits = dlogits * structure.scale
        dlogits, weights = dlogits.astype(k.dtype), weights.astype(v.dtype)
        dq.append(_product("bkts,bksd->bktd", dlogits, k[:, :, first:last]))
        dk = dk.at[:, :, first:last].add(_product("bkts,bktd->bksd", dlogits, _merge(q, start, end)))
        dv = dv.at[:, :, first:last].add(_product("bkts,bktd->bksd", weights, block_grad))
    return _join(dq, q.shape[2]).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias


PASSES = Passes(forward, backward)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _merge(x: jax.Array, start: int, end: int) -> jax.Array:
    """Queries `start` to `end` of `[b, k, g, t, n]` as `[b, k, g * tokens, n]`."""
    part = x[:, :, :, start:end]
    return part.reshape(*x.shape[:2], -1, x.shape[-1])


def _join(parts: list[jax.Array], group: int) -> jax.Array:
    """The inverse of `_merge` for consecutive blocks."""
    return jnp.concatenate([x.reshape(*x.shape[:2], group, -1, x.shape[-1]) for x in parts], axis=3)


def _block_logits(structure: Structure, operands: Operands, block: Block) -> tuple[jax.Array, jax.Array | None]:
    """Masked float32 logits of one block `[b, k, g * tokens, keys]`, and the soft cap's derivative."""
    q, k, _, bias, q_segments, kv_segments = operands
    start, end, first, last = block
    logits = _product("bktd,bksd->bkts", _merge(q, start, end), k[:, :, first:last])
    if structure.scale != 1.0:
        logits = logits * structure.scale
    slope = None
    if structure.softcap is not None:
        capped = jnp.tanh(logits / structure.softcap)
        logits, slope = structure.softcap * capped, 1.0 - jnp.square(capped)
    if bias is not None:
        logits = logits + bias[:, None, None, first:last]
    queries, keys = jnp.arange(start, end)[None, :, None], jnp.arange(first, last)[None, None, :]
    allowed = structure.allowed(queries, keys)
    if q_segments is not None:
        same = q_segments[:, start:end, None] == kv_segments[:, None, first:last]
        allowed = same if allowed is None else allowed & same
    if allowed is None:
        return logits, slope
    return jnp.where(jnp.tile(allowed, (1, q.shape[2], 1))[:, None], logits, MASKED), slope
