"""N:M sparsity: of every M consecutive entries along a kernel's input axis, N are kept."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlm.core.errors import ConfigError


def check_nm(shape: tuple[int, ...], n: int, m: int, name: str = "kernel") -> None:
    """Raises `ConfigError` unless 1 <= n < m and groups of `m` divide the inputs of a kernel `(..., in, out)`."""
    if not (isinstance(n, int) and isinstance(m, int) and 1 <= n < m):
        raise ConfigError(f"{n}:{m} sparsity: expected whole numbers 1 <= n < m")
    if len(shape) < 2 or shape[-2] % m:
        inputs = shape[-2] if len(shape) > 1 else "no"
        raise ConfigError(f"{name} of shape {tuple(shape)} has {inputs} inputs, which groups of {m} do not divide")


def nm_mask(scores: Float[Array, "*batch in out"], n: int = 2, m: int = 4, name: str = "kernel") -> Bool[Array, "..."]:
    """True for the `n` largest scores of every `m` consecutive inputs of each output; of equals the first are kept.

    Scores are magnitudes `abs(w)`, or others: Wanda's (Sun et al. 2023, arXiv 2306.11695) are `abs(w)` times the norm
    of each input's activations. Exactly `n` are kept, whatever is equal.

    Raises `ConfigError` when groups do not divide the inputs; `name` says of what.
    """
    check_nm(scores.shape, n, m, name)
    *leading, rows, columns = scores.shape
    groups = scores.reshape(*leading, rows // m, m, columns)
    mine, others = groups[..., :, None, :], groups[..., None, :, :]
    earlier = jnp.arange(m)[None, :] < jnp.arange(m)[:, None]
    earlier = earlier.reshape((1,) * (mine.ndim - 3) + (m, m, 1))
    ahead = (others > mine) | ((others == mine) & earlier)
    return (jnp.sum(ahead, axis=-2) < n).reshape(scores.shape)


def satisfies_nm(w: Float[Array, "*batch in out"], n: int = 2, m: int = 4) -> Bool[Array, ""]:
    """Whether at most `n` of every `m` consecutive inputs of each output are not zero."""
    check_nm(w.shape, n, m)
    *leading, rows, columns = w.shape
    return jnp.all(jnp.sum(w.reshape(*leading, rows // m, m, columns) != 0, axis=-2) <= n)


def flip_rate(before: Any, after: Any) -> Float[Array, ""]:
    """Share of entries at which two masks (arrays, or trees of them with None between) differ."""
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    if not pairs:
        raise ConfigError("no masks to compare")
    return sum(jnp.sum(a != b) for a, b in pairs) / sum(math.prod(a.shape) for a, _ in pairs)
