"""A kernel plus a product of two thin matrices (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.weights import base as weights
from jaxlm.weights.base import OverBase


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(OverBase):
    """`base + scale * a @ b`, without ever forming the sum.

    `base`: any kernel `(..., in, out)`; `a`: `(..., in, rank)`; `b`: `(..., rank, out)`. What is trained is the
    business of the partition (usually the leaves `a` and `b`); an untrained base costs no gradient.
    """

    base: Any
    a: Float[Array, "*batch in rank"]
    b: Float[Array, "*batch rank out"]
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def dense(self) -> Array:
        update = jnp.matmul(self.a, self.b, preferred_element_type=jnp.float32)
        base = weights.dense(self.base)
        return (base + self.scale * update).astype(base.dtype)

    def matmul(self, x: Array, dtype: Any = None) -> Array:
        thin = weights.matmul(x, self.a, dtype=dtype)
        return weights.matmul(x, self.base, dtype=dtype) + self.scale * weights.matmul(thin, self.b, dtype=dtype)

    def matmul_transposed(self, x: Array, dtype: Any = None) -> Array:
        thin = weights.matmul_transposed(x, self.b, dtype=dtype)
        update = weights.matmul_transposed(thin, self.a, dtype=dtype)
        return weights.matmul_transposed(x, self.base, dtype=dtype) + self.scale * update

    def take(self, ids: Array) -> Array:
        rows = weights.take(self.base, ids)
        return rows + self.scale * weights.matmul(weights.take(self.a, ids), self.b).astype(rows.dtype)

    def grouped_matmul(self, x: Array, sizes: Array, dtype: Any = None) -> Array:
        thin = weights.grouped_matmul(x, self.a, sizes, dtype=dtype)
        update = weights.grouped_matmul(thin, self.b, sizes, dtype=dtype)
        return weights.grouped_matmul(x, self.base, sizes, dtype=dtype) + self.scale * update

    def child_axes(self, axes: tuple) -> "LowRank":
        *leading, rows, columns = axes
        return LowRank(
            weights.child_axes(self.base, axes), (*leading, rows, "rank"), (*leading, "rank", columns), self.scale
        )


def add_low_rank(key: jax.Array, w: Any, rank: int, alpha: float | None = None, dtype: Any = jnp.float32) -> LowRank:
    """`LowRank` over kernel `w`, with `a` drawn as for a fresh linear layer and `b` zero: at first nothing changes.

    `scale` is `alpha / rank` (`alpha` defaults to `rank`). `a` is drawn from `U(-1/sqrt(in), 1/sqrt(in))`, what the
    published implementation's Kaiming initialization with `a=sqrt(5)` amounts to.
    """
    *leading, rows, columns = w.shape
    bound = rows**-0.5
    a = jax.random.uniform(key, (*leading, rows, rank), dtype, -bound, bound)
    b = jnp.zeros((*leading, rank, columns), dtype)
    return LowRank(w, a, b, 1.0 if alpha is None else alpha / rank)
