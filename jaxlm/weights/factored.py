"""Kernels that are trained in few parameters from the start: a product of thin matrices, and a sparse part beside it.

    w = factored_kernel(key, (layers, embed, mlp), rank=128)              # low-rank pretraining: w = s * a @ b
    w = sparse_low_rank_kernel(key, (layers, embed, mlp), rank=128)       # SLTrain: the same plus a sparse matrix

and what is done to them from time to time: `refactorize` balances the factors, `merge_and_restart` moves an adapter
into its base (ReLoRA).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.core.keys import fold
from jaxlm.core.linalg import balanced_factors
from jaxlm.weights import base as weights
from jaxlm.weights.base import Weight
from jaxlm.weights.low_rank import LowRank, add_low_rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored(Weight):
    """`scale * a @ b`, never formed in products. `a`: `(..., in, rank)`; `b`: `(..., rank, out)`."""

    a: Float[Array, "*batch in rank"]
    b: Float[Array, "*batch rank out"]
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.a.shape[:-1], self.b.shape[-1])

    @property
    def dtype(self) -> Any:
        return self.a.dtype

    def dense(self) -> Array:
        return (self.scale * jnp.matmul(self.a, self.b, preferred_element_type=jnp.float32)).astype(self.dtype)

    def matmul(self, x: Array, dtype: Any = None) -> Array:
        return self.scale * weights.matmul(weights.matmul(x, self.a, dtype=dtype), self.b, dtype=dtype)

    def matmul_transposed(self, x: Array, dtype: Any = None) -> Array:
        thin = weights.matmul_transposed(x, self.b, dtype=dtype)
        return self.scale * weights.matmul_transposed(thin, self.a, dtype=dtype)

    def take(self, ids: Array) -> Array:
        return self.scale * weights.matmul(weights.take(self.a, ids), self.b)

    def grouped_matmul(self, x: Array, sizes: Array, dtype: Any = None) -> Array:
        thin = weights.grouped_matmul(x, self.a, sizes, dtype=dtype)
        return self.scale * weights.grouped_matmul(thin, self.b, sizes, dtype=dtype)

    def child_axes(self, axes: tuple) -> "Factored":
        *leading, rows, columns = axes
        return Factored((*leading, rows, "rank"), (*leading, "rank", columns), self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse(Weight):
    """A matrix `(..., rows, columns)` that is zero except at `indices` of its flattened last two axes.

    `values`: `(..., nonzeros)`; `indices`: the same shape, int32, different in every layer and never trained: leave
    leaves whose path ends in `indices` out of the trainable part. Products go through the dense matrix.
    """

    values: Float[Array, "*batch nonzeros"]
    indices: Int[Array, "*batch nonzeros"]
    rows: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.values.shape[:-1], self.rows, self.columns)

    @property
    def dtype(self) -> Any:
        return self.values.dtype

    def dense(self) -> Array:
        def scatter(values: Array, indices: Array) -> Array:
            return jnp.zeros(self.rows * self.columns, values.dtype).at[indices].set(values, unique_indices=True)

        for _ in range(self.values.ndim - 1):
            scatter = jax.vmap(scatter)
        return scatter(self.values, self.indices).reshape(self.shape)

    def child_axes(self, axes: tuple) -> "Sparse":
        own = (*axes[:-2], None)
        return Sparse(own, own, self.rows, self.columns)


def factored_kernel(
    key: jax.Array, shape: tuple[int, ...], rank: int, alpha: float = 32.0, dtype: Any = jnp.float32
) -> Factored:
    """A kernel of `shape` `(..., in, out)` as `alpha / rank * a @ b`, for low-rank pretraining.

    `a` is drawn from `U(-1/sqrt(in), 1/sqrt(in))`, `b` from `U(-1/sqrt(rank), 1/sqrt(rank))`.

    Source: Scalable Parameter and Memory Efficient Pretraining for LLM (Glentis et al., 2025, arXiv 2505.22922).
    """
    _check_rank(shape, rank)
    *leading, rows, columns = shape
    a = jax.random.uniform(fold(key, "a"), (*leading, rows, rank), dtype, -1, 1) * rows**-0.5
    b = jax.random.uniform(fold(key, "b"), (*leading, rank, columns), dtype, -1, 1) * rank**-0.5
    return Factored(a, b, alpha / rank)


def sparse_low_rank_kernel(
    key: jax.Array,
    shape: tuple[int, ...],
    rank: int,
    density: float = 0.01,
    alpha: float = 32.0,
    dtype: Any = jnp.float32,
) -> LowRank:
    """SLTrain's kernel: `alpha / rank * a @ b` plus a sparse matrix with `floor(density * in * out)` random places.

    Values and `a` are drawn from `U(-1/sqrt(in), 1/sqrt(in))`, `b` is zero. A `LowRank` over a `Sparse`.

    Source: SLTrain (Han et al., 2024, arXiv 2406.02214), whose density is 0.03; 0.01 in arXiv 2505.22922.

    Raises:
      ConfigError: rank larger than the matrix, density outside (0, 1] or without a single place.
    """
    _check_rank(shape, rank)
    *leading, rows, columns = shape
    nonzeros = int(density * rows * columns)
    if not 0 < density <= 1 or nonzeros == 0:
        raise ConfigError(f"density is {density}, expected in (0, 1] with at least one place in {rows} x {columns}")
    layers = math.prod(leading)
    places = jax.lax.map(
        lambda k: jnp.sort(jax.random.permutation(k, rows * columns)[:nonzeros]),
        jax.random.split(fold(key, "indices"), layers),
    )
    values = jax.random.uniform(fold(key, "values"), (*leading, nonzeros), dtype, -1, 1) * rows**-0.5
    sparse = Sparse(values, places.astype(jnp.int32).reshape(*leading, nonzeros), rows, columns)
    return add_low_rank(fold(key, "a"), sparse, rank, alpha, dtype)


def refactorize(params: Any) -> Any:
    """Every `Factored` and `LowRank` with balanced factors, `U sqrt(S)` and `sqrt(S) V^T`, of the same product.

    The product, its factor `scale`, bases and sparse parts stay as they are. Followed by an optimizer that starts
    anew and a learning rate that recovers (`jaxlm.optim.quick_recovery`), it is the restart of arXiv 2505.22922.

    Raises:
      ConfigError: a product is zero in some layer, as that of SLTrain is before the first step: both factors would
        be zero and never learn. Names the parameter. (Not found while tracing.)
    """

    def one(path: str, w: Any) -> Any:
        if not isinstance(w, (Factored, LowRank)):
            return w
        a, b = balanced_factors(w.a, w.b)
        if not isinstance(a, jax.core.Tracer) and not jnp.all(jnp.any(a != 0, axis=(-2, -1))):
            raise ConfigError(f"{path}: the product of its factors is zero, and stays so once they are balanced")
        return dataclasses.replace(w, a=a, b=b)

    return trees.map_named(one, params, is_leaf=lambda x: isinstance(x, Weight))


def merge_and_restart(key: jax.Array, params: Any) -> Any:
    """Every `LowRank` over a dense base with its product added to the base and fresh factors (`b` zero): ReLoRA.

    The function that the parameters compute stays the same.

    Source: ReLoRA (Lialin et al., 2023, arXiv 2307.05695).

    Raises:
      ConfigError: a base that is not a dense array cannot take the sum; names the parameter.
    """

    def one(path: str, w: Any) -> Any:
        if not isinstance(w, LowRank):
            return w
        if isinstance(w.base, Weight):
            raise ConfigError(f"{path}: its base is {type(w.base).__name__}, expected a dense array to merge into")
        rank = w.a.shape[-1]
        return add_low_rank(fold(key, path), w.dense(), rank, w.scale * rank, w.a.dtype)

    return trees.map_named(one, params, is_leaf=lambda x: isinstance(x, Weight))


def _check_rank(shape: tuple[int, ...], rank: int) -> None:
    if not 1 <= rank <= min(shape[-2:]):
        raise ConfigError(f"rank is {rank}, expected 1 to {min(shape[-2:])} for a kernel of {shape[-2]} x {shape[-1]}")
