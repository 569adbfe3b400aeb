"""Softmax attention over one or several sources of keys and values.

`attend` chooses between two implementations with the same results. `reference` forms all logits and supports
everything. `blocked` (one source, causal) never holds more than a block of queries' logits, skips the keys that a
block cannot see, and recomputes the probabilities in its backward pass (as Dao et al. 2022, arXiv 2205.14135).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError, nearest
from jaxlm.layers import attend_loop

# Finite, so that a row without any visible key stays free of NaN; such rows are set to zero explicitly.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

IMPLEMENTATIONS = ("auto", "reference", "blocked")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which of a call's own tokens see which: said once for a model, before segments and windows.

    `prefix_lengths`: the first so many tokens of a row are seen by every query of it (prefix language models).
    `allowed`: a dense mask in addition. With `causal=False` every query sees every token.
    """

    causal: bool = dataclasses.field(default=True, metadata={"static": True})
    prefix_lengths: Int[Array, "batch"] | None = None
    allowed: Bool[Array, "batch length length"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
    """What a layer's own tokens see: a `Mask`, within segments (equal ids), at most `window` tokens back.

    A window counts the query itself.
    """

    mask: Mask = Mask()
    segment_ids: Int[Array, "batch length"] | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def dense(self, length: int) -> Bool[Array, "batch length length"] | None:
        """The mask as an array (its batch axis may be 1), or `None` if everything is visible."""
        order = jnp.arange(length)
        queries, keys = order[None, :, None], order[None, None, :]
        parts = []
        if self.mask.causal:
            causal = keys <= queries
            if self.mask.prefix_lengths is not None:
                causal = causal | (keys < self.mask.prefix_lengths[:, None, None])
            parts.append(causal)
        if self.window is not None:
            parts.append(keys > queries - self.window)
        if self.segment_ids is not None:
            parts.append(self.segment_ids[:, :, None] == self.segment_ids[:, None, :])
        if self.mask.allowed is not None:
            parts.append(self.mask.allowed)
        return functools.reduce(jnp.logical_and, parts) if parts else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """One source: keys and values, which of them each query sees, and a bias on their logits.

    `k`, `v`: `[batch, keys, kv_heads, head_dim]`, or `[batch, queries, keys, kv_heads, head_dim]` if private to each
    query, or with `heads_first` `[batch, kv_heads, keys, head_dim]`, as in a cache. `allowed`: a `Visible` (own),
    a mask broadcastable to `[batch, queries, keys]`, or `None` (all).
    """

    k: Array
    v: Array
    allowed: Visible | Array | None = None
    bias: Float[Array, "batch keys"] | None = None
    heads_first: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def axes(self) -> str:
        """The axes of `k` and `v` for `einsum`: batch, t (queries), s (keys), k (heads), d."""
        return "bksd" if self.heads_first else "btskd" if self.k.ndim == 5 else "bskd"

    @property
    def num_keys(self) -> int:
        return self.k.shape[self.axes.index("s")]


def attend(
    q: Float[Array, "batch queries heads head_dim"],
    sources: tuple[KeyValues, ...],
    *,
    scale: float | Array,
    softcap: float | None = None,
    dtype=None,
    implementation: str = "auto",
) -> Float[Array, "batch queries heads head_dim"]:
    """`softmax(softcap(scale * q k^T) + bias) v` over all sources at once; float32 softmax, result in `q`'s dtype.

    Key/value head `j` serves query heads `j * g ... (j + 1) * g - 1` with `g = heads / kv_heads`. A query that sees
    nothing gives zero. `softcap` is `c * tanh(logits / c)`. `dtype` is the operand format of the two products.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"attention implementation '{implementation}': {nearest(implementation, IMPLEMENTATIONS)}")
    dtype = jnp.dtype(dtype or q.dtype)
    fits = _blocked_fits(q, sources)
    if implementation == "blocked" and not fits:
        raise ConfigError("blocked attention takes one causal source without bias, prefix, or dense mask")
    if fits and (implementation == "blocked" or (implementation == "auto" and q.shape[1] >= 64)):
        own = sources[0]
        window, segments = own.allowed.window, own.allowed.segment_ids
        scaled = q * jnp.asarray(scale, q.dtype)
        return _blocked(
            scaled.astype(dtype), own.k.astype(dtype), own.v.astype(dtype), segments, window, softcap
        ).astype(q.dtype)
    return attend_with_weights(q, sources, scale=scale, softcap=softcap, dtype=dtype)[0]


def attend_with_weights(
    q: Float[Array, "batch queries heads head_dim"],
    sources: tuple[KeyValues, ...],
    *,
    scale: float | Array,
    softcap: float | None = None,
    dtype=None,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries keys"]]:
    """The reference implementation; also returns the attention weights, sources concatenated along the keys."""
    dtype = jnp.dtype(dtype or q.dtype)
    batch, queries, heads, head_dim = q.shape
    kv_heads = sources[0].k.shape[sources[0].axes.index("k")]
    grouped = (q * jnp.asarray(scale, q.dtype)).reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.astype(dtype)
    logits = [_logits(grouped, source, softcap, dtype) for source in sources]
    joined = jnp.concatenate(logits, axis=-1) if len(logits) > 1 else logits[0]
    top = jnp.max(joined, axis=-1, keepdims=True)
    weights = jnp.where(joined > _MASKED, jnp.exp(joined - jax.lax.stop_gradient(top)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    out, start = 0.0, 0
    for source in sources:
        end = start + source.num_keys
        part, values = weights[..., start:end].astype(dtype), source.v.astype(dtype)
        out = out + jnp.einsum(f"bkgts,{source.axes}->btkgd", part, values, preferred_element_type=jnp.float32)
        start = end
    return out.reshape(q.shape).astype(q.dtype), weights.reshape(batch, heads, queries, -1)


def _logits(
    q: Array, source: KeyValues, softcap: float | None, dtype
) -> Float[Array, "batch kv_heads group queries keys"]:
    keys = source.k.astype(dtype)
    logits = jnp.einsum(f"btkgd,{source.axes}->bkgts", q, keys, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    if source.bias is not None:
        logits = logits + source.bias[:, None, None, None, :].astype(jnp.float32)
    allowed = source.allowed
    if isinstance(allowed, Visible):
        allowed = allowed.dense(q.shape[1])
    return logits if allowed is None else jnp.where(allowed[:, None, None], logits, _MASKED)


def _blocked_fits(q: Array, sources: tuple[KeyValues, ...]) -> bool:
    if len(sources) != 1 or sharding.axis_size("sequence") > 1:
        return False
    own = sources[0]
    return (
        isinstance(own.allowed, Visible)
        and own.allowed.mask.causal
        and own.allowed.mask.prefix_lengths is None
        and own.allowed.mask.allowed is None
        and own.bias is None
        and own.axes == "bskd"
    )


# The blocked implementation. Queries are [batch, kv_heads, group, length, head_dim], keys [batch, kv_heads, length,
# head_dim]; query block i (a static slice) sees the static slice of keys between the farthest that a window reaches and
# its own end. Products take a block with its group and tokens merged, [batch, kv_heads, group * tokens, ...]: with an
# axis of its own for the group XLA's CPU backend runs them a third slower.


def _block_slices(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """`(first query, end, first key)` of each block; the keys end where the queries do."""
    size = max(128, 128 * math.ceil(length / 8 / 128))
    blocks = []
    for start in range(0, length, size):
        end = min(start + size, length)
        blocks.append((start, end, 0 if window is None else max(0, start - window + 1)))
    return blocks


def _blocked(q: Array, k: Array, v: Array, segments: Array | None, window: int | None, softcap: float | None) -> Array:
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim), 1, 3)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    # Saved as they are, the backward pass neither rotates nor transposes them again.
    q, k, v = (checkpoint_name(x, "attention_inputs") for x in (q, k, v))
    if sharding.platform() == "cpu":
        out = _causal_attention(q, k, v, segments, window, softcap)
    else:
        out = attend_loop.causal_attention(q, k, v, segments, window, softcap)
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, head_dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _causal_attention(q, k, v, segments, window, softcap):
    return _forward(q, k, v, segments, window, softcap)[0]


def _product(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _merge(x: Array, start: int, end: int) -> Array:
    """Queries `start` to `end` of `[batch, kv_heads, group, length, n]` as `[batch, kv_heads, group * tokens, n]`."""
    part = x[:, :, :, start:end]
    return part.reshape(*x.shape[:2], -1, x.shape[-1])


def _join(parts: list[Array], group: int) -> Array:
    """The inverse of `_merge` for consecutive blocks."""
    return jnp.concatenate([x.reshape(*x.shape[:2], group, -1, x.shape[-1]) for x in parts], axis=3)


def _block_logits(q, k, segments, block, window, softcap):
    """Masked float32 logits of one block `[batch, kv_heads, group * tokens, keys]`, and the soft cap's derivative."""
    start, end, first = block
    logits = _product("bktd,bksd->bkts", _merge(q, start, end), k[:, :, first:end])
    slope = None
    if softcap is not None:
        capped = jnp.tanh(logits / softcap)
        logits, slope = softcap * capped, 1.0 - jnp.square(capped)
    queries, keys = jnp.arange(start, end)[None, :, None], jnp.arange(first, end)[None, None, :]
    allowed = keys <= queries
    if window is not None:
        allowed = allowed & (keys > queries - window)
    if segments is not None:
        allowed = allowed & (segments[:, start:end, None] == segments[:, None, first:end])
    allowed = jnp.tile(allowed, (1, q.shape[2], 1))
    return jnp.where(allowed[:, None], logits, _MASKED), slope


def _forward(q, k, v, segments, window, softcap):
    outs, norms = [], []
    for block in _block_slices(q.shape[3], window):
        _, end, first = block
        logits, _ = _block_logits(q, k, segments, block, window, softcap)
        top = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _product("bkts,bksd->bktd", weights.astype(v.dtype), v[:, :, first:end])
        outs.append((out / total).astype(q.dtype))
        norms.append(top + jnp.log(total))
    return _join(outs, q.shape[2]), _join(norms, q.shape[2])


def _causal_forward(q, k, v, segments, window, softcap):
    out, norm = _forward(q, k, v, segments, window, softcap)
    out = checkpoint_name(out, "attention_result")
    norm = checkpoint_name(norm, "attention_norm")
    return out, (q, k, v, segments, out, norm)


def _causal_backward(window, softcap, residuals, grad):
    q, k, v, segments, out, norm = residuals
    delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    grad = grad.astype(v.dtype)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for block in _block_slices(q.shape[3], window):
        start, end, first = block
        logits, slope = _block_logits(q, k, segments, block, window, softcap)
        weights = jnp.exp(logits - _merge(norm, start, end))
        block_grad = _merge(grad, start, end)
        dweights = _product("bktd,bksd->bkts", block_grad, v[:, :, first:end])
        dlogits = weights * (dweights - _merge(delta, start, end))
        if slope is not None:
            dlogits = dlogits * slope
        dlogits, weights = dlogits.astype(k.dtype), weights.astype(v.dtype)
        dq.append(_product("bkts,bksd->bktd", dlogits, k[:, :, first:end]))
        dk = dk.at[:, :, first:end].add(_product("bkts,bktd->bksd", dlogits, _merge(q, start, end)))
        dv = dv.at[:, :, first:end].add(_product("bkts,bktd->bksd", weights, block_grad))
    return _join(dq, q.shape[2]).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_causal_attention.defvjp(_causal_forward, _causal_backward)
