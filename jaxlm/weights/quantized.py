"""Kernels in 4 to 8 bits a weight with a scale for each block of them: GGUF's formats, and plain int8 and int4.

Weights of one block lie next to each other along one axis of the matrix: the input axis of a kernel, the features of
an embedding. How codes are packed, and the products, are `pallas_kernels.quantized_matmul`'s.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError
from jaxlm.weights.base import Weight
from pallas_kernels import quantized_matmul as kernels
from pallas_kernels.quantized_matmul import BITS, KernelError

__all__ = ["BITS", "Quantized", "pack"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(Weight):
    """A matrix `(..., in, out)` in blocks along `axis`; it is unpacked inside the products, a matrix or less at a time.

    A weight is `scale * (code - offset) + minimum`, scale and minimum being those of its block; in formats with two
    levels they are small integers times a float16 that a superblock of blocks shares. Where `K` is the size of the
    blocked axis, each array has the matrix's shape except for that axis:

    - `codes`: int8 of size `K` for 8 bits; otherwise uint8 of size `K/2`, the low four bits of two codes a byte;
    - `high`: uint8, what 5 and 6 bits have beyond four, of size `K/8` and `K/4`;
    - `scale`, `minimum`: one a block; floats, or integers if there are
    - `super_scale`, `super_minimum`: one a superblock.

    `dtype` is that of what it stands for; unpacking computes in float32. `activation_bits=8` has `matmul` quantize each
    row of its input too (W8A8). `names` are the logical axes of the matrix's last two: on a mesh of several devices
    kernels need to know them, and without them products are XLA's. Products pass gradients to the activations alone,
    and keep nothing but the packed arrays for that; to differentiate otherwise, use `dense()`, which is also the
    reference that the products are tested against.
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
    activation_bits: int | None = dataclasses.field(default=None, metadata={"static": True})
    names: tuple[str | None, str | None] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] *= 1 if self.bits == 8 else 2
        return tuple(shape)

    def dense(self) -> Float[Array, "*batch in out"]:
        return kernels.dequantize(kernels.Packed(*self._arrays().values(), *self._format().values(), self.dtype))

    def matmul(self, x: Array, dtype: Any = None) -> Array:
        return self._product(x, dtype, transposed=False)

    def matmul_transposed(self, x: Array, dtype: Any = None) -> Array:
        return self._product(x, dtype, transposed=True)

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

    def _product(self, x: Array, dtype: Any, transposed: bool) -> Array:
        return kernels.quantized_matmul(
            x,
            **self._arrays(),
            **self._format(),
            transposed=transposed,
            weight_dtype=self.dtype,
            operand_dtype=dtype,
            activation_bits=None if transposed else self.activation_bits,
            shards=self._shards(x.ndim),
        )

    def _arrays(self) -> dict[str, Array | None]:
        return {name: getattr(self, name) for name in ("codes", "scale", "high", *_PER_BLOCK[1:])}

    def _format(self) -> dict[str, int]:
        return {"bits": self.bits, "offset": self.offset, "axis": self.axis}

    def _shards(self, ndim: int) -> kernels.Shards | None:
        if self.names is None or ndim != 3:
            return None
        rows = sharding.mesh_axes("batch", "length")
        # Rows come first: over the axes that divide them too (fsdp) the matrix is gathered, packed.
        taken = {name for part in rows for name in part}
        parts = [tuple(a for a in part if a not in taken) or None for part in sharding.mesh_axes(*self.names)]
        return kernels.Shards(tuple(part or None for part in rows), parts[self.axis], parts[-3 - self.axis])


_PER_BLOCK = ("scale", "minimum", "super_scale", "super_minimum")


def pack(codes: np.ndarray, bits: int, block: int, axis: int = -2) -> tuple[np.ndarray, np.ndarray | None]:
    """`(codes, high)` as `Quantized` stores them, from one whole number a weight, in blocks of `block` along `axis`.

    Codes count from 0 for less than 8 bits; for 8 they are int8 and stay as they are. `ConfigError` for other bits
    or a block that cannot be packed.
    """
    try:
        return kernels.pack(codes, bits, block, axis)
    except KernelError as error:
        raise ConfigError(str(error)) from None
