"""The definition, with all logits at once; and what every implementation does with a tile of logits."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def statistics(x: Array, head: Array, targets: Array, options: Any) -> tuple[Array, Array, Array]:
    """The log-partition, the target's logit and the largest logit of each token, float32 `[tokens]`.

    JAX differentiates it.
    """
    logits = cap(logits_of(x, head, options), options.softcap)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1), picked, jnp.max(logits, axis=1)


def logits_of(x: Array, head: Array, options: Any) -> Array:
    """`x @ head` (`x @ head.T`) with float32 sums, before soft-capping."""
    contract = (((1,), (1 if options.transposed else 0,)), ((), ()))
    dtype = jnp.dtype(options.dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    return jax.lax.dot_general(x.astype(dtype), head.astype(dtype), contract, preferred_element_type=wide)


def cap(logits: Array, softcap: float | None) -> Array:
    """`softcap * tanh(logits / softcap)`."""
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def dlogits(logits: Array, hit: Array, lse: Array, dlse: Array, dpicked: Array, softcap: float | None) -> Array:
    """The gradient of a tile of logits before soft-capping; `logits` are after it, `hit` marks targets, the other
    arguments are `[tokens, 1]`."""
    d = jnp.exp(logits - lse) * dlse + jnp.where(hit, dpicked, 0.0)
    return d if softcap is None else d * (1 - jnp.square(logits / softcap))
