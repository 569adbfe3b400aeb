"""How a quantized matrix is stored: blocks of codes along one axis, with a scale (and a minimum) for each block.

A weight is `scale * (code - offset) + minimum`. Codes of fewer than 8 bits are packed within each block by halves (for
4 bits; by quarters and eighths for what 6 and 5 bits have beyond these): byte `i` holds codes `i` and `i + size/2`.
Unpacking is then a shift and a mask broadcast over one new axis that is not the last, never an interleave, and
vectorizes along the output axis. Blocks of 32 hold what GGUF's Q4_0 (offset 8), Q4_1 (minimum) and Q8_0 hold.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.target import KernelError

Array = jax.Array

BITS = (4, 5, 6, 8)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A matrix `(..., in, out)` in blocks along `axis`, -2 (kernels) or -1 (rows of an embedding).

    Where `K` is the size of the blocked axis, each array has the matrix's shape except for that axis:

    - `codes`: int8 of size `K` for 8 bits; otherwise uint8 of size `K/2`, the low four bits of two codes a byte;
    - `high`: uint8, what 5 and 6 bits have beyond four, of size `K/8` and `K/4`;
    - `scale`, `minimum`: one a block; floats, or integers if there are
    - `super_scale`, `super_minimum`: one a superblock, which multiply them.

    `dtype` is that of what it stands for; unpacking computes in float32.
    """

    codes: Array
    scale: Array
    high: Array | None = None
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

    @property
    def blocks(self) -> int:
        """Blocks along `axis`."""
        return self.scale.shape[self.axis]

    @property
    def group(self) -> int:
        """Weights of a block."""
        return self.shape[self.axis] // self.blocks


def dequantize(w: Packed) -> Array:
    """The matrix `(..., in, out)` that `w` stands for."""
    codes = _unpack(w, w.codes, 4) if w.bits < 8 else _split(w, w.codes, w.blocks)
    if w.high is not None:
        codes = codes | (_unpack(w, w.high, w.bits - 4) << 4)
    codes = codes.astype(jnp.float32) - w.offset if w.offset else codes.astype(jnp.float32)
    full = _spread(w, w.scale, w.super_scale) * codes
    if w.minimum is not None:
        full = full + _spread(w, w.minimum, w.super_minimum)
    return full.reshape(w.shape).astype(w.dtype)


def pack(codes: np.ndarray, bits: int, block: int, axis: int = -2) -> tuple[np.ndarray, np.ndarray | None]:
    """`(codes, high)` as `Packed` stores them, from one whole number a weight, in blocks of `block` along `axis`.

    Codes count from 0 for less than 8 bits; for 8 they are int8 and stay as they are. `KernelError` for other bits
    or a block that cannot be packed.
    """
    if bits not in BITS:
        raise KernelError(f"quantization to {bits} bits, expected one of {BITS}")
    if codes.shape[axis] % block or (bits < 8 and block % {4: 2, 5: 8, 6: 4}[bits]):
        raise KernelError(f"{codes.shape[axis]} codes of {bits} bits do not pack in blocks of {block}")
    if bits == 8:
        return codes.astype(np.int8, copy=False), None
    codes = codes.astype(np.uint8, copy=False)
    low = _pack_field(codes & 15, 4, block, axis)
    return low, None if bits == 4 else _pack_field(codes >> 4, bits - 4, block, axis)


def check(w: Packed) -> None:
    """Raises `KernelError`, naming argument and shapes, when the arrays of `w` do not fit together."""
    if w.bits not in BITS:
        raise KernelError(f"bits is {w.bits}, expected one of {BITS}")
    if w.axis not in (-2, -1):
        raise KernelError(f"axis is {w.axis}, expected -2 (blocks along the input) or -1")
    expected = jnp.int8 if w.bits == 8 else jnp.uint8
    if w.codes.dtype != expected:
        raise KernelError(f"codes of {w.bits} bits are {w.codes.dtype}, expected {jnp.dtype(expected)}")
    size, free = w.shape[w.axis], -3 - w.axis
    parts = {"scale": w.scale, "minimum": w.minimum, "high": w.high}
    parts |= {"super_scale": w.super_scale, "super_minimum": w.super_minimum}
    for name, array in parts.items():
        if array is None:
            continue
        if array.ndim != w.codes.ndim or array.shape[free] != w.codes.shape[free]:
            raise KernelError(
                f"{name} has shape {tuple(array.shape)}, expected that of codes {tuple(w.codes.shape)} but for axis "
                f"{w.axis}"
            )
    blocks = w.blocks
    if blocks == 0 or size % blocks or (w.bits < 8 and (size // blocks) % 2):
        raise KernelError(
            f"scale has {blocks} blocks along axis {w.axis}, which do not divide its {size} weights"
            + (" into blocks of an even number" if w.bits < 8 else "")
        )
    if w.minimum is not None and w.minimum.shape != w.scale.shape:
        raise KernelError(f"minimum has shape {tuple(w.minimum.shape)}, scale {tuple(w.scale.shape)}")
    if (w.bits in (5, 6)) != (w.high is not None):
        raise KernelError(f"{w.bits} bits {'need' if w.high is None else 'have no'} 'high'")
    if w.high is not None and w.high.shape[w.axis] * 8 != size * (w.bits - 4):
        raise KernelError(f"high has shape {tuple(w.high.shape)}, expected {size * (w.bits - 4) // 8} on axis {w.axis}")
    for name in ("super_scale", "super_minimum"):
        array = parts[name]
        if array is not None and (array.shape[w.axis] == 0 or blocks % array.shape[w.axis]):
            raise KernelError(f"{name} has {array.shape[w.axis]} superblocks, which do not divide {blocks} blocks")


def _pack_field(values: np.ndarray, bits: int, block: int, axis: int) -> np.ndarray:
    axis, parts = values.ndim + axis, 8 // bits
    head, tail = values.shape[:axis], values.shape[axis + 1 :]
    split = values.reshape(*head, -1, parts, block // parts, *tail)
    packed = np.zeros(split.shape[: axis + 1] + split.shape[axis + 2 :], np.uint8)
    for i in range(parts):
        packed |= split[(slice(None),) * (axis + 1) + (i,)] << np.uint8(bits * i)
    return packed.reshape(*head, -1, *tail)


def _split(w: Packed, x: Array, blocks: int) -> Array:
    """The blocked axis in two: `(blocks, size of a block)`."""
    axis = x.ndim + w.axis
    return x.reshape(*x.shape[:axis], blocks, x.shape[axis] // blocks, *x.shape[axis + 1 :])


def _unpack(w: Packed, packed: Array, bits: int) -> Array:
    parts = jnp.expand_dims(_split(w, packed, w.blocks), w.axis - 1)
    axis = parts.ndim + w.axis
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    shifts = jnp.expand_dims(shifts, tuple(i for i in range(parts.ndim) if i != axis - 1))
    codes = (parts >> shifts) & jnp.uint8((1 << bits) - 1)
    return codes.reshape(*codes.shape[: axis - 1], -1, *codes.shape[axis + 1 :])


def _spread(w: Packed, each: Array, of_superblock: Array | None) -> Array:
    """What a block has, times what its superblock has, shaped to combine with split codes."""
    each = each.astype(jnp.float32)
    if of_superblock is not None:
        split = _split(w, each, of_superblock.shape[w.axis])
        each = (jnp.expand_dims(of_superblock.astype(jnp.float32), w.axis) * split).reshape(each.shape)
    return jnp.expand_dims(each, w.axis)
