"""The products as TPU kernels (Mosaic): codes go through memory packed and are unpacked in VMEM, tile by tile.

A tile of a kernel matrix holds whole blocks, or lies within one. The two halves of a block of 4 bits, which share
bytes, are not put in order: the activations' columns are, outside the kernel, so a product is the sum of two, with low
and with high halves. One axis of the grid runs over the summed axis, innermost, into a float32 accumulator in VMEM.

Kernel matrices (blocks along axis -2) and embeddings (axis -1) each have two kernels: one sums over the blocked axis,
the other over the free one, which is also the first one's gradient. Scales of 8-bit products of int8 activations are
applied to exact 32-bit sums.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantized_matmul.layout import Packed

Array = jax.Array

VMEM_BUDGET = 12 << 20
"""Bytes that a kernel's tiles may take; 16 MiB is what the compiler grants a kernel on any chip since v4."""

_LANES = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a tile: `rows` of activations, `blocked` stored rows or columns, `free` columns or rows."""

    rows: int
    blocked: int
    free: int


# Preferred sizes, the largest first: products of few rows are bound by reading codes, so they take wide tiles.
TARGETS = {"few_rows": Tiles(16, 512, 1024), "many_rows": Tiles(512, 256, 512)}
_WIDEST = max(tiles.blocked for tiles in TARGETS.values())


def unsupported(w: Packed, x_dtype: jnp.dtype, dtype: jnp.dtype, transposed: bool, int8: bool = False) -> str | None:
    """Why these kernels cannot do a product (a sentence for an error), or `None`."""
    if w.bits not in (4, 8):
        return f"codes of {w.bits} bits (the kernel takes 4 and 8)"
    if w.super_scale is not None or w.super_minimum is not None:
        return "superblock scales (the kernel takes a scale for each block)"
    for name, given in (("x", x_dtype), ("the operands", dtype)):
        if jnp.dtype(given) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
            return f"{name} in {jnp.dtype(given)} (the kernel takes float32 and bfloat16)"
    if w.axis == -2 and w.blocks > 1 and _stored_group(w) % 8:
        return f"blocks of {w.group} weights (the kernel takes multiples of {8 if w.bits == 8 else 16})"
    if int8 and (w.bits != 8 or w.axis != -2 or transposed or w.minimum is not None or w.offset):
        return "int8 activations with anything but symmetric 8-bit kernels blocked along their input"
    if int8 and w.blocks > 1 and w.group % _LANES:
        return f"int8 activations with blocks of {w.group} (the kernel takes multiples of {_LANES}, or one block)"
    # Tiles depend on the number of rows: these take the smallest and the largest.
    tiles = functools.partial(choose_tiles, w=w, dtype=dtype, sums_blocks=_sums_blocks(w, transposed), int8=int8)
    if any(tiles(rows) is None for rows in (1, TARGETS["many_rows"].rows)):
        return f"blocks of {w.group} weights by {w.shape[-3 - w.axis]}: no tile of them fits in {VMEM_BUDGET} bytes"
    return None


def matmul(x: Array, w: Packed, *, transposed: bool, dtype: jnp.dtype, interpret: bool = False) -> Array:
    """`x @ w`, or `x @ w.T`, for one matrix; as `reference.matmul`. `unsupported` must have answered `None`."""
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    run = _sum_over_blocks if _sums_blocks(w, transposed) else _sum_over_free
    y = run(flat, w, interpret).astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def matmul_int8(codes: Array, token_scale: Array, w: Packed, *, interpret: bool = False) -> Array:
    """As `reference.matmul_int8`: int8 codes `[rows, in]`, a float32 scale a row; float32 result."""
    rows, (size, columns) = codes.shape[0], w.shape
    tiles = choose_tiles(rows, w, jnp.dtype(jnp.int8), sums_blocks=True, int8=True)
    steps = pl.cdiv(size, tiles.blocked)
    codes = _pad(codes, 1, steps * tiles.blocked)
    scale, of_step = _scale_rows(w.scale, w, tiles.blocked, steps)
    one = w.blocks == 1
    return pl.pallas_call(
        functools.partial(_int8_kernel, group=tiles.blocked if one else min(w.group, tiles.blocked), late=one),
        out_shape=jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        grid=(pl.cdiv(rows, tiles.rows), pl.cdiv(columns, tiles.free), steps),
        in_specs=[
            pl.BlockSpec((tiles.rows, tiles.blocked), lambda i, j, k: (i, k)),
            pl.BlockSpec((tiles.rows, 1), lambda i, j, k: (i, 0)),
            pl.BlockSpec((tiles.blocked, tiles.free), lambda i, j, k: (k, j)),
            pl.BlockSpec((1, scale.shape[1], tiles.free), lambda i, j, k: (of_step(k), 0, j)),
        ],
        out_specs=pl.BlockSpec((tiles.rows, tiles.free), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.free), jnp.int32 if one else jnp.float32)],
        compiler_params=_COMPILER,
        interpret=interpret,
        name="quantized_matmul_int8",
    )(codes, token_scale, w.codes, scale)


def choose_tiles(rows: int, w: Packed, dtype: jnp.dtype, *, sums_blocks: bool, int8: bool = False) -> Tiles | None:
    """The largest tiles near `TARGETS` that hold whole blocks (or lie within one) and fit `VMEM_BUDGET`."""
    target = TARGETS["few_rows" if rows <= 64 else "many_rows"]
    stored, free = w.codes.shape[w.axis], w.shape[-3 - w.axis]
    tile_rows = min(_round_up(max(rows, 1), 32 if int8 else 16), max(target.rows, 64))
    # Blocks that fill no tile of the size preferred for many rows may fill one of the largest.
    limits = [limit for limit in (target.blocked, _WIDEST) if stored <= limit or _blocked_unit(w, limit) is not None]
    if not limits:
        return None
    limit, unit = limits[0], _blocked_unit(w, limits[0])
    free_tile = min(target.free, _round_up(free, _LANES))
    while True:
        tiles = Tiles(tile_rows, _blocked_tile(w, unit, limit), free_tile)
        if vmem_bytes(tiles, w, dtype, sums_blocks=sums_blocks) <= VMEM_BUDGET:
            return tiles
        if free_tile > _LANES:
            free_tile = _round_up(free_tile // 2, _LANES)
        elif tile_rows > 32:
            tile_rows = _round_up(tile_rows // 2, 32)
        else:
            return None


def vmem_bytes(tiles: Tiles, w: Packed, dtype: jnp.dtype, *, sums_blocks: bool) -> int:
    """Bytes of VMEM: every input and output tile twice (one is read while the other is used), the accumulator, and the
    unpacked tile as float32 codes, as float32 weights and as operand."""
    halves = 2 if w.bits == 4 else 1
    per_block = 1 if w.minimum is None else 2
    code_tile = tiles.blocked * tiles.free
    # Of an embedding's rows all scales are there: tiles along lanes need not keep to blocks.
    blocks = w.blocks if w.axis == -1 else max(1, tiles.blocked // _stored_group(w)) if w.blocks > 1 else 1
    scales = 4 * per_block * tiles.free * _round_up(blocks, 8 if w.axis == -2 else _LANES)
    wide, narrow = tiles.rows * tiles.blocked * halves, tiles.rows * tiles.free
    into, out = (wide, narrow) if sums_blocks else (narrow, wide)
    operands = jnp.dtype(dtype).itemsize
    unpacked = code_tile * (4 + 4 + operands)
    if w.axis == -1 and w.blocks > 1:
        unpacked += 4 * per_block * code_tile + 2 * blocks * tiles.blocked
    return 2 * (code_tile + scales + operands * into + 4 * out) + 4 * out + unpacked


_COMPILER = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def _sums_blocks(w: Packed, transposed: bool) -> bool:
    return (w.axis == -2) != transposed


def _stored_group(w: Packed) -> int:
    """A block's rows (or columns) of codes."""
    return w.group // (2 if w.bits == 4 else 1)


