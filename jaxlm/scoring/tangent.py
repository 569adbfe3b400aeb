"""How far training moved a network: tangent kernel, kernel and representation alignment, weight change.

Learning is *lazy* where these stay as they were (the network trains as its linearization does) and *rich* where they
change. The measures are those of Liu et al. (2024, arXiv 2310.08513): no centering, so alignments are plain cosines.
Each takes functions and arrays, of any model:

    f = lambda p: model.apply({"params": p}, tokens)[:, -1, :8]
    before, after = (tangent_kernel(f, p, lambda path: "mlp" in path) for p in (params_0, params_f))
    kernel_alignment(before, after)         # 1: as lazy as can be

Models with custom derivatives are differentiated in forward mode too: give them plain implementations
(`attention="reference"`; rows below 64 tokens have it anyway).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError


def tangent_kernel(
    f: Callable[[Any], Array], params: Any, chosen: Callable[[str], bool] | None = None, *, block: int = 64
) -> Float[Array, "outputs outputs"]:
    """`K = J J^T`, with `J` the derivatives of all entries of `f(params)`, in order, by the chosen parameters.

    `J` is never held: column `i` of `K` is `J (J^T e_i)`, one reverse and one forward pass, `block` columns at a time,
    so memory is `block` times the parameters. Float32 and exactly symmetric. Traceable.

    Args:
      chosen: a predicate on paths of parameters (`"recurrent/kernel"`); all by default.
    """
    picked, put_back = trees.pick(params, chosen)

    def flat(leaves: Mapping[str, Array]) -> Float[Array, "outputs"]:
        return jnp.ravel(f(put_back(leaves)))

    out, pull = jax.vjp(flat, picked)

    def column(index: Array) -> Float[Array, "outputs"]:
        (direction,) = pull((jnp.arange(out.size) == index).astype(out.dtype))
        return jax.jvp(flat, (picked,), (direction,))[1]

    kernel = jax.lax.map(column, jnp.arange(out.size), batch_size=min(block, out.size)).astype(jnp.float32)
    return (kernel + kernel.T) / 2


def kernel_alignment(a: Float[Array, "outputs outputs"], b: Float[Array, "outputs outputs"]) -> Float[Array, ""]:
    """`<A, B> / (|A| |B|)`: the cosine between two kernels, in [0, 1] for those that are positive semidefinite."""
    if a.shape != b.shape:
        raise ConfigError(f"kernels of shapes {a.shape} and {b.shape}, expected the same outputs")
    # Scaled first: the squares of a large kernel's entries overflow.
    a, b = (x / jnp.maximum(jnp.max(jnp.abs(x)), 1e-30) for x in (a, b))
    return jnp.sum(a * b) / jnp.maximum(jnp.linalg.norm(a) * jnp.linalg.norm(b), 1e-30)


def representation_alignment(a: Float[Array, "items units"], b: Float[Array, "items units"]) -> Float[Array, ""]:
    """`kernel_alignment` of `H H^T`, the similarities of the items' activations before and after. Units may differ."""
    a, b = (h.astype(jnp.float32) / jnp.maximum(jnp.max(jnp.abs(h)), 1e-30) for h in (a, b))
    return kernel_alignment(a @ a.T, b @ b.T)


def weight_change(
    before: Any, after: Any, chosen: Callable[[str], bool] | None = None
) -> dict[str, Float[Array, "..."]]:
    """`|after - before|_F` by path in float32: an array of its leading axes for each leaf with two axes or more, else a
    number."""
    old, new = trees.pick(before, chosen)[0], trees.pick(after, chosen)[0]
    if old.keys() != new.keys():
        raise ConfigError(f"parameters differ: {', '.join(sorted(old.keys() ^ new.keys()))}")

    def norm(x: Array, y: Array) -> Float[Array, "..."]:
        change = x.astype(jnp.float32) - y.astype(jnp.float32)
        return jnp.sqrt(jnp.sum(jnp.square(change), axis=(-2, -1) if change.ndim > 1 else None))

    return {path: norm(new[path], leaf) for path, leaf in old.items()}


def sign_similarity(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, ""]:
    """The share of entries with the same sign; of rates after a ReLU, zero counts as a sign."""
    if a.shape != b.shape:
        raise ConfigError(f"activations of shapes {a.shape} and {b.shape}, expected the same")
    return jnp.mean(jnp.sign(a) == jnp.sign(b))
