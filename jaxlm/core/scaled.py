"""Matrices in few bits: a number format, and scales that the entries of a block share.

    q = Quantizer("e4m3", block=(1, 128))                # activations of DeepSeek-V3
    s = quantize(x, q)                                   # s.values on the format's grid, s.scale one a block
    x_again = dequantize(s, q)

A `Quantizer` says this of one operand of a product, a matrix with an axis that the product sums over and one that it
does not. The same policy then serves all three products of a training step, whose summed axes differ.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.formats import Format, e8m0, floor_log2, number_format

SCALES = ("float32", "e8m0", "e4m3", "mean")
ROUNDINGS = ("nearest", "stochastic")

Block = tuple[int | None, int | None]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How one operand of a product is stored.

    `block`: the entries that share a scale, along the free and along the summed axis, `None` being a whole axis:
    `(None, None)` one scale a tensor, `(1, None)` one a token or output channel, `(32, 32)` a square, `(1, 32)` MX;
    `block=None` no scale at all. Axes that a block does not divide are filled up with zeros.

    `scale`: `float32` (the largest magnitude becomes the format's largest value), `e8m0` (a power of two, rounded
    down as MX does, so that the largest entries may saturate), `e4m3` (NVFP4: a float32 scale for the tensor, too) or
    `mean` (the mean magnitude becomes 1: BitNet b1.58's ternary weights).
    `shrink`: a factor before rounding, taken back in the product: at 3/4 nothing saturates under `e8m0`, so that
    rounding at random is unbiased. `history`: 0 to scale by this step's largest magnitude, else by the largest of so
    many steps before (delayed scaling).
    """

    format: str = "float32"
    block: Block | None = (None, None)
    scale: str = "float32"
    rounding: str = "nearest"
    shrink: float = 1.0
    history: int = 0

    def __post_init__(self):
        number_format(self.format)
        for name, value, valid in (("scale", self.scale, SCALES), ("rounding", self.rounding, ROUNDINGS)):
            if value not in valid:
                raise ConfigError(f"{name} of a quantizer is '{value}': {nearest(value, valid)}")
        if self.block is not None and any(size is not None and size < 1 for size in self.block):
            raise ConfigError(f"block of a quantizer is {self.block}, expected sizes from 1, or None for a whole axis")
        if self.block is None and self.scale != "float32":
            raise ConfigError(f"a quantizer without blocks has no scale, but its scale is '{self.scale}'")
        if self.block is None and self.shrink != 1:
            raise ConfigError(f"a quantizer without blocks scales nothing, but its shrink is {self.shrink}")
        if not 0 < self.shrink <= 1:
            raise ConfigError(f"shrink of a quantizer is {self.shrink}, expected in (0, 1]")
        if self.history < 0 or (self.history and (self.block != (None, None) or self.scale != "float32")):
            raise ConfigError(
                f"history of a quantizer is {self.history}: delayed scaling has one float32 scale a tensor"
            )

    @property
    def is_plain(self) -> bool:
        """Whether operands stay as they are."""
        return self.format == "float32"

    @property
    def number_format(self) -> Format:
        return number_format(self.format)


PLAIN = Quantizer(block=None)
"""An operand that stays as it is."""


class Scaled(NamedTuple):
    """`values`, float32 in the matrix's shape, each one of the format's; the matrix is `values * scale * whole`.

    `scale`: one a block (an axis has size 1 where a block takes all of it). `whole`: what all of them share.
    """

    values: Float[Array, "rows columns"]
    scale: Float[Array, "row_blocks column_blocks"]
    whole: Float[Array, ""]


