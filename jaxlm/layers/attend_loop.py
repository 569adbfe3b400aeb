"""Causal attention as two nested loops over blocks of queries and keys, for accelerators.

The softmax is carried along the keys (Milakov and Gimelshein 2018, arXiv 1805.02867) and the backward pass computes the
probabilities again from the log-sum-exp (Dao et al. 2022, arXiv 2205.14135). One block of logits exists at a time,
whatever the length: a compiler that sees the blocks side by side, as in an unrolled program, overlaps them and holds
them all. Key blocks that no query of a block can see are not visited.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

BLOCK = 512
"""Queries and keys of a block: a multiple of every accelerator's matrix unit."""

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The logit of what is not seen: finite, so that differences of two of them are not NaN."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def causal_attention(
    q: Float[Array, "batch kv_heads group length head_dim"],
    k: Float[Array, "batch kv_heads length head_dim"],
    v: Float[Array, "batch kv_heads length head_dim"],
    segments: Int[Array, "batch length"] | None,
    window: int | None = None,
    softcap: float | None = None,
    block: int = BLOCK,
) -> Float[Array, "batch kv_heads group length head_dim"]:
    """`softmax(softcap(q k^T)) v` where a query sees itself and earlier keys of its segment, `window` of them at most.

    `q` is scaled already. Products are those of `q`'s format with float32 sums, the softmax is float32.
    """
    return _forward(q, k, v, segments, window, softcap, block)[0]


def _forward(q, k, v, segments, window, softcap, block):
    batch, kv_heads, group, length, head_dim = q.shape
    block = min(block, length)
    q, k, v, segments, count = _padded(q, k, v, segments, block)

    def rows(i: Array, results: tuple) -> tuple:
        part = _rows(q, i, block)

        def columns(j: Array, carry: tuple) -> tuple:
            top, total, out = carry
            logits, _ = _logits(part, _columns(k, j, block), segments, i, j, block, window, softcap)
            higher = jnp.maximum(top, jnp.max(logits, axis=-1))
            weights, fade = jnp.exp(logits - higher[..., None]), jnp.exp(top - higher)
            more = _product("bkgts,bksd->bkgtd", weights.astype(v.dtype), _columns(v, j, block))
            return higher, total * fade + jnp.sum(weights, axis=-1), out * fade[..., None] + more

        shape = (batch, kv_heads, group, block)
        start = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
        top, total, out = jax.lax.fori_loop(_first(i, block, window), i + 1, columns, start)
        outs, norms = results
        out = (out / total[..., None]).astype(q.dtype)
        return _put(outs, out, i, block, 3), _put(norms, top + jnp.log(total), i, block, 3)

    start = (jnp.zeros_like(q), jnp.zeros(q.shape[:-1]))
    out, norm = jax.lax.fori_loop(0, count, rows, start)
    return out[:, :, :, :length], norm[:, :, :, :length]


def _causal_forward(q, k, v, segments, window, softcap, block):
    out, norm = _forward(q, k, v, segments, window, softcap, block)
    out = checkpoint_name(out, "attention_result")
    norm = checkpoint_name(norm, "attention_norm")
    return out, (q, k, v, segments, out, norm)


def _causal_backward(window, softcap, block, residuals, grad):
    q, k, v, segments, out, norm = residuals
    length = q.shape[3]
    block = min(block, length)
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    grad = grad.astype(v.dtype)
    tail = -length % block
    grad, norm, delta = (_pad(x, tail, 3) for x in (grad, norm, delta))
    q, k, v, segments, count = _padded(q, k, v, segments, block)

    def columns(j: Array, grads: tuple) -> tuple:
        keys, values = _columns(k, j, block), _columns(v, j, block)

        def rows(i: Array, carry: tuple) -> tuple:
            dq, dk, dv = carry
            part, part_grad, part_norm, part_delta = (_rows(x, i, block) for x in (q, grad, norm, delta))
            logits, slope = _logits(part, keys, segments, i, j, block, window, softcap)
            weights = jnp.exp(logits - part_norm[..., None])
            dweights = _product("bkgtd,bksd->bkgts", part_grad, values)
            dlogits = weights * (dweights - part_delta[..., None])
            if slope is not None:
                dlogits = dlogits * slope
            dlogits, weights = dlogits.astype(k.dtype), weights.astype(v.dtype)
            more = _product("bkgts,bksd->bkgtd", dlogits, keys)
            dk = dk + _product("bkgts,bkgtd->bksd", dlogits, part)
            dv = dv + _product("bkgts,bkgtd->bksd", weights, part_grad)
            return _put(dq, _rows(dq, i, block) + more, i, block, 3), dk, dv

        dq, dks, dvs = grads
        zero = jnp.zeros(keys.shape, jnp.float32)
        dq, dk, dv = jax.lax.fori_loop(j, _last(j, block, window, count), rows, (dq, zero, zero))
        return dq, _put(dks, dk.astype(k.dtype), j, block, 2), _put(dvs, dv.astype(v.dtype), j, block, 2)

    start = (jnp.zeros(q.shape, jnp.float32), jnp.zeros_like(k), jnp.zeros_like(v))
    dq, dk, dv = jax.lax.fori_loop(0, count, columns, start)
    return dq[:, :, :, :length].astype(q.dtype), dk[:, :, :length], dv[:, :, :length], None


causal_attention.defvjp(_causal_forward, _causal_backward)


def _logits(part, keys, segments, i, j, block, window, softcap):
    """Masked float32 logits of query block `i` against key block `j`, and the soft cap's derivative."""
    logits, slope = _product("bkgtd,bksd->bkgts", part, keys), None
    if softcap is not None:
        capped = jnp.tanh(logits / softcap)
        logits, slope = softcap * capped, 1.0 - jnp.square(capped)
    steps = jnp.arange(block)
    back = (i - j) * block + steps[:, None] - steps[None, :]
    allowed = back >= 0
    if window is not None:
        allowed = allowed & (back < window)
    allowed = allowed[None]
    if segments is not None:
        ours, theirs = (jax.lax.dynamic_slice_in_dim(segments, n * block, block, 1) for n in (i, j))
        allowed = allowed & (ours[:, :, None] == theirs[:, None, :])
    return jnp.where(allowed[:, None, None], logits, MASKED), slope


def _first(i: Array, block: int, window: int | None) -> Array:
    """The first key block that query block `i` reaches back to."""
    return jnp.zeros_like(i) if window is None else jnp.maximum(0, i * block - window + 1) // block


def _last(j: Array, block: int, window: int | None, count: int) -> Array | int:
    """One beyond the last query block that sees key block `j`."""
    return count if window is None else jnp.minimum(count, j + (window + block - 2) // block + 1)


def _padded(q, k, v, segments, block: int):
    """Whole blocks, and their number. Keys that are added come after every query and are never seen."""
    tail = -q.shape[3] % block
    q, k, v = _pad(q, tail, 3), _pad(k, tail, 2), _pad(v, tail, 2)
    return q, k, v, None if segments is None else _pad(segments, tail, 1), q.shape[3] // block


def _pad(x: Array, tail: int, axis: int) -> Array:
    return jnp.pad(x, [(0, tail if i == axis else 0) for i in range(x.ndim)]) if tail else x


def _rows(x: Array, i: Array, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, 3)


def _columns(x: Array, j: Array, block: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, j * block, block, 2)


def _put(x: Array, part: Array, i: Array, block: int, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, i * block, axis)


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
