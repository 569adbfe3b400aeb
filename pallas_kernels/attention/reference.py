"""The specification: attention in plain JAX with all logits, differentiated by JAX. Also in float64."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.problem import HIDDEN, MASKED, Operands, Structure


def attention(structure: Structure, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Results `[b, k, g, t, d]` in the queries' dtype and log-sum-exps `[b, k, g, t]` (float32, or float64)."""
    q, k, v, bias, q_segments, kv_segments = operands
    queries, keys = jnp.arange(q.shape[3])[None, :, None], jnp.arange(k.shape[2])[None, None, :]
    allowed = structure.allowed(queries, keys)
    if q_segments is not None:
        same = q_segments[:, :, None] == kv_segments[:, None, :]
        allowed = same if allowed is None else allowed & same
    return softmax_attention(q, k, v, allowed, bias, structure.scale, structure.softcap)


def softmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    allowed: jax.Array | None,
    bias: jax.Array | None,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The same with a dense mask `[b or 1, t, s]`."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=wide) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias[:, None, None, None, :].astype(wide)
    if allowed is not None:
        logits = jnp.where(allowed[:, None, None], logits, MASKED)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.where(logits > HIDDEN, jnp.exp(logits - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    safe = jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum("bkgts,bksd->bkgtd", (weights / safe).astype(v.dtype), v, preferred_element_type=wide)
    lse = jnp.where(total == 0.0, -jnp.inf, top + jnp.log(safe))
    return out.astype(q.dtype), lse[..., 0]
