"""The product as a Hopper kernel (Mosaic GPU): codes go through memory packed and become operands in shared memory.

What is computed is the transposed product, so that the matrix has the 64 rows of a warp group's `wgmma` and a few
activations need few columns. A warp group takes 64 columns of the matrix: it unpacks 64 stored rows of their codes to
whole numbers in the operands' format (exact), which lie in shared memory for the product, and multiplies each block's
sums by its scale in float32. One more warp group fetches codes, scales and activations into a ring of buffers. As in
the TPU kernels the two halves of a 4-bit block meet their own columns of the activations. The summed axis is cut into
parts for as many thread blocks as the chip runs at once; their sums are added outside. Minimums are a small product of
their own, with each block's sum of activations.

Nobody has run it on a chip yet: it agrees with the reference in Pallas' GPU interpreter and compiles for an H200.
`implementation="auto"` therefore does not choose it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_registers import Interpreted, Registers
from pallas_kernels.quantized_matmul.layout import Packed

Array = jax.Array

SHARED_MEMORY_BYTES = 232_448
"""What a thread block may use on H100 and H200."""

COLUMNS = 64
"""Columns of the matrix that a warp group takes: the rows of its `wgmma`."""

_THREAD_BLOCKS = 132


@dataclasses.dataclass(frozen=True)
class GpuTiles:
    """`groups` warp groups share `rows` activations; `depth` stored rows of codes at a time, in `stages` buffers.

    `parts` of the summed axis, by default as many as give every multiprocessor a thread block.
    """

    rows: int
    groups: int = 2
    depth: int = 64
    stages: int = 4
    parts: int | None = None


TABLE = (GpuTiles(8), GpuTiles(16), GpuTiles(32), GpuTiles(64), GpuTiles(128, stages=3))
"""By number of activations at most; beyond the last, several tiles of them."""


def unsupported(w: Packed, dtype: jnp.dtype, transposed: bool, interpret: bool = False) -> str | None:
    """Why this kernel cannot do a product (a phrase for an error), or `None`."""
    if w.bits not in (4, 8):
        return f"codes of {w.bits} bits, expected 4 or 8"
    if w.super_scale is not None or w.super_minimum is not None:
        return "scales that superblocks share"
    if w.axis != -2 or transposed:
        return "blocks that are not along the summed axis (gradients and embeddings)"
    if not interpret and jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"operands in {jnp.dtype(dtype)} (the kernel takes bfloat16 and float16)"
    tiles = TABLE[0]
    stored, columns = w.codes.shape
    group = stored // w.blocks
    if stored % tiles.depth or columns % COLUMNS:
        return f"{stored} stored rows by {columns} columns, expected multiples of {tiles.depth} and {COLUMNS}"
    if w.blocks > 1 and group % tiles.depth and group not in (16, 32):
        return f"blocks of {w.group} weights ({group} stored rows), expected 16, 32 or a multiple of {tiles.depth}"
    return None


def choose_tiles(count: int, columns: int) -> GpuTiles:
    """The table's tiles for so many activations, with one warp group where two do not divide the columns."""
    found = next((tiles for tiles in TABLE if count <= tiles.rows), TABLE[-1])
    return found if columns % (COLUMNS * found.groups) == 0 else dataclasses.replace(found, groups=1)