def quantize(
    x: Float[Array, "rows columns"],
    q: Quantizer,
    *,
    summed: int = 1,
    key: jax.Array | None = None,
    scale: Float[Array, ""] | None = None,
) -> Scaled:
    """A matrix in blocks. `summed`: the axis that the product sums over.

    `scale` is used in place of one from `x` itself (delayed scaling). A block of zeros has scale 1.

    Raises:
      ConfigError: rounding at random without a key.
    """
    if q.rounding == "stochastic" and key is None:
        raise ConfigError(f"{q.format} with stochastic rounding needs a random key: give one, or round to nearest")
    key = key if q.rounding == "stochastic" else None
    x, form, one = x.astype(jnp.float32), q.number_format, jnp.ones((), jnp.float32)
    if q.block is None:
        return Scaled(form.round(x, key), one.reshape(1, 1), one)
    if scale is not None:
        return Scaled(form.round(x / scale * q.shrink, key), scale.reshape(1, 1), one / q.shrink)
    whole = one
    top = block_amax(x, q.block, summed) if q.scale != "mean" else _mean_magnitude(x, q.block, summed)
    match q.scale:
        case "mean":
            scale = top + 1e-5
        case "float32":
            scale = jnp.where(top == 0, 1.0, top / form.largest)
        case "e8m0":
            scale = jnp.where(top == 0, 1.0, e8m0(floor_log2(top) - form.exponent))
        case _:
            inner = number_format("e4m3")
            whole = jnp.where(jnp.max(top) == 0, 1.0, jnp.max(top) / (form.largest * inner.largest))
            scale = inner.round(top / form.largest / whole)
            scale = jnp.where(scale == 0, 1.0, scale)
    spread = spread_blocks(scale, x.shape, q.block, summed) * whole
    return Scaled(form.round(x / spread * q.shrink, key), scale, whole / q.shrink)


def dequantize(s: Scaled, q: Quantizer, *, summed: int = 1) -> Float[Array, "rows columns"]:
    """The matrix that `quantize` stored, float32."""
    if q.block is None:
        return s.values
    return s.values * spread_blocks(s.scale, s.values.shape, q.block, summed) * s.whole


def fake_quantize(x: Float[Array, "rows columns"], q: Quantizer, **options) -> Float[Array, "rows columns"]:
    """`dequantize(quantize(x))`."""
    return dequantize(quantize(x, q, **options), q, summed=options.get("summed", 1))


def block_amax(x: Float[Array, "rows columns"], block: Block, summed: int = 1) -> Float[Array, "a b"]:
    """The largest magnitude in each block."""
    sizes = _sizes(x.shape, block, summed)
    x = jnp.abs(x)
    for axis, size in enumerate(sizes):
        if size == x.shape[axis]:
            x = jnp.max(x, axis=axis, keepdims=True)
        elif size > 1:
            x = cut(x, axis, size)
            x = jnp.max(x, axis=axis + 1)
    return x


def _mean_magnitude(x: Array, block: Block, summed: int) -> Array:
    sizes = _sizes(x.shape, block, summed)
    if any(1 < size < n for size, n in zip(sizes, x.shape, strict=True)):
        raise ConfigError(f"the scale 'mean' is of whole axes or single entries, not of blocks of {block}")
    axes = tuple(axis for axis, size in enumerate(sizes) if size == x.shape[axis])
    return jnp.mean(jnp.abs(x), axis=axes, keepdims=True)


def spread_blocks(scale: Array, shape: tuple[int, int], block: Block, summed: int = 1) -> Float[Array, "a b"]:
    """Each block's scale for each of its entries; an axis that one block takes whole stays of size 1."""
    for axis, size in enumerate(_sizes(shape, block, summed)):
        if 1 < size < shape[axis]:
            scale = jnp.repeat(scale, size, axis=axis)
            scale = jax.lax.slice_in_dim(scale, 0, shape[axis], axis=axis)
    return scale


def cut(x: Array, axis: int, size: int) -> Array:
    """An axis in two, `(blocks, size)`, with zeros after its end."""
    missing = -x.shape[axis] % size
    if missing:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _sizes(shape: tuple[int, int], block: Block, summed: int) -> tuple[int, int]:
    ordered = block if summed == 1 else block[::-1]
    return tuple(min(size or n, n) for size, n in zip(ordered, shape, strict=True))


def mx(element: str, *, size: int = 32, rounding: str = "nearest", shrink: float = 1.0) -> Quantizer:
    """The OCP microscaling format with these elements, `e4m3` for MXFP8 say: blocks of 32 along the summed axis."""
    return Quantizer(element, (1, size), "e8m0", rounding, shrink)


NVFP4 = Quantizer("e2m1", (1, 16), "e4m3")
"""Blocks of 16 E2M1 numbers with an E4M3 scale, and a float32 scale for the tensor."""
