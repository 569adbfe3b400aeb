"""Cross-entropy in plain JAX: a loop over columns of the vocabulary with a running maximum and sum."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cross_entropy.reference import cap, dlogits, logits_of

Array = jax.Array


def statistics(x: Array, head: Array, targets: Array, options: Any) -> tuple[Array, Array, Array]:
    """As `reference.statistics`, with the logits of `options.chunk` columns at a time."""

    def add_chunk(i: Array, state: tuple) -> tuple:
        top, total, picked = state
        logits, hit, new, _, _ = _chunk(x, head, targets, i, options)
        kept = jnp.where(new, logits, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(kept, axis=1))
        total = total * jnp.exp(top - higher) + jnp.sum(jnp.exp(kept - higher[:, None]), axis=1)
        return higher, total, picked + jnp.sum(jnp.where(hit, logits, 0.0), axis=1)

    like = jax.eval_shape(lambda: logits_of(x, _columns(head, 0, options), options))
    start = (jnp.full(x.shape[0], -jnp.inf, like.dtype), *(jnp.zeros(x.shape[0], like.dtype) for _ in range(2)))
    top, total, picked = jax.lax.fori_loop(0, _chunks(head, options), add_chunk, start)
    return top + jnp.log(total), picked, top


def gradients(
    x: Array, head: Array, targets: Array, lse: Array, dlse: Array, dpicked: Array, options: Any
) -> tuple[Array, Array]:
    """`(dx, dhead)` from those of the log-partition and the target's logit; logits are computed again."""
    dtype = jnp.dtype(options.dtype)
    axis = 0 if options.transposed else 1

    def product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
        dimensions = ((contract[:1], contract[1:]), ((), ()))
        return jax.lax.dot_general(a.astype(dtype), b.astype(dtype), dimensions, preferred_element_type=lse.dtype)

    def add_chunk(i: Array, state: tuple) -> tuple:
        dx, dhead = state
        logits, hit, new, columns, start = _chunk(x, head, targets, i, options)
        d = dlogits(logits, hit, lse[:, None], dlse[:, None], dpicked[:, None], options.softcap)
        d = jnp.where(new, d, 0.0)
        dx = dx + product(d, columns, (1, axis))
        part = product(d, x, (0, 0)) if options.transposed else product(x, d, (0, 0))
        # The last chunk begins within the one before, and adds nothing to what that has.
        before = jax.lax.dynamic_slice_in_dim(dhead, start, options.chunk, axis)
        return dx, jax.lax.dynamic_update_slice_in_dim(dhead, before + part.astype(dhead.dtype), start, axis)

    state = jnp.zeros(x.shape, lse.dtype), jnp.zeros(head.shape, head.dtype)
    dx, dhead = jax.lax.fori_loop(0, _chunks(head, options), add_chunk, state)
    return dx.astype(x.dtype), dhead


def _chunk(x: Array, head: Array, targets: Array, i: Array, options: Any) -> tuple:
    """Of chunk `i`: capped logits, which are targets, which columns are new, its columns of `head`, where it starts."""
    vocab = head.shape[0 if options.transposed else 1]
    start = jnp.minimum(i * options.chunk, vocab - options.chunk)
    columns = _columns(head, start, options)
    number = start + jnp.arange(options.chunk)
    new = (number >= i * options.chunk)[None, :]
    hit = (number[None, :] == targets[:, None]) & new
    return cap(logits_of(x, columns, options), options.softcap), hit, new, columns, start


def _columns(head: Array, start: Array | int, options: Any) -> Array:
    return jax.lax.dynamic_slice_in_dim(head, start, options.chunk, 0 if options.transposed else 1)


def _chunks(head: Array, options: Any) -> int:
    return -(-head.shape[0 if options.transposed else 1] // options.chunk)
