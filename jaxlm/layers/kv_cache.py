"""The key/value cache: a pytree of stacked keys and values and how much of it each row has filled.

Two modes share one type. *Per row* (`index` has shape `[batch]`): prompts are padded on the right, rows may have
different lengths, be rolled back and refilled. *Shared* (`index` is a scalar, `start` has shape `[batch]`): prompts
are padded on the left, and all rows write the same slot, one `dynamic_update_slice` that is cheap everywhere.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core.sharding import constrain

_AXES = (None, "batch", "act_kv_heads", None, None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of what came before.

    `k`, `v`: `[layers, batch, kv_heads, capacity, head_dim]`, keys rotated. (Heads come before slots because a step of
    one token then reads a head's keys in order, which halves its time on CPU.) `index`: the next slot to write.
    `start`: the first slot that holds a real token (shared mode). `empty` is static: the prefill of a fresh cache
    compiles to plain causal attention.
    """

    k: Float[Array, "layers batch kv_heads capacity head_dim"]
    v: Float[Array, "layers batch kv_heads capacity head_dim"]
    index: Int[Array, "batch"] | Int[Array, ""]
    start: Int[Array, "batch"] | None = None
    empty: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def capacity(self) -> int:
        return self.k.shape[3]

    @property
    def batch(self) -> int:
        return self.k.shape[1]

    @property
    def per_row(self) -> bool:
        return self.start is None


def init_cache(
    layers: int, batch: int, capacity: int, kv_heads: int, head_dim: int, dtype: Any = jnp.float32, shared: bool = False
) -> KVCache:
    """An empty cache. In shared mode set `start` to each row's amount of left padding."""
    k = constrain(jnp.zeros((layers, batch, kv_heads, capacity, head_dim), dtype), *_AXES)
    index = jnp.zeros((), jnp.int32) if shared else jnp.zeros((batch,), jnp.int32)
    start = jnp.zeros((batch,), jnp.int32) if shared else None
    return KVCache(k, k, index, start, empty=True)


def positions(cache: KVCache, length: int) -> Int[Array, "batch length"]:
    """Positions of the next `length` tokens of each row, counting real tokens only (never below 0)."""
    offsets = jnp.arange(length, dtype=jnp.int32)[None, :]
    if cache.per_row:
        return cache.index[:, None] + offsets
    return jnp.maximum(cache.index + offsets - cache.start[:, None], 0)


def visible(cache: KVCache, length: int, window: int | None) -> Bool[Array, "batch length capacity"]:
    """Which cached slots each of the next `length` tokens attends to."""
    slots = jnp.arange(cache.capacity, dtype=jnp.int32)[None, None, :]
    index = jnp.broadcast_to(cache.index, (cache.batch,))[:, None, None]
    allowed = slots < index
    if not cache.per_row:
        allowed = allowed & (slots >= cache.start[:, None, None])
    if window is not None:
        queries = index + jnp.arange(length, dtype=jnp.int32)[None, :, None]
        allowed = allowed & (slots > queries - window)
    return jnp.broadcast_to(allowed, (cache.batch, allowed.shape[1], cache.capacity))


def write(cache: KVCache, k: Array, v: Array, layers: tuple[int, int], advance: bool) -> KVCache:
    """Puts new keys and values `[layers', batch, length, kv_heads, head_dim]` of a layer range at `index`.

    `advance` moves the index on (once all layers are written). What would lie beyond the capacity is dropped.
    """
    first, last = layers
    length = k.shape[2]
    if cache.per_row:
        rows = jnp.arange(cache.batch, dtype=jnp.int32)[:, None]
        slots = cache.index[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]

        def put(old: Array, new: Array) -> Array:
            whole = (first, last) == (0, old.shape[0])
            part = old if whole else old[first:last]
            # An index on both sides of a slice moves the indexed axes to the front.
            moved = jnp.moveaxis(new.astype(old.dtype), 0, 2)
            part = part.at[:, rows, :, slots].set(moved, mode="drop", unique_indices=True)
            return part if whole else old.at[first:last].set(part)
    else:

        def put(old: Array, new: Array) -> Array:
            zero = jnp.zeros((), jnp.int32)
            at = (jnp.asarray(first, jnp.int32), zero, zero, cache.index, zero)
            return jax.lax.dynamic_update_slice(old, jnp.swapaxes(new, 2, 3).astype(old.dtype), at)

    index = cache.index + length if advance else cache.index
    new_k, new_v = constrain(put(cache.k, k), *_AXES), constrain(put(cache.v, v), *_AXES)
    return dataclasses.replace(cache, k=new_k, v=new_v, index=index, empty=cache.empty and not advance)


def rollback(cache: KVCache, lengths: Int[Array, "batch"]) -> KVCache:
    """The cache with only the first `lengths` tokens of each row (per-row mode)."""
    if not cache.per_row:
        raise ValueError("rollback needs a per-row cache: a shared one has a single index")
    return dataclasses.replace(cache, index=jnp.asarray(lengths, jnp.int32))


def repeat(cache: KVCache, n: int) -> KVCache:
    """Each row `n` times: rows `i * n` to `i * n + n - 1` are row `i`."""
    return _rows(cache, lambda x, axis: jnp.repeat(x, n, axis=axis))


def gather(cache: KVCache, rows: Int[Array, "rows"]) -> KVCache:
    """The cache whose row `i` is row `rows[i]` of this one."""
    return _rows(cache, lambda x, axis: jnp.take(x, rows, axis=axis))


def insert(cache: KVCache, rows: Int[Array, "rows"], other: KVCache) -> KVCache:
    """The cache with row `rows[i]` replaced by row `i` of `other`; rows beyond the batch are dropped (per-row mode)."""
    if not cache.per_row:
        raise ValueError("insert needs a per-row cache: a shared one has a single index")
    return dataclasses.replace(
        cache,
        k=cache.k.at[:, rows].set(other.k, mode="drop"),
        v=cache.v.at[:, rows].set(other.v, mode="drop"),
        index=cache.index.at[rows].set(other.index, mode="drop"),
        empty=cache.empty and other.empty,
    )


def _rows(cache: KVCache, pick: Any) -> KVCache:
    per_row = {"index": pick(cache.index, 0)} if cache.per_row else {"start": pick(cache.start, 0)}
    return dataclasses.replace(cache, k=pick(cache.k, 1), v=pick(cache.v, 1), **per_row)
