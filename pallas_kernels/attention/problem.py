"""What is to be computed: the static structure of an attention call and its arrays, checked and laid out heads first.

Legend of shapes here and in the implementations: b batch, k key/value heads, g query heads of one key/value head
(group), t queries, s keys, d head_dim.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.errors import AttentionError

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""The logit of a key that a query does not see. Finite, so that no difference of two of them is NaN."""

HIDDEN = 0.5 * MASKED
"""A row whose largest logit is below this sees nothing."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """The static part: query `i` stands at `i + q_offset` among the keys and sees a contiguous range of them.

    `empty_rows`: whether a query may see nothing at all, which costs a few operations more.
    """

    causal: bool = True
    window: int | None = None
    q_offset: int = 0
    softcap: float | None = None
    scale: float = 1.0
    empty_rows: bool = False

    def visible(self, start: int, end: int, keys: int) -> tuple[int, int]:
        """The keys `(first, end)` that queries `start` to `end` reach together; `first >= end` if they reach none."""
        first = 0 if self.window is None else max(0, start + self.q_offset - self.window + 1)
        return first, min(keys, max(0, end + self.q_offset)) if self.causal else keys

    def visible_to_all(self, start: int, end: int, keys: int) -> tuple[int, int]:
        """The keys `(first, end)` that each of the queries `start` to `end` reaches."""
        first = 0 if self.window is None else max(0, end - 1 + self.q_offset - self.window + 1)
        return first, min(keys, max(0, start + self.q_offset + 1)) if self.causal else keys

    def allowed(self, queries: jax.Array, keys: jax.Array) -> jax.Array | None:
        """The mask of query and key numbers that broadcast against one another; `None` if nothing is masked."""
        positions = queries + self.q_offset if self.q_offset else queries
        allowed = keys <= positions if self.causal else None
        if self.window is not None:
            near = keys > positions - self.window
            allowed = near if allowed is None else allowed & near
        return allowed


class Operands(NamedTuple):
    """The arrays. `bias` `[b, s]` float32; segment ids `[b, t]` and `[b, s]`, both or neither."""

    q: jax.Array  # [b, k, g, t, d]
    k: jax.Array  # [b, k, s, d]
    v: jax.Array  # [b, k, s, d]
    bias: jax.Array | None = None
    q_segments: jax.Array | None = None
    kv_segments: jax.Array | None = None


def check_qkv(q: jax.Array, k: jax.Array, v: jax.Array, heads_first: bool = False) -> None:
    """Raises `AttentionError` unless the shapes and dtypes of queries, keys and values fit together."""
    names = "[batch, kv_heads, keys, head_dim]" if heads_first else "[batch, keys, kv_heads, head_dim]"
    if q.ndim != 4:
        raise AttentionError(f"q has shape {q.shape}, expected [batch, queries, heads, head_dim]")
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4:
            raise AttentionError(f"{name} has shape {x.shape}, expected {names}")
        other, dtype = ("k", k.dtype) if heads_first else ("q", q.dtype)
        if x.dtype != dtype:
            raise AttentionError(f"{name} is {x.dtype} and {other} is {dtype}: cast them to one dtype")
        if x.shape[0] != q.shape[0]:
            raise AttentionError(f"{name} {x.shape} and q {q.shape} disagree on the batch")
    if k.shape[-1] != q.shape[-1]:
        raise AttentionError(f"k {k.shape} and q {q.shape} disagree on head_dim")
    if v.shape != k.shape:
        raise AttentionError(f"v {v.shape} and k {k.shape} differ: values of another head_dim are not supported")
    for name, x in (("q", q), ("k", k)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise AttentionError(f"{name} is {x.dtype}, expected a floating-point dtype")
    heads, kv_heads = q.shape[2], k.shape[1 if heads_first else 2]
    if 0 in q.shape or 0 in k.shape:
        raise AttentionError(f"q {q.shape} or k {k.shape} has an axis of length 0")
    if heads % kv_heads:
        raise AttentionError(f"{heads} heads of q are not a multiple of the {kv_heads} heads of k")


def check_options(window: int | None, softcap: float | None) -> None:
    """Raises `AttentionError` for a window or soft cap that means nothing."""
    if window is not None and window < 1:
        raise AttentionError(f"window is {window}, expected at least 1 (it counts the query itself)")
    if softcap is not None and not softcap > 0:
        raise AttentionError(f"softcap is {softcap}, expected a positive number")


def static_scale(scale: float | jax.Array | None, q: jax.Array) -> tuple[float, jax.Array]:
    """The scale as a number, and the queries: an array for a scale is multiplied into them."""
    if scale is None:
        return 1.0 / math.sqrt(q.shape[-1]), q
    if isinstance(scale, (int, float)):
        return float(scale), q
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return 1.0, (q.astype(wide) * jnp.asarray(scale, wide)).astype(q.dtype)


def segment_pair(segment_ids, q: jax.Array, keys: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Segment ids of queries and keys from one array or a pair, checked."""
    if segment_ids is None:
        return None, None
    pair = segment_ids if isinstance(segment_ids, (tuple, list)) else (segment_ids, segment_ids)
    if len(pair) != 2:
        raise AttentionError(f"segment_ids is a sequence of {len(pair)}, expected one array or a pair (queries, keys)")
    for name, ids, length in (("queries", pair[0], q.shape[1]), ("keys", pair[1], keys)):
        if ids.shape != (q.shape[0], length):
            raise AttentionError(
                f"segment_ids of the {name} have shape {ids.shape}, expected {(q.shape[0], length)}"
                + ("" if isinstance(segment_ids, (tuple, list)) else "; give a pair where queries and keys differ")
            )
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise AttentionError(f"segment_ids of the {name} are {ids.dtype}, expected integers")
    return tuple(jnp.asarray(ids, jnp.int32) for ids in pair)


def key_bias(bias: jax.Array | None, k: jax.Array, dtype) -> jax.Array | None:
    """The bias `[batch, keys]`, checked, without infinities."""
    if bias is None:
        return None
    if bias.shape != k.shape[:2]:
        raise AttentionError(f"bias has shape {bias.shape}, expected [batch, keys] = {k.shape[:2]} (one per key)")
    return jnp.maximum(bias.astype(dtype), MASKED)


def heads_first(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`[batch, length, heads, head_dim]` to the layout of `Operands`."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = jnp.moveaxis(q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim), 1, 3)
    return q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)


def heads_last(out: jax.Array) -> jax.Array:
    """`[b, k, g, t, d]` back to `[batch, queries, heads, head_dim]`."""
    batch, kv_heads, group, length, head_dim = out.shape
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, kv_heads * group, head_dim)