def shared_memory_bytes(tiles: GpuTiles, w: Packed, itemsize: int = 2) -> int:
    """Bytes of shared memory of a thread block."""
    halves, wide = 8 // w.bits, COLUMNS * tiles.groups
    ring = tiles.depth * wide + halves * tiles.rows * tiles.depth * itemsize
    ring += max(1, tiles.depth * w.blocks // w.codes.shape[0]) * wide * w.scale.dtype.itemsize
    own = halves * tiles.depth * wide * itemsize + 4 * tiles.rows * wide
    # Five buffers aligned to 1024, and barriers of 8 bytes.
    return tiles.stages * ring + own + 6 * 1024


def matmul(x: Array, w: Packed, *, dtype: jnp.dtype, tiles: GpuTiles | None = None, interpret: bool = False) -> Array:
    """`x @ w` for one matrix, as `reference.matmul`. `unsupported` must have answered `None`."""
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    y = _product(flat, w, tiles or choose_tiles(flat.shape[0], w.shape[1]), interpret)
    if w.minimum is not None:
        sums = jnp.sum(flat.reshape(flat.shape[0], w.blocks, -1), axis=-1, dtype=jnp.float32)
        y = y + jnp.dot(sums, w.minimum.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


def _product(x: Array, w: Packed, tiles: GpuTiles, interpret: bool) -> Array:
    """Without minimums: float32 `[count, columns]`."""
    count, halves = x.shape[0], 8 // w.bits
    stored, columns = w.codes.shape
    group = stored // w.blocks
    # Stored rows with one scale, and scales of a step; of one block the scale waits for the end.
    late, inner = w.blocks == 1, min(group, tiles.depth)
    scales = tiles.depth // inner
    if halves == 2:
        x = jnp.moveaxis(x.reshape(count, w.blocks, 2, -1), 2, 0)
    x = x.reshape(halves, count, stored)
    row_tiles, column_tiles = -(-count // tiles.rows), columns // (COLUMNS * tiles.groups)
    x = jnp.pad(x, ((0, 0), (0, row_tiles * tiles.rows - count), (0, 0)))
    steps = stored // tiles.depth
    parts = tiles.parts or _parts(steps, row_tiles * column_tiles)
    steps //= parts
    registers = Interpreted() if interpret else Registers()
    # A block's rows are cut out of these buffers: they may not share a stretch that is swizzled.
    swizzled = _transforms(inner * x.dtype.itemsize, x.dtype)

    def kernel(x_gmem, codes_gmem, scale_gmem, out_gmem, x_smem, codes_smem, scale_smem, operands, result, *barriers):
        ready, consumed, last = barriers
        wg = lax.axis_index("wg")
        column = lax.axis_index("columns") * (COLUMNS * tiles.groups)
        row, part = lax.axis_index("rows") * tiles.rows, lax.axis_index("parts")

        def spread(ref, shape):
            """One number for each column of the matrix, a row here."""
            return lax.broadcast_in_dim(registers.load(ref, 1).astype(jnp.float32), shape, [0])

        @pl.when(wg < tiles.groups)
        def _():
            mine = pl.ds(wg * COLUMNS, COLUMNS)

            def step(n, sums):
                slot = lax.rem(n, jnp.int32(tiles.stages))
                plgpu.barrier_wait(ready.at[slot])
                codes = registers.block(codes_smem.at[slot, :, mine]).astype(jnp.int32)
                for half, each in enumerate([codes] if halves == 1 else [codes & 15, codes >> 4]):
                    operands[wg, half] = (each - w.offset).astype(jnp.float32).astype(operands.dtype)
                plgpu.commit_smem()
                for i in range(scales):
                    taken = pl.ds(i * inner, inner)
                    pairs = [(operands.at[wg, h, taken], x_smem.at[slot, h, :, taken]) for h in range(halves)]
                    found = registers.product_of_transposed(pairs, (COLUMNS, tiles.rows))
                    sums = sums + (found if late else found * spread(scale_smem.at[slot, i, mine], found.shape))
                plgpu.barrier_arrive(consumed.at[slot])
                return sums

            sums = lax.fori_loop(0, steps, step, registers.zeros((COLUMNS, tiles.rows)))
            if late:
                plgpu.barrier_wait(last.at[0])
                sums = sums * spread(scale_smem.at[0, 0, mine], sums.shape)
            result[wg] = sums
            plgpu.commit_smem()
            target = out_gmem.at[part, pl.ds(column + wg * COLUMNS, COLUMNS), pl.ds(row, tiles.rows)]
            plgpu.copy_smem_to_gmem(result.at[wg], target)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == tiles.groups)
        def _():
            wide = pl.ds(column, COLUMNS * tiles.groups)
            if late:
                plgpu.copy_gmem_to_smem(scale_gmem.at[pl.ds(0, 1), wide], scale_smem.at[0], last.at[0])

            def fetch(n, _):
                slot = lax.rem(n, jnp.int32(tiles.stages))

                @pl.when(n >= tiles.stages)
                def _():
                    plgpu.barrier_wait(consumed.at[slot])

                @pl.when(n < steps)
                def _():
                    start = (part * steps + n) * tiles.depth
                    stretch = pl.ds(start, tiles.depth)
                    plgpu.copy_gmem_to_smem(codes_gmem.at[stretch, wide], codes_smem.at[slot], ready.at[slot])
                    for h in range(halves):
                        source = x_gmem.at[h, pl.ds(row, tiles.rows), stretch]
                        plgpu.copy_gmem_to_smem(source, x_smem.at[slot, h], ready.at[slot])
                    if not late:
                        source = scale_gmem.at[pl.ds(lax.div(start, jnp.int32(group)), scales), wide]
                        plgpu.copy_gmem_to_smem(source, scale_smem.at[slot], ready.at[slot])

            # After the last block its buffers' ends of use are still waited for: a barrier is left as it was found.
            lax.fori_loop(0, steps + tiles.stages, fetch, None)

    wide, copies = COLUMNS * tiles.groups, 1 + halves + (not late)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((parts, columns, row_tiles * tiles.rows), jnp.float32),
        grid=(column_tiles, row_tiles, parts),
        grid_names=("columns", "rows", "parts"),
        num_threads=tiles.groups + 1,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((tiles.stages, halves, tiles.rows, tiles.depth), x.dtype, transforms=swizzled),
            plgpu.SMEM((tiles.stages, tiles.depth, wide), w.codes.dtype),
            plgpu.SMEM((1 if late else tiles.stages, scales, wide), w.scale.dtype),
            plgpu.SMEM((tiles.groups, halves, tiles.depth, COLUMNS), x.dtype, transforms=swizzled),
            plgpu.SMEM((tiles.groups, COLUMNS, tiles.rows), jnp.float32, transforms=_transforms(4 * tiles.rows)),
            plgpu.Barrier(num_arrivals=copies, num_barriers=tiles.stages),
            plgpu.Barrier(num_arrivals=tiles.groups, num_barriers=tiles.stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=1),
        ),
        **({"interpret": Interpreted.params()} if interpret else {}),
    )(x, w.codes, w.scale)
    return jnp.sum(out, axis=0).T[:count]


def _parts(steps: int, others: int) -> int:
    """The fewest parts of the summed axis, of equal steps, that give every multiprocessor a thread block."""
    divisors = [n for n in range(1, steps + 1) if steps % n == 0]
    return next((n for n in divisors if n * others >= _THREAD_BLOCKS), divisors[-1])


def _transforms(width: int, dtype=jnp.float32) -> tuple:
    """Tiling and swizzling for rows of `width` bytes."""
    swizzle = math.gcd(width, 128)
    return plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle)
