"""The functions that others call: they check, choose an implementation, and lay the arrays out for it."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import target
from pallas_kernels.attention import blocked, dispatch, reference, vjp
from pallas_kernels.attention.errors import AttentionError
from pallas_kernels.attention.gpu_tables import GpuTiles
from pallas_kernels.attention.problem import (
    Operands,
    Structure,
    check_options,
    check_qkv,
    heads_first,
    heads_last,
    key_bias,
    segment_pair,
    static_scale,
)
from pallas_kernels.attention.tiles import Tiles

IMPLEMENTATIONS = ("reference", "blocked", "tpu", "gpu", "cudnn")
DECODE_IMPLEMENTATIONS = ("reference", "tpu")


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    window: int | None = None,
    q_offset: int | None = None,
    segment_ids: jax.Array | tuple[jax.Array, jax.Array] | None = None,
    bias: jax.Array | None = None,
    softcap: float | None = None,
    scale: float | jax.Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    interpret: bool = False,
    tiles: Tiles | GpuTiles | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`softmax(softcap(scale * q k^T) + bias) v`; float32 softmax and sums, the result in `q`'s dtype.

    `q`: `[batch, queries, heads, head_dim]`; `k`, `v`: `[batch, keys, kv_heads, head_dim]`; query heads
    `j * g ... (j + 1) * g - 1` share key/value head `j`, with `g = heads / kv_heads`. Differentiable in `q`, `k`, `v`
    and `bias`, through both results.

    - `causal`: query `i` stands at key `i + q_offset` and sees keys up to it. `q_offset` is by default `keys -
      queries`: the last query stands at the last key.
    - `window`: a query sees so many keys back, itself counted (keys after it too if not `causal`).
    - `segment_ids` `[batch, length]`, or a pair for queries and keys: only keys of equal id are seen.
    - `bias` `[batch, keys]`: added to the logits of a key for all queries and heads; `-inf` hides the key.
    - `softcap`: logits become `softcap * tanh(logits / softcap)` before the bias.
    - `scale`: of the logits, by default `head_dim ** -0.5`.
    - `return_lse`: also returns the log-sum-exps of the logits, float32 `[batch, heads, queries]` (see `combine`).
    - `implementation`: one of `IMPLEMENTATIONS`, or `auto` (see `dispatch`). `interpret` runs a kernel in Pallas'
      interpreter, on any device. `tiles` overrides the kernels' block sizes.

    A query that sees nothing gives 0, with log-sum-exp `-inf` and gradient 0. Kernels are not partitioned by XLA: call
    this inside `jax.shard_map`, or `flash_attention_sharded`.

    Raises `AttentionError` for arguments that do not fit together, `UnsupportedError` when a forced implementation
    cannot compute the call.
    """
    check_qkv(q, k, v)
    check_options(window, softcap)
    queries, keys, head_dim = q.shape[1], k.shape[1], q.shape[3]
    scale, q = static_scale(scale, q)
    offset = keys - queries if q_offset is None else int(q_offset)
    q_segments, kv_segments = segment_pair(segment_ids, q, keys)
    own = 0 <= offset <= keys - queries and not isinstance(segment_ids, (tuple, list))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # Each query sees at least its own key, unless its place lies outside the keys or its key is hidden.
    empty_rows = not own or bias is not None
    structure = Structure(causal, window, offset, softcap, scale, empty_rows)
    operands = Operands(*heads_first(q, k, v), key_bias(bias, k, wide), q_segments, kv_segments)
    request = dispatch.Request(
        target=target.current(q, k, v),
        structure=structure,
        shape=(*operands.q.shape[:4], keys, head_dim),
        dtype=q.dtype,
        bias=bias is not None,
        segments=q_segments is not None,
        with_lse=return_lse,
        interpret=interpret,
    )
    name = dispatch.choose(implementation, request, IMPLEMENTATIONS)
    if name == "cudnn":
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=causal, local_window_size=local, implementation="cudnn"
        )
    if name == "reference":
        out, lse = reference.attention(structure, operands)
    else:
        found = vjp.attention(_passes(name, tiles, interpret), structure, operands, return_lse)
        out, lse = found if return_lse else (found, None)
    out = heads_last(out)
    return (out, lse.reshape(q.shape[0], q.shape[2], queries)) if return_lse else out


