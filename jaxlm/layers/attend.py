"""Softmax attention over one or several sources of keys and values.

`attend` chooses between implementations with the same results. `reference` forms all logits and supports everything.
The others are those of `pallas_kernels.attention` (one source, no prefix or dense mask): they never hold more than a
block of logits, skip the keys that a block cannot see, and recompute the probabilities in their backward passes. On
a mesh with a sequence axis they run in a ring: each device keeps its part of the queries, keys and values go round.
On TPUs a few tokens read a cache with `flash_decode`; what else they attend to is combined with that.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError, nearest
from pallas_kernels.attention import (
    AttentionError,
    combine,
    flash_attention,
    flash_attention_ring,
    flash_attention_sharded,
    flash_decode,
    flash_decode_sharded,
)
from pallas_kernels.attention.dispatch import SHORT

# Finite, so that a row without any visible key stays free of NaN; such rows are set to zero explicitly.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

IMPLEMENTATIONS = ("auto", "reference", "blocked", "tpu", "gpu", "cudnn")
"""`auto` takes the kernel of the mesh's platform if it fits, else `blocked`, and for short rows the reference."""


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
class Filled:
    """Which slots of a cache a call's tokens see: a row's from `starts` (default 0) to `ends`, `window` tokens back.

    The tokens follow the filled slots, in order. `mask` says the same as an array, for what knows no such structure.
    """

    mask: Bool[Array, "batch queries slots"]
    ends: Int[Array, "batch"] | Int[Array, ""]
    starts: Int[Array, "batch"] | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """One source: keys and values, which of them each query sees, and a bias on their logits.

    `k`, `v`: `[batch, keys, kv_heads, head_dim]`, or `[batch, queries, keys, kv_heads, head_dim]` if private to each
    query, or with `heads_first` `[batch, kv_heads, keys, head_dim]`, as in a cache. `allowed`: a `Visible` (own), a
    `Filled` (cache), a mask broadcastable to `[batch, queries, keys]`, or `None` (all).
    """

    k: Array
    v: Array
    allowed: Visible | Filled | Array | None = None
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
    decodes = _decode_fits(sources, implementation)
    if implementation == "tpu" and decodes or implementation == "auto" and decodes and sharding.platform() == "tpu":
        return _decode(q, sources, scale, softcap, dtype, implementation)
    fits = _flash_fits(q, sources)
    if implementation not in ("auto", "reference") and not fits:
        raise ConfigError(
            f"{implementation} attention takes one source without prefix or dense mask, its length divided evenly"
        )
    long = q.shape[1] >= SHORT or sharding.axis_size("sequence") > 1
    if fits and implementation != "reference" and (implementation != "auto" or long):
        scaled = (q * jnp.asarray(scale, q.dtype)).astype(dtype)
        return _flash(scaled, sources[0], softcap, implementation).astype(q.dtype)
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
    batch, queries, heads, _ = q.shape
    out, weights, _, _ = _softmax(q * jnp.asarray(scale, q.dtype), sources, softcap, dtype)
    return out.astype(q.dtype), weights.reshape(batch, heads, queries, -1)