def _blocked_unit(w: Packed, limit: int) -> int | None:
    """What a tile along the blocked axis must be a multiple of, or `None` if it has to be the whole axis."""
    stored = _stored_group(w)
    if w.blocks == 1 or w.axis == -1:
        return _LANES
    if math.lcm(stored, _LANES) <= limit:
        return math.lcm(stored, _LANES)
    fitting = [n for n in range(_LANES, min(stored, limit) + 1, _LANES) if stored % n == 0]
    return fitting[-1] if fitting else None


def _blocked_tile(w: Packed, unit: int | None, limit: int) -> int:
    size = w.codes.shape[w.axis]
    if unit is None or size <= unit:
        return size
    within_block = w.axis == -2 and w.blocks > 1 and _stored_group(w) % unit == 0 and _stored_group(w) > unit
    return unit if within_block else min(limit // unit * unit, _round_up(size, unit))


def _sum_over_blocks(x: Array, w: Packed, interpret: bool) -> Array:
    """`x [rows, blocked]` times the matrix, summed over its blocked axis: float32 `[rows, free]`."""
    rows, free = x.shape[0], w.shape[-3 - w.axis]
    tiles = choose_tiles(rows, w, x.dtype, sums_blocks=True)
    steps = pl.cdiv(w.codes.shape[w.axis], tiles.blocked)
    x = _pad(_in_halves(x, w), 2, steps * tiles.blocked)
    scales, scale_specs = _scale_operands(w, tiles, steps, lambda i, j, k: (k, j))
    return pl.pallas_call(
        functools.partial(_sum_over_blocks_kernel, w=_static(w)),
        out_shape=jax.ShapeDtypeStruct((rows, free), jnp.float32),
        grid=(pl.cdiv(rows, tiles.rows), pl.cdiv(free, tiles.free), steps),
        in_specs=[
            pl.BlockSpec((x.shape[0], tiles.rows, tiles.blocked), lambda i, j, k: (0, i, k)),
            _code_spec(w, tiles, lambda i, j, k: (k, j)),
            *scale_specs,
        ],
        out_specs=pl.BlockSpec((tiles.rows, tiles.free), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((tiles.rows, tiles.free), jnp.float32)],
        compiler_params=_COMPILER,
        interpret=interpret,
        name="quantized_matmul",
    )(x, w.codes, *scales)


def _sum_over_free(x: Array, w: Packed, interpret: bool) -> Array:
    """`x [rows, free]` times the matrix, summed over the axis that has no blocks: float32 `[rows, blocked]`."""
    rows, free = x.shape[0], w.shape[-3 - w.axis]
    tiles = choose_tiles(rows, w, x.dtype, sums_blocks=False)
    stored, parts = w.codes.shape[w.axis], 2 if w.bits == 4 else 1
    blocked_steps, steps = pl.cdiv(stored, tiles.blocked), pl.cdiv(free, tiles.free)
    # What a tile holds beyond the matrix's end is summed over here, so it has to be 0.
    x = _pad(x, 1, steps * tiles.free)
    w = dataclasses.replace(w, **{n: _pad(a, -3 - w.axis, steps * tiles.free) for n, a in _per_block(w).items()})
    scales, scale_specs = _scale_operands(w, tiles, blocked_steps, lambda i, j, k: (j, k))
    y = pl.pallas_call(
        functools.partial(_sum_over_free_kernel, w=_static(w)),
        out_shape=jax.ShapeDtypeStruct((parts, rows, stored), jnp.float32),
        grid=(pl.cdiv(rows, tiles.rows), blocked_steps, steps),
        in_specs=[
            pl.BlockSpec((tiles.rows, tiles.free), lambda i, j, k: (i, k)),
            _code_spec(w, tiles, lambda i, j, k: (j, k)),
            *scale_specs,
        ],
        out_specs=pl.BlockSpec((parts, tiles.rows, tiles.blocked), lambda i, j, k: (0, i, j)),
        scratch_shapes=[pltpu.VMEM((parts, tiles.rows, tiles.blocked), jnp.float32)],
        compiler_params=_COMPILER,
        interpret=interpret,
        name="quantized_matmul_free",
    )(x, w.codes, *scales)
    return _from_halves(y, w)


@dataclasses.dataclass(frozen=True)
class _Static:
    bits: int
    offset: int
    axis: int
    dtype: jnp.dtype
    group: int
    late: bool  # one scale a column, applied to the sums


def _static(w: Packed) -> _Static:
    late = w.axis == -2 and w.blocks == 1 and w.minimum is None
    return _Static(w.bits, w.offset, w.axis, jnp.dtype(w.dtype), _stored_group(w), late)


def _sum_over_blocks_kernel(x_ref, codes_ref, scale_ref, *rest, w: _Static):
    *minimum_ref, out_ref, sum_ref = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    contract = (((1,), (0 if w.axis == -2 else 1,)), ((), ()))
    operands = _operands(codes_ref, scale_ref, minimum_ref, w, x_ref.dtype, at=pl.program_id(2), scaled=not w.late)
    for part, operand in enumerate(operands):
        sum_ref[...] += jax.lax.dot_general(x_ref[part], operand, contract, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = sum_ref[...] * scale_ref[0] if w.late else sum_ref[...]


def _sum_over_free_kernel(x_ref, codes_ref, scale_ref, *rest, w: _Static):
    *minimum_ref, out_ref, sum_ref = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    contract = (((1,), (1 if w.axis == -2 else 0,)), ((), ()))
    operands = _operands(codes_ref, scale_ref, minimum_ref, w, x_ref.dtype, at=pl.program_id(1), scaled=True)
    for part, operand in enumerate(operands):
        sum_ref[part] += jax.lax.dot_general(x_ref[...], operand, contract, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = sum_ref[...]


def _int8_kernel(x_ref, token_scale_ref, codes_ref, scale_ref, out_ref, sum_ref, *, group: int, late: bool):
    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    contract = (((1,), (0,)), ((), ()))
    for i in range(codes_ref.shape[0] // group):
        part = slice(i * group, (i + 1) * group)
        exact = jax.lax.dot_general(x_ref[:, part], codes_ref[part, :], contract, preferred_element_type=jnp.int32)
        sum_ref[...] += exact if late else exact.astype(jnp.float32) * scale_ref[0, i : i + 1]

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        total = sum_ref[...].astype(jnp.float32) * scale_ref[0] if late else sum_ref[...]
        out_ref[...] = total * token_scale_ref[...]


def _operands(codes_ref, scale_ref, minimum_ref, w: _Static, dtype: jnp.dtype, *, at: Array, scaled: bool):
    """The unpacked tile, the `at`-th along the blocked axis: one operand for 8 bits, low and high halves for 4."""
    codes = codes_ref[...].astype(jnp.int32)
    parts = [codes] if w.bits == 8 else [codes & 15, codes >> 4]
    if scaled:
        scale = _spread_in_tile(scale_ref, codes.shape, w, at)
        minimum = _spread_in_tile(minimum_ref[0], codes.shape, w, at) if minimum_ref else None
    for part in parts:
        full = (part - w.offset).astype(jnp.float32)
        if scaled:
            full = full * scale if minimum is None else full * scale + minimum
            full = full.astype(w.dtype)
        yield full.astype(dtype)


def _spread_in_tile(ref, shape: tuple[int, int], w: _Static, at: Array) -> Array:
    """Each block's number over the tile's codes; of one block it is left to broadcasting."""
    if w.axis == -2:
        each = ref[0]
        blocks = each.shape[0]
        if blocks == 1:
            return each
        return jnp.broadcast_to(each[:, None, :], (blocks, shape[0] // blocks, shape[1])).reshape(shape)
    each = ref[...]
    blocks = each.shape[1]
    if blocks == 1:
        return each
    # Along lanes numbers are spread by a product with zeros and ones: exact when each is a sum of three bfloat16.
    column = jax.lax.broadcasted_iota(jnp.int32, (blocks, shape[1]), 1) + at * shape[1]
    first = jax.lax.broadcasted_iota(jnp.int32, (blocks, shape[1]), 0) * w.group
    ones = ((column >= first) & (column < first + w.group)).astype(jnp.bfloat16)
    spread = jnp.zeros(shape, jnp.float32)
    for _ in range(3):
        term = each.astype(jnp.bfloat16)
        spread += jnp.dot(term, ones, preferred_element_type=jnp.float32)
        each = each - term.astype(jnp.float32)
    return spread


def _code_spec(w: Packed, tiles: Tiles, index) -> pl.BlockSpec:
    """`index` gives the (blocked, free) position of a tile."""
    if w.axis == -2:
        return pl.BlockSpec((tiles.blocked, tiles.free), index)
    return pl.BlockSpec((tiles.free, tiles.blocked), lambda *at: index(*at)[::-1])


def _scale_operands(w: Packed, tiles: Tiles, steps: int, index) -> tuple[list[Array], list[pl.BlockSpec]]:
    arrays, specs = [], []
    for array in _per_block(w).values():
        if w.axis == -1:
            arrays.append(array.astype(jnp.float32))
            specs.append(pl.BlockSpec((tiles.free, array.shape[1]), lambda *at: (index(*at)[1], 0)))
            continue
        rows, of_step = _scale_rows(array, w, tiles.blocked, steps)
        arrays.append(rows)
        specs.append(
            pl.BlockSpec(
                (1, rows.shape[1], tiles.free),
                lambda *at, of_step=of_step: (of_step(index(*at)[0]), 0, index(*at)[1]),
            )
        )
    return arrays, specs


def _scale_rows(array: Array, w: Packed, tile: int, steps: int):
    """`[tiles, blocks of a tile, columns]` in float32, and the function from a tile's number to its place there."""
    each, columns, stored = array.astype(jnp.float32), array.shape[1], _stored_group(w)
    if w.blocks == 1:
        return each[None], lambda k: 0
    if stored >= tile:
        return each[:, None], lambda k: k // (stored // tile)
    # Tiles may reach beyond the last block, where a scale of 0 makes weights of 0.
    blocks = tile // stored
    return _pad(each, 0, steps * blocks).reshape(steps, blocks, columns), lambda k: k


def _per_block(w: Packed) -> dict[str, Array]:
    return {"scale": w.scale} | ({} if w.minimum is None else {"minimum": w.minimum})


def _in_halves(x: Array, w: Packed) -> Array:
    """`[1, rows, blocked]`, or for 4 bits `[2, rows, blocked / 2]`: columns of the blocks' low and high halves."""
    if w.bits == 8:
        return x[None]
    rows = x.shape[0]
    return jnp.moveaxis(x.reshape(rows, w.blocks, 2, -1), 2, 0).reshape(2, rows, -1)


def _from_halves(y: Array, w: Packed) -> Array:
    if w.bits == 8:
        return y[0]
    rows = y.shape[1]
    return jnp.moveaxis(y.reshape(2, rows, w.blocks, -1), 0, 2).reshape(rows, -1)


def _pad(x: Array, axis: int, size: int) -> Array:
    if x.shape[axis] == size:
        return x
    width = [(0, 0)] * x.ndim
    width[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, width)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
