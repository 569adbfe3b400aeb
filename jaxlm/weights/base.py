"""The interface between layers and whatever holds their weights.

A kernel leaf is a dense array or a `Weight`: a pytree that stands for a matrix of shape `(..., in, out)` without
being one (low-rank, quantized, sparse). Layers call the functions of this module on either and do not know which.
Every array inside a `Weight` carries the same leading axes (layers, experts), so weights can be scanned and sharded
like arrays, and no static field may depend on them.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core import sharding, trees
from jaxlm.core.errors import ConfigError, nearest


class Weight:
    """Base class of weights that are not dense arrays. A subclass is a frozen dataclass registered as a pytree.

    It must have `shape`, `dtype` (of what it stands for) and `dense()`; the products have defaults that go through
    `dense()`, so overriding them is a matter of speed and memory alone.
    """

    shape: tuple[int, ...]
    dtype: Any

    def dense(self) -> Float[Array, "*batch in out"]:
        """The matrix (or stack of matrices) that this stands for."""
        raise NotImplementedError(f"{type(self).__name__}.dense")

    def matmul(self, x: Float[Array, "*n in"], dtype: Any = None) -> Float[Array, "*n out"]:
        return matmul(x, self.dense(), dtype=dtype)

    def matmul_transposed(self, x: Float[Array, "*n out"], dtype: Any = None) -> Float[Array, "*n in"]:
        return matmul_transposed(x, self.dense(), dtype=dtype)

    def take(self, ids: Int[Array, "*n"]) -> Float[Array, "*n out"]:
        return take(self.dense(), ids)

    def grouped_matmul(self, x: Float[Array, "n in"], sizes: Int[Array, "groups"], dtype: Any = None):
        return grouped_matmul(x, self.dense(), sizes, dtype=dtype)

    def child_axes(self, axes: tuple) -> Any:
        """A pytree of this class whose leaves are the logical axes of its arrays, given those of the whole."""
        raise NotImplementedError(f"{type(self).__name__}.child_axes")


class OverBase(Weight):
    """Base class of weights that do something to another kernel, `base`, and have its shape and dtype."""

    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype


def matmul(x: Float[Array, "*n in"], w: Any, *, dtype: Any = None) -> Float[Array, "*n out"]:
    """`x @ w` for a kernel `w` of shape `(in, out)`; the result has the dtype of `x`.

    `dtype` is the format in which the operands are multiplied (by default that of `x`); sums are float32.
    """
    return w.matmul(x, dtype) if isinstance(w, Weight) else _dot(x, w, dtype, transposed=False)


def matmul_transposed(x: Float[Array, "*n out"], w: Any, *, dtype: Any = None) -> Float[Array, "*n in"]:
    """`x @ w.T`: the output projection of a tied embedding `(vocab, embed)`."""
    return w.matmul_transposed(x, dtype) if isinstance(w, Weight) else _dot(x, w, dtype, transposed=True)


def take(w: Any, ids: Int[Array, "*n"]) -> Float[Array, "*n out"]:
    """The rows `w[ids]` of an embedding `(vocab, embed)`."""
    return w.take(ids) if isinstance(w, Weight) else jnp.take(w, ids, axis=0, mode="clip")


def grouped_matmul(x: Float[Array, "n in"], w: Any, sizes: Int[Array, "groups"], *, dtype: Any = None):
    """Each row of `x` times the kernel of its group: the first `sizes[0]` rows times `w[0]`, and so on.

    `w` is `(groups, in, out)`; the result `(n, out)` has the dtype of `x`.
    """
    if isinstance(w, Weight):
        return w.grouped_matmul(x, sizes, dtype)
    dtype = dtype or x.dtype
    y = jax.lax.ragged_dot(x.astype(dtype), w.astype(dtype), sizes, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def dense(w: Any) -> Float[Array, "*batch in out"]:
    """The dense array that a kernel stands for."""
    return w.dense() if isinstance(w, Weight) else w


def nbytes(w: Any) -> int:
    """The bytes that a kernel takes as it is stored."""
    return trees.num_bytes(w)


def child_axes(w: Any, axes: tuple) -> Any:
    """The logical axes of a kernel's arrays: `axes` itself for a dense one."""
    return w.child_axes(axes) if isinstance(w, Weight) else axes


def check_kernels(params: Any, kernels: Collection[str]) -> None:
    """Raises `ConfigError` for the path of a kernel that the parameters do not have."""
    paths = [path for path, _ in trees.named_leaves(params, is_leaf=lambda x: isinstance(x, Weight))]
    if missing := set(kernels) - set(paths):
        raise ConfigError(f"no kernel '{min(missing)}': {nearest(min(missing), paths)}")


def _dot(x: Array, w: Array, dtype: Any, transposed: bool) -> Array:
    dtype = jnp.dtype(dtype or x.dtype)
    # XLA's CPU backend runs a weight gradient with two contracted batch axes several times slower than the
    # flattened product. With the length axis sharded, flattening would cost an all-gather instead.
    flatten = x.ndim > 2 and sharding.platform() == "cpu" and sharding.axis_size("sequence") == 1
    rows = x.reshape(-1, x.shape[-1]) if flatten else x
    contract = (((rows.ndim - 1,), (1 if transposed else 0,)), ((), ()))
    y = jax.lax.dot_general(rows.astype(dtype), w.astype(dtype), contract, preferred_element_type=_sum_dtype(x.dtype))
    y = y.astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1]) if flatten else y


def _sum_dtype(out: Any) -> Any:
    # On accelerators products of bfloat16 accumulate in float32 whatever the output format is.
    return out if jnp.dtype(out).itemsize < 4 and sharding.platform() != "cpu" else jnp.promote_types(out, jnp.float32)
