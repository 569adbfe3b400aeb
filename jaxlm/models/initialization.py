"""Initial weights of a chosen rank: what decides how far training moves a network's features.

Liu et al. (2024, arXiv 2310.08513): at equal norm, low-rank weights learn richly (large changes), high-rank weights
lazily. Their construction truncates a random matrix and scales it back to its Frobenius norm.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.core.linalg import truncate_rank
from jaxlm.optim.roles import select
from jaxlm.weights import Weight


def low_rank_init(
    key: jax.Array,
    shape: tuple[int, ...],
    rank: int | Array | None = None,
    *,
    gain: float = 1.0,
    match: str | None = "frobenius",
) -> Float[Array, "*batch in out"]:
    """Normal kernels `(..., in, out)` of deviation `gain / sqrt(in)`, each reduced to `rank` (None: whole).

    Scaling low-rank weights to the whole's Frobenius norm raises their largest singular value; `match="spectral"`
    keeps that one equal instead. `rank` may be traced.
    """
    whole = gain * jax.random.normal(key, shape) / shape[-2] ** 0.5
    return whole if rank is None else truncate_rank(whole, rank, match)


def reduce_kernels(
    params: Any,
    axes: Any,
    rank: int | Array,
    chosen: Callable[[str], bool] | None = None,
    *,
    match: str | None = "frobenius",
) -> Any:
    """A model's parameters with every matrix (by role; those of `chosen` paths) reduced to `rank`.

    Embedding, head, norms and biases stay; stacks of layers are reduced matrix by matrix. A rank above a matrix's own
    leaves it whole.

    Raises `ConfigError` if no matrix is chosen, a rank below 1, or a kernel that is no dense array.
    """
    if isinstance(rank, int) and rank < 1:
        raise ConfigError(f"rank is {rank}, expected at least 1")
    packed = [p for p, x in trees.named_leaves(params, lambda x: isinstance(x, Weight)) if isinstance(x, Weight)]
    if packed:
        raise ConfigError(f"{packed[0]} is no dense array: reduce the rank of kernels before they are packed")
    wanted = select(params, axes, lambda path, role: role == "matrix" and (chosen is None or chosen(path)))
    if not any(jax.tree.leaves(wanted)):
        raise ConfigError("no matrix is chosen: no kernel would be reduced")

    def reduce(leaf: Array, reduced: bool) -> Array:
        if not reduced:
            return leaf
        own = min(leaf.shape[-2:])
        return truncate_rank(leaf, min(rank, own) if isinstance(rank, int) else jnp.minimum(rank, own), match)

    return jax.tree.map(reduce, params, wanted)
