"""Kernels in 4 to 8 bits a weight with a scale for each block of them: GGUF's formats, and plain int8 and int4.

Weights of one block lie next to each other along one axis of the matrix: the input axis of a kernel, the features of
an embedding. A weight is `scale * (code - offset) + minimum`, scale and minimum being those of its block; in formats
with two levels they are small integers times a float16 that a superblock of blocks shares.

Codes are packed within each block by halves (for 4 bits; by quarters and eighths for what 6 and 5 bits have beyond
these): byte `i` holds codes `i` and `i + size/2`. Unpacking is then a shift and a mask broadcast over one new axis
that is not the last, never an interleave, and vectorizes along the output axis.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError
from jaxlm.weights import base as weights
from jaxlm.weights.base import Weight

BITS = (4, 5, 6, 8)
# Matrices with more elements are unpacked and multiplied a piece at a time, so that what is unpacked stays in cache
# (16 MB in float32) and a table of 262,144 tokens never becomes 671 MB.
_PIECE = 1 << 22


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(Weight):
    """A matrix `(..., in, out)` in blocks along `axis`; it is unpacked inside the products, a matrix or less at a time.

    Where `K` is the size of the blocked axis, each array has the matrix's shape except for that axis:

    - `codes`: int8 of size `K` for 8 bits; otherwise uint8 of size `K/2`, the low four bits of two codes a byte;
    - `high`: uint8, what 5 and 6 bits have beyond four, of size `K/8` and `K/4`;
    - `scale`, `minimum`: one a block; floats, or integers if there are
    - `super_scale`, `super_minimum`: one a superblock.

    `dtype` is that of what it stands for; unpacking computes in float32. Products pass gradients to the activations
    alone, and keep nothing but the packed arrays for that; to differentiate otherwise, use `dense()`, which is also
    the reference that the products are tested against.
    """

    codes: Int[Array, "*batch rows columns"]
    scale: Array
    high: UInt8[Array, "*batch rows columns"] | None = None
    minimum: Array | None = None
    super_scale: Array | None = None
    super_minimum: Array | None = None
    bits: int = dataclasses.field(default=8, metadata={"static": True})
    offset: int = dataclasses.field(default=0, metadata={"static": True})
    axis: int = dataclasses.field(default=-2, metadata={"static": True})
    dtype: Any = dataclasses.field(default=np.dtype("float32"), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] *= 1 if self.bits == 8 else 2
        return tuple(shape)

    def dense(self) -> Float[Array, "*batch in out"]:
        blocks = self.scale.shape[self.axis]
        codes = self._unpack(self.codes, 4, blocks) if self.bits < 8 else self._split(self.codes, blocks)
        if self.high is not None:
            codes = codes | (self._unpack(self.high, self.bits - 4, blocks) << 4)
        codes = codes.astype(jnp.float32) - self.offset if self.offset else codes.astype(jnp.float32)
        w = self._spread(self.scale, self.super_scale) * codes
        if self.minimum is not None:
            w = w + self._spread(self.minimum, self.super_minimum)
        return w.reshape(self.shape).astype(self.dtype)

    def matmul(self, x: Array, dtype: Any = None) -> Array:
        return _product(x, self, _name(dtype), False)

    def matmul_transposed(self, x: Array, dtype: Any = None) -> Array:
        return _product(x, self, _name(dtype), True)

    def take(self, ids: Array) -> Array:
        if self.axis != -1:
            return super().take(ids)
        # Rows hold whole blocks: they are gathered packed.
        rows = jax.tree.map(lambda x: jnp.take(x, ids, axis=0, mode="clip"), jax.lax.stop_gradient(self))
        return rows.dense()

    def child_axes(self, axes: tuple) -> "Quantized":
        # Scales are few, and a mesh axis rarely divides their number: they are whole along the blocked axis.
        few = list(axes)
        few[self.axis] = None
        names = {"codes": axes, "high": axes} | dict.fromkeys(_PER_BLOCK, tuple(few))
        return dataclasses.replace(self, **{k: v for k, v in names.items() if getattr(self, k) is not None})

    def _split(self, x: Array, blocks: int) -> Array:
        """The blocked axis in two: `(blocks, size of a block)`."""
        axis = x.ndim + self.axis
        return x.reshape(*x.shape[:axis], blocks, x.shape[axis] // blocks, *x.shape[axis + 1 :])

    def _unpack(self, packed: Array, bits: int, blocks: int) -> Array:
        parts = jnp.expand_dims(self._split(packed, blocks), self.axis - 1)
        axis = parts.ndim + self.axis
        shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
        shifts = jnp.expand_dims(shifts, tuple(i for i in range(parts.ndim) if i != axis - 1))
        codes = (parts >> shifts) & jnp.uint8((1 << bits) - 1)
        return codes.reshape(*codes.shape[: axis - 1], -1, *codes.shape[axis + 1 :])

    def _spread(self, each: Array, of_superblock: Array | None) -> Array:
        """What a block has, times what its superblock has, shaped to combine with split codes."""
        each = each.astype(jnp.float32)
        if of_superblock is not None:
            split = self._split(each, of_superblock.shape[self.axis])
            each = (jnp.expand_dims(of_superblock.astype(jnp.float32), self.axis) * split).reshape(each.shape)
        return jnp.expand_dims(each, self.axis)


_PER_BLOCK = ("scale", "minimum", "super_scale", "super_minimum")


def pack(codes: np.ndarray, bits: int, block: int, axis: int = -2) -> tuple[np.ndarray, np.ndarray | None]:
    """`(codes, high)` as `Quantized` stores them, from one whole number a weight, in blocks of `block` along `axis`.

    Codes count from 0 for less than 8 bits; for 8 they are int8 and stay as they are. `ConfigError` for other bits
    or a block that cannot be packed.
    """
    if bits not in BITS:
        raise ConfigError(f"quantization to {bits} bits, expected one of {BITS}")
    if codes.shape[axis] % block or (bits < 8 and block % {4: 2, 5: 8, 6: 4}[bits]):
        raise ConfigError(f"{codes.shape[axis]} codes of {bits} bits do not pack in blocks of {block}")
    if bits == 8:
        return codes.astype(np.int8, copy=False), None
    codes = codes.astype(np.uint8, copy=False)
    low = _pack_field(codes & 15, 4, block, axis)
    return low, None if bits == 4 else _pack_field(codes >> 4, bits - 4, block, axis)


def _pack_field(values: np.ndarray, bits: int, block: int, axis: int) -> np.ndarray:
    axis, parts = values.ndim + axis, 8 // bits
    head, tail = values.shape[:axis], values.shape[axis + 1 :]
    split = values.reshape(*head, -1, parts, block // parts, *tail)
    packed = np.zeros(split.shape[: axis + 1] + split.shape[axis + 2 :], np.uint8)
    for i in range(parts):
        packed |= split[(slice(None),) * (axis + 1) + (i,)] << np.uint8(bits * i)
    return packed.reshape(*head, -1, *tail)


def _name(dtype: Any) -> str | None:
    return None if dtype is None else jnp.dtype(dtype).name


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, w: Quantized, dtype: str | None, transposed: bool) -> Array:
    return _multiply(x, w, dtype, transposed)


def _product_forward(x: Array, w: Quantized, dtype: str | None, transposed: bool) -> tuple[Array, Quantized]:
    return _multiply(x, w, dtype, transposed), w


def _product_backward(dtype: str | None, transposed: bool, w: Quantized, dy: Array) -> tuple[Array, None]:
    return _multiply(dy, w, dtype, not transposed), None


_product.defvjp(_product_forward, _product_backward)


def _multiply(x: Array, w: Quantized, dtype: str | None, transposed: bool) -> Array:
    """`x @ w` or `x @ w.T` for a single matrix; a large one in pieces of its axis that is not blocked."""
    multiply = weights.matmul_transposed if transposed else weights.matmul
    free = -3 - w.axis
    size, blocked = w.shape[free], w.shape[w.axis]
    sharded = any(sharding.axis_size(name) > 1 for name in sharding.MESH_AXES)
    if size * blocked <= _PIECE or sharded:
        return multiply(x, w.dense(), dtype=dtype)
    piece = min(max(_PIECE // blocked // 128 * 128, 128), size)
    flat = x.reshape(-1, x.shape[-1])
    summed_over_pieces = (w.axis == -1) != transposed

    def add_piece(i: Array, y: Array) -> Array:
        # The last piece ends at the end, and so may begin in the one before.
        start = jnp.minimum(i * piece, size - piece)
        part = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, piece, a.ndim + free), w).dense()
        if not summed_over_pieces:
            return jax.lax.dynamic_update_slice_in_dim(y, multiply(flat, part, dtype=dtype), start, 1)
        columns = jax.lax.dynamic_slice_in_dim(flat, start, piece, 1).astype(y.dtype)
        new = (start + jnp.arange(piece) >= i * piece)[None, :]
        return y + multiply(jnp.where(new, columns, 0), part, dtype=dtype or x.dtype)

    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.zeros((flat.shape[0], blocked if summed_over_pieces else size), wide if summed_over_pieces else x.dtype)
    y = jax.lax.fori_loop(0, -(-size // piece), add_piece, y)
    return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])