def _softmax(scaled: Array, sources: tuple[KeyValues, ...], softcap: float | None, dtype) -> tuple[Array, ...]:
    """Of scaled queries the float32 results `[batch, queries, heads, head_dim]`, weights `[b, k, g, t, s]`, and the
    largest logit and sum of exponentials `[b, k, g, t, 1]` of each."""
    batch, queries, heads, head_dim = scaled.shape
    kv_heads = sources[0].k.shape[sources[0].axes.index("k")]
    grouped = scaled.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    grouped = grouped.astype(dtype)
    logits = [_logits(grouped, source, softcap, dtype) for source in sources]
    joined = jnp.concatenate(logits, axis=-1) if len(logits) > 1 else logits[0]
    top = jax.lax.stop_gradient(jnp.max(joined, axis=-1, keepdims=True))
    weights = jnp.where(joined > _MASKED, jnp.exp(joined - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    out, start = 0.0, 0
    for source in sources:
        end = start + source.num_keys
        part, values = weights[..., start:end].astype(dtype), source.v.astype(dtype)
        out = out + jnp.einsum(f"bkgts,{source.axes}->btkgd", part, values, preferred_element_type=jnp.float32)
        start = end
    return out.reshape(scaled.shape), weights, top, total


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
    elif isinstance(allowed, Filled):
        allowed = allowed.mask
    return logits if allowed is None else jnp.where(allowed[:, None, None], logits, _MASKED)


def _flash_fits(q: Array, sources: tuple[KeyValues, ...]) -> bool:
    if len(sources) != 1 or q.shape[1] % sharding.axis_size("sequence"):
        return False
    own = sources[0]
    return (
        isinstance(own.allowed, Visible)
        and own.allowed.mask.prefix_lengths is None
        and own.allowed.mask.allowed is None
        and own.axes == "bskd"
        and own.num_keys == q.shape[1]
    )


def _flash(
    q: Float[Array, "batch length heads head_dim"], own: KeyValues, softcap: float | None, implementation: str
) -> Float[Array, "batch length heads head_dim"]:
    """Attention of scaled queries to their own keys; on a mesh of accelerators each device computes its part."""
    k, v = own.k.astype(q.dtype), own.v.astype(q.dtype)
    options = {
        "causal": own.allowed.mask.causal,
        "window": own.allowed.window,
        "segment_ids": own.allowed.segment_ids,
        "bias": own.bias,
        "softcap": softcap,
        "scale": 1.0,
        "implementation": implementation,
    }
    if sharding.axis_size("sequence") > 1:
        return _ring(q, k, v, options)
    divided = _divided(q, k, "bskd")
    try:
        if implementation != "blocked" and sharding.platform() != "cpu" and divided is not None:
            return flash_attention_sharded(q, k, v, **divided, **options)
        return flash_attention(q, k, v, **options)
    except AttentionError as error:
        raise ConfigError(f"attention: {error}") from error


def _ring(q: Array, k: Array, v: Array, options: dict[str, Any]) -> Float[Array, "batch length heads head_dim"]:
    """`flash_attention_ring` on the ambient mesh."""
    batch_axes, length_axis, head_axes, _ = sharding.local_spec(q.shape, ("batch", "length", "act_heads", None))
    if sharding.local_spec(k.shape, ("batch", "length", "act_kv_heads", None))[2] != head_axes:
        # Too few key/value heads to divide, so whole everywhere: each device takes those of its query heads.
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    try:
        return flash_attention_ring(
            q, k, v, sequence_axis=length_axis, batch_axes=batch_axes, head_axes=head_axes, **options
        )
    except AttentionError as error:
        raise ConfigError(f"attention: {error}") from error


def _decode_fits(sources: tuple[KeyValues, ...], implementation: str) -> bool:
    cached = sources[0]
    return (
        implementation in ("auto", "tpu")
        and isinstance(cached.allowed, Filled)
        and cached.heads_first
        and cached.bias is None
        and len(sources) > 1
        and sharding.axis_size("sequence") == 1
    )


def _decode(
    q: Float[Array, "batch length heads head_dim"],
    sources: tuple[KeyValues, ...],
    scale: float | Array,
    softcap: float | None,
    dtype,
    implementation: str,
) -> Float[Array, "batch length heads head_dim"]:
    """Attention to a cache, the first source, by `flash_decode`, combined with that to the others, which are short."""
    cached, *others = sources
    filled = cached.allowed
    scaled = q * jnp.asarray(scale, q.dtype)
    narrow = scaled.astype(dtype)
    options = {
        "starts": filled.starts,
        "window": filled.window,
        "q_offset": 0,
        "softcap": softcap,
        "scale": 1.0,
        "return_lse": True,
        "implementation": implementation,
    }
    ends = jnp.broadcast_to(filled.ends, q.shape[:1])
    divided = _divided(q, cached.k, cached.axes)
    try:
        if divided is not None and sharding.platform() != "cpu":
            out, lse = flash_decode_sharded(narrow, cached.k, cached.v, ends, **divided, **options)
        else:
            out, lse = flash_decode(narrow, cached.k, cached.v, ends, **options)
    except AttentionError as error:
        raise ConfigError(f"attention: {error}") from error
    rest, _, top, total = _softmax(scaled, tuple(others), softcap, dtype)
    rest_lse = jnp.where(total == 0.0, -jnp.inf, top + jnp.log(jnp.where(total == 0.0, 1.0, total)))
    rest_lse = rest_lse.reshape(lse.shape)
    return combine([out.astype(rest.dtype), rest], [lse, rest_lse])[0].astype(q.dtype)


def _divided(q: Array, k: Array, axes: str) -> dict[str, Any] | None:
    """The mesh axes over which rows and heads of a kernel's call lie, or `None` on one device or if heads part."""
    names = {"b": "batch", "k": "act_kv_heads"}
    spec = dict(zip(axes, sharding.local_spec(k.shape, [names.get(axis) for axis in axes]), strict=True))
    heads = sharding.local_spec(q.shape, ("batch", None, "act_heads", None))[2]
    if sharding.num_devices() == 1 or heads != spec["k"]:
        return None
    return {"batch_axes": spec["b"], "head_axes": spec["k"]}
