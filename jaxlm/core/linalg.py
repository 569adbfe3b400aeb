"""Linear algebra on stacks of matrices `(..., rows, columns)`: each matrix by itself, in float32.

All functions map over the leading axes, so they work on layer-stacked and expert-stacked kernels alike.

On CPUs decompositions take the matrices of a stack one after the other. A call for several at once holds a thread of
the runtime's pool while it waits for others of the same pool to do the parts: on two cores two such calls at a time
wait for good (jaxlib 0.10.2, seen in training).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError

QUINTIC = ((3.4445, -4.7750, 2.0315),) * 5
"""Five Newton-Schulz steps that bring singular values between about 0.7 and 1.2 (Muon, Jordan et al., 2024)."""

CONVERGENT = (*QUINTIC, *((1.875, -1.25, 0.375),) * 4)
"""The same, then four steps of the fifth-order iteration that converges to 1."""


def orthogonalize(
    x: Float[Array, "*batch rows columns"],
    coefficients: Sequence[tuple[float, float, float]] = QUINTIC,
    eps: float = 1e-8,
) -> Float[Array, "*batch rows columns"]:
    """`U V^T` of each matrix `U S V^T`, about, by Newton-Schulz iterations: products only, no decomposition.

    A step `(a, b, c)` maps every singular value `s` to `a s + b s^3 + c s^5`, starting from `s / ||x||_F`.
    Singular values below about `1e-3 ||x||_F` come out smaller than 1; a matrix of zeros stays zero.
    Computes in float32 and returns the dtype of `x`.
    """
    y = x.astype(jnp.float32)
    wide = y.shape[-2] <= y.shape[-1]
    y = y if wide else y.mT
    y = y / (jnp.sqrt(jnp.sum(y * y, axis=(-2, -1), keepdims=True)) + eps)
    for a, b, c in coefficients:
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y if wide else y.mT).astype(x.dtype)


def leading_singular_vectors(
    x: Float[Array, "*batch rows columns"], rank: int, side: Literal["rows", "columns", "both"]
) -> tuple[Float[Array, "*batch rows rank"] | None, Float[Array, "*batch columns rank"] | None]:
    """The first `rank` singular vectors of each matrix: `(left, None)`, `(None, right)` or both. Float32.

    `left` spans the best `rank`-dimensional subspace for the columns, so that `left @ left.mT @ x` is the best
    approximation of that rank (Eckart and Young); so does `right` for the rows. Signs, which a decomposition leaves
    open, are such that the largest entry of every vector is positive: on any platform and layout the same.
    """
    left, _, right = _svd(x.astype(jnp.float32))

    def signed(vectors: Array) -> Array:
        vectors = vectors[..., :rank]
        largest = jnp.argmax(jnp.abs(vectors), axis=-2, keepdims=True)
        return vectors * jnp.sign(jnp.take_along_axis(vectors, largest, axis=-2))

    return (
        signed(left) if side in ("rows", "both") else None,
        signed(right.mT) if side in ("columns", "both") else None,
    )


def balanced_factors(
    a: Float[Array, "*batch rows rank"], b: Float[Array, "*batch rank columns"]
) -> tuple[Float[Array, "*batch rows rank"], Float[Array, "*batch rank columns"]]:
    """The factors `U sqrt(S)` and `sqrt(S) V^T` of the product `a @ b = U S V^T`.

    Of all pairs with this product they have the smallest `||a||_F^2 + ||b||_F^2`, and `a^T a == b b^T == S`.
    The product itself is never formed: QR of the two thin factors and the decomposition of a `rank x rank` core.
    Computes in float32 and returns the dtypes of `a` and `b`.
    """
    qa, ra = _each(jnp.linalg.qr, a.astype(jnp.float32))
    qb, rb = _each(jnp.linalg.qr, b.astype(jnp.float32).mT)
    u, s, vt = _svd(ra @ rb.mT)
    root = jnp.sqrt(s)
    new_a = (qa @ u) * jnp.expand_dims(root, -2)
    new_b = jnp.expand_dims(root, -1) * (vt @ qb.mT)
    return new_a.astype(a.dtype), new_b.astype(b.dtype)


def random_orthonormal(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "*batch rows rank"]:
    """Matrices of `shape` `(..., rows, rank)`, rank <= rows, with uniformly random orthonormal columns. Float32."""
    q, r = _each(jnp.linalg.qr, jax.random.normal(key, shape, jnp.float32))
    # The sign of R's diagonal makes Q uniform (Mezzadri, 2007).
    return q * jnp.sign(jnp.expand_dims(jnp.diagonal(r, axis1=-2, axis2=-1), -2))


def truncate_rank(
    x: Float[Array, "*batch rows columns"], rank: int | Array, match: str | None = "frobenius"
) -> Float[Array, "*batch rows columns"]:
    """The best approximation of each matrix by one of `rank`, scaled up to the norm of the whole.

    `match`: which norm the result shares with `x`, `frobenius` or `spectral` (the largest singular value, which
    truncation itself keeps), or None to leave the approximation as it is. `rank` may be traced: one program for all
    ranks. Computes in float32 and returns the dtype of `x`. The construction of Liu et al. (2024, arXiv 2310.08513).

    Raises `ConfigError` for another `match` or a rank that is not between 1 and the smaller side.
    """
    if match not in ("frobenius", "spectral", None):
        raise ConfigError(f"match is '{match}', expected 'frobenius', 'spectral' or None")
    smaller = min(x.shape[-2:])
    if isinstance(rank, int) and not 1 <= rank <= smaller:
        raise ConfigError(f"rank is {rank}, expected 1 to {smaller} for matrices {x.shape[-2]} x {x.shape[-1]}")
    left, s, right = _svd(x.astype(jnp.float32))
    kept = jnp.where(jnp.arange(smaller) < rank, s, 0.0)
    if match == "frobenius":
        norm = jnp.linalg.norm(s, axis=-1, keepdims=True)
        kept = kept * norm / jnp.maximum(jnp.linalg.norm(kept, axis=-1, keepdims=True), 1e-30)
    return ((left * kept[..., None, :]) @ right).astype(x.dtype)


def effective_ranks(
    x: Float[Array, "*batch rows columns"], tolerance: float = 1e-5, share: float = 0.2
) -> dict[str, Float[Array, "*batch"]]:
    """How many directions each matrix really has, by four measures of its singular values `s`.

    `numerical`: how many exceed `tolerance` times the largest. `participation`: `(sum s)^2 / sum s^2`. `entropy`:
    `exp` of the entropy of `s / sum s` (Roy and Vetterli, 2007). `large`: how many exceed `share` times the largest.
    All are 0 for a matrix of zeros.
    """
    s = _each(lambda one: jnp.linalg.svd(one, compute_uv=False), x.astype(jnp.float32))
    top, total = s[..., :1], jnp.sum(s, axis=-1)
    p = s / jnp.maximum(total, 1e-30)[..., None]
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.maximum(p, 1e-30)), 0.0), axis=-1)
    return {
        "numerical": jnp.sum(s > tolerance * top, axis=-1).astype(jnp.float32),
        "participation": jnp.square(total) / jnp.maximum(jnp.sum(s * s, axis=-1), 1e-30),
        "entropy": jnp.where(total > 0, jnp.exp(entropy), 0.0),
        "large": jnp.sum(s > share * top, axis=-1).astype(jnp.float32),
    }


def solve_positive(matrix: Float[Array, "*batch n n"], vector: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """The solution of each symmetric positive definite system, by Cholesky's decomposition."""

    def one(matrix: Array, vector: Array) -> Array:
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), vector[..., None])[..., 0]

    return _each(one, matrix, vector)


def _svd(x: Float[Array, "*batch rows columns"]) -> tuple[Array, Array, Array]:
    return _each(lambda one: tuple(jnp.linalg.svd(one, full_matrices=False)), x)


def _each(function: Callable[..., Any], x: Float[Array, "*batch rows columns"], *beside: Array) -> Any:
    """`function` of matrices (and of what lies beside each): at once, on CPUs one after the other."""
    batch = x.shape[:-2]
    if not batch or sharding.platform() != "cpu":
        return function(x, *beside)
    count = math.prod(batch)
    stacks = [a.reshape(count, *a.shape[len(batch) :]) for a in (x, *beside)]
    found = jax.lax.map(lambda one: function(*one), stacks)
    return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), found)
