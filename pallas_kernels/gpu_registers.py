"""How the Hopper kernels touch registers: layouts and products of warp groups, and the same for Pallas' interpreter.

Pallas' GPU interpreter follows barriers and copies but knows neither register layouts nor all forms of wgmma; there
products are plain ones. Everything else of the kernels is the same in both.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Registers:
    """On the chip: arrays in the layout of wgmma's results, `[rows, columns]`, and reductions of it."""

    def zeros(self, shape: tuple[int, int]):
        return plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), plgpu.Layout.WGMMA)

    def rows(self, count: int, value: float):
        """One number for each row."""
        return plgpu.layout_cast(jnp.full((count,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

    def load(self, ref, axis: int):
        """A vector, to be broadcast along `axis`."""
        return plgpu.load(ref, (), layout=plgpu.Layout.WGMMA.reduce(axis))

    def iota(self, shape: tuple[int, int], axis: int):
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def product(self, a, b, shape: tuple[int, int]):
        """`a b^T` of two blocks in shared memory."""

        def compute(sums):
            plgpu.wgmma(sums, a, plgpu.transpose_ref(b, (1, 0)))
            return sums[...]

        return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))

    def product_of_transposed(self, pairs, shape: tuple[int, int]):
        """The sum of `a^T b^T` over pairs of blocks in shared memory."""

        def compute(sums):
            for a, b in pairs:
                plgpu.wgmma(sums, plgpu.transpose_ref(a, (1, 0)), plgpu.transpose_ref(b, (1, 0)))
            return sums[...]

        return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))

    def block(self, ref):
        """A block of 64 rows as it lies in shared memory, without swizzling."""
        return plgpu.load(ref, (), layout=plgpu.Layout.WGMMA, optimized=False)

    def add_product(self, sums, a, b):
        """`sums + a b`, `a` in registers and `b` in shared memory."""
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(sums))


class Interpreted(Registers):
    """The same in the interpreter."""

    @staticmethod
    def params():
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # has no public name yet

        return InterpretGPUParams()

    def zeros(self, shape):
        return jnp.zeros(shape, jnp.float32)

    def rows(self, count, value):
        return jnp.full((count,), value, jnp.float32)

    def load(self, ref, axis):
        return ref[...]

    def iota(self, shape, axis):
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def product(self, a, b, shape):
        return lax.dot_general(a[...], b[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)

    def product_of_transposed(self, pairs, shape):
        contract = (((0,), (1,)), ((), ()))
        return sum(lax.dot_general(a[...], b[...], contract, preferred_element_type=jnp.float32) for a, b in pairs)

    def block(self, ref):
        return ref[...]

    def add_product(self, sums, a, b):
        return sums + lax.dot_general(a, b[...], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