def flash_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    *,
    starts: jax.Array | None = None,
    window: int | None = None,
    q_offset: int | None = None,
    softcap: float | None = None,
    scale: float | jax.Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    interpret: bool = False,
    block: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """One or a few query tokens against a cache of which each row has filled another length.

    `q`: `[batch, queries, heads, head_dim]`; `k`, `v`: `[batch, kv_heads, capacity, head_dim]` (heads first: a head's
    keys lie in order); `lengths` `[batch]`: row `i` has filled the slots before `lengths[i]`, from `starts[i]` on
    (default 0). Query `t` stands at slot `lengths + q_offset + t`, sees filled slots up to it and `window` back, itself
    counted. `q_offset` is by default `-queries`: the queries' own keys are the last in the cache. With 0 they are not
    yet in it, and the result is to be combined with attention to them (`return_lse`, `combine`).

    The result is `[batch, queries, heads, head_dim]`, 0 for a query that sees nothing; `return_lse` adds the
    log-sum-exps `[batch, heads, queries]`. A cache in another format than `q` is cast to it, by the kernel a block at a
    time. Differentiable in `q`, `k` and `v`; the gradient is the reference's. `implementation`: `reference`, `tpu`, or
    `auto`; `block` overrides the number of slots that the kernel reads at a time. Kernels are not partitioned by XLA:
    call this inside `jax.shard_map`, or `flash_decode_sharded`.
    """
    check_qkv(q, k, v, heads_first=True)
    check_options(window, softcap)
    batch, queries, heads, head_dim = q.shape
    kv_heads, capacity = k.shape[1:3]
    starts = jnp.zeros((batch,), jnp.int32) if starts is None else starts
    for name, x in (("lengths", lengths), ("starts", starts)):
        if x.shape != (batch,) or not jnp.issubdtype(x.dtype, jnp.integer):
            raise AttentionError(f"{name} is {x.dtype}{list(x.shape)}, expected integers of shape [{batch}]")
    scale, q = static_scale(scale, q)
    offset = -queries if q_offset is None else int(q_offset)
    structure = Structure(True, window, offset, softcap, scale, True)
    grouped = jnp.moveaxis(q.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim), 1, 3)
    request = dispatch.Request(
        target=target.current(q, k, v),
        structure=structure,
        shape=(*grouped.shape[:4], capacity, head_dim),
        dtype=q.dtype,
        with_lse=return_lse,
        interpret=interpret,
        decode=True,
        cache_dtype=k.dtype,
    )
    name = dispatch.choose(implementation, request, DECODE_IMPLEMENTATIONS)
    lengths, starts = jnp.minimum(lengths, capacity).astype(jnp.int32), starts.astype(jnp.int32)
    if name == "tpu":
        out, lse = _decode_on_tpu(structure, block, interpret, grouped, k, v, lengths, starts)
    else:
        out, lse = _decode_plainly(structure, grouped, k, v, lengths, starts)
    out = heads_last(out)
    return (out, lse.reshape(batch, heads, queries)) if return_lse else out


def combine(outs: list[jax.Array], lses: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """One softmax over several sources of keys, from each source's result and log-sum-exps.

    `outs`: `[batch, queries, heads, head_dim]` each; `lses`: `[batch, heads, queries]` each. Returns the joint result
    and its log-sum-exps, exact up to rounding, differentiable; a query that no source shows anything gives 0.
    """
    if not outs or len(outs) != len(lses):
        raise AttentionError(f"{len(outs)} outs and {len(lses)} lses, expected as many of both, at least one")
    for i, (out, lse) in enumerate(zip(outs, lses)):
        batch, queries, heads = out.shape[:3]
        if out.shape != outs[0].shape or lse.shape != (batch, heads, queries):
            raise AttentionError(f"outs[{i}] {out.shape} and lses[{i}] {lse.shape} do not fit with {outs[0].shape}")
    stacked = jnp.stack(lses)
    top = jax.lax.stop_gradient(jnp.max(stacked, axis=0, keepdims=True))
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(stacked - top)
    total = jnp.sum(weights, axis=0, keepdims=True)
    empty = total == 0.0
    safe = jnp.where(empty, 1.0, total)
    shares = jnp.swapaxes(weights / safe, 2, 3)[..., None]
    out = sum(share * out for share, out in zip(shares, outs))
    return out.astype(outs[0].dtype), jnp.where(empty, -jnp.inf, top + jnp.log(safe))[0]


def _decode_plainly(structure: Structure, q, k, v, lengths, starts) -> tuple[jax.Array, jax.Array]:
    slots = jnp.arange(k.shape[2], dtype=jnp.int32)[None, None, :]
    ends, places = lengths[:, None, None], jnp.arange(q.shape[3], dtype=jnp.int32)[None, :, None]
    allowed = structure.allowed(places + ends, slots) & (slots < ends) & (slots >= starts[:, None, None])
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    return reference.softmax_attention(q, k, v, allowed, None, structure.scale, structure.softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _decode_on_tpu(structure: Structure, block: int | None, interpret: bool, q, k, v, lengths, starts):
    from pallas_kernels.attention import tpu_decode

    return tpu_decode.attention(structure, q, k, v, lengths, starts, block, interpret)


def _decode_forward(structure: Structure, block: int | None, interpret: bool, *arrays):
    return _decode_on_tpu(structure, block, interpret, *arrays), arrays


def _decode_backward(structure: Structure, block: int | None, interpret: bool, arrays, cotangents):
    q, k, v, lengths, starts = arrays
    _, pull = jax.vjp(lambda q, k, v: _decode_plainly(structure, q, k, v, lengths, starts), q, k, v)
    return *pull(cotangents), None, None


_decode_on_tpu.defvjp(_decode_forward, _decode_backward)


def _passes(name: str, tiles: Tiles | GpuTiles | None, interpret: bool) -> vjp.Passes:
    if name == "blocked":
        return blocked.PASSES
    # Pallas is imported by who uses it: it takes a while, and its part for GPUs exists on Linux alone.
    if name == "tpu":
        from pallas_kernels.attention import tpu

        return tpu.passes(tiles, interpret)
    from pallas_kernels.attention import gpu

    return gpu.passes(tiles, interpret)
