"""Linear algebra on stacks of matrices `(..., rows, columns)`: each matrix by itself, in float32.

All functions map over the leading axes, so they work on layer-stacked and expert-stacked kernels alike.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    left, _, right = jnp.linalg.svd(x.astype(jnp.float32), full_matrices=False)

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
    qa, ra = jnp.linalg.qr(a.astype(jnp.float32))
    qb, rb = jnp.linalg.qr(b.astype(jnp.float32).mT)
    u, s, vt = jnp.linalg.svd(ra @ rb.mT, full_matrices=False)
    root = jnp.sqrt(s)
    new_a = (qa @ u) * jnp.expand_dims(root, -2)
    new_b = jnp.expand_dims(root, -1) * (vt @ qb.mT)
    return new_a.astype(a.dtype), new_b.astype(b.dtype)


def random_orthonormal(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "*batch rows rank"]:
    """Matrices of `shape` `(..., rows, rank)`, rank <= rows, with uniformly random orthonormal columns. Float32."""
    q, r = jnp.linalg.qr(jax.random.normal(key, shape, jnp.float32))
    # The sign of R's diagonal makes Q uniform (Mezzadri, 2007).
    return q * jnp.sign(jnp.expand_dims(jnp.diagonal(r, axis1=-2, axis2=-1), -2))
