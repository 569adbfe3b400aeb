"""Cross-entropy as TPU kernels (Mosaic): logits live in VMEM, a tile at a time.

Forward: for each tile of tokens a loop over tiles of the vocabulary with a running maximum and sum. Backward: two
kernels compute the tile again; one sums over the vocabulary for the gradient of `x`, the other over tokens for that of
the head.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cross_entropy.reference import cap, dlogits, logits_of

Array = jax.Array

VMEM_LIMIT = 48 << 20
"""Bytes that the compiler may give a kernel; v5e, v5p, v6e and v7 have 64 MiB and more."""
VMEM_BUDGET = 36 << 20
"""Bytes that tiles may take by `vmem_bytes`; the rest is the compiler's."""

_LANES = 128


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tokens and vocabulary columns of a tile; it holds all features."""

    tokens: int
    columns: int


TARGET = Tiles(512, 1024)


def unsupported(x: Array, head: Array, dtype: jnp.dtype, transposed: bool) -> str | None:
    """Why these kernels cannot do it (a phrase for an error), or `None`."""
    for name, given in (("x", x.dtype), ("head", head.dtype), ("the operands", dtype)):
        if jnp.dtype(given) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
            return f"{name} in {jnp.dtype(given)} (the kernel takes float32 and bfloat16)"
    if choose_tiles(*x.shape, head.shape[0 if transposed else 1], x.dtype, head.dtype) is None:
        return f"{x.shape[1]} features: no tile of them fits in {VMEM_BUDGET} bytes"
    return None


def choose_tiles(tokens: int, embed: int, vocab: int, x_dtype: Any, head_dtype: Any) -> Tiles | None:
    """The largest tiles up to `TARGET` that fit `VMEM_BUDGET` in all three kernels."""
    tiles = Tiles(min(TARGET.tokens, _round_up(tokens, 16)), min(TARGET.columns, _round_up(vocab, _LANES)))
    while vmem_bytes(tiles, embed, x_dtype, head_dtype) > VMEM_BUDGET:
        if tiles.columns > max(tiles.tokens, _LANES):
            tiles = dataclasses.replace(tiles, columns=_round_up(tiles.columns // 2, _LANES))
        elif tiles.tokens > 64:
            tiles = dataclasses.replace(tiles, tokens=_round_up(tiles.tokens // 2, 16))
        elif tiles.columns > _LANES:
            tiles = dataclasses.replace(tiles, columns=_round_up(tiles.columns // 2, _LANES))
        else:
            return None
    return tiles


def vmem_bytes(tiles: Tiles, embed: int, x_dtype: Any, head_dtype: Any) -> int:
    """Bytes of VMEM that the hungriest of the kernels takes: operands twice (one is read while the other is used) and
    once more as they are multiplied, the gradient tile twice with its sum, three tiles of logits, numbers of tokens."""
    features = _round_up(embed, _LANES)
    into, columns = tiles.tokens * features, tiles.columns * features
    operands = into * (2 * jnp.dtype(x_dtype).itemsize + 4) + columns * (2 * jnp.dtype(head_dtype).itemsize + 4)
    gradient = max(into * (2 * jnp.dtype(x_dtype).itemsize + 4), columns * (2 * jnp.dtype(head_dtype).itemsize + 4))
    return operands + gradient + 3 * 4 * tiles.tokens * tiles.columns + 12 * 4 * tiles.tokens * _LANES


def statistics(x: Array, head: Array, targets: Array, options: Any) -> tuple[Array, Array, Array]:
    """As `reference.statistics`; of a target that is not among the columns the logit is 0."""
    tokens, embed, vocab, tiles, head_spec = _problem(x, head, options)
    each = pl.BlockSpec((tiles.tokens, 1), lambda i, j: (i, 0))
    found = pl.pallas_call(
        functools.partial(_forward_kernel, options=options, vocab=vocab),
        out_shape=[jax.ShapeDtypeStruct((tokens, 1), jnp.float32)] * 3,
        grid=(pl.cdiv(tokens, tiles.tokens), pl.cdiv(vocab, tiles.columns)),
        in_specs=[pl.BlockSpec((tiles.tokens, embed), lambda i, j: (i, 0)), head_spec(lambda i, j: j), each],
        out_specs=[each] * 3,
        scratch_shapes=[pltpu.VMEM((tiles.tokens, 1), jnp.float32)] * 3,
        compiler_params=_COMPILER,
        interpret=options.chosen == "tpu_interpret",
        name="cross_entropy",
    )(x, head, targets[:, None])
    return tuple(a[:, 0] for a in found)


def gradients(
    x: Array, head: Array, targets: Array, lse: Array, dlse: Array, dpicked: Array, options: Any
) -> tuple[Array, Array]:
    """`(dx, dhead)` from those of the log-partition and the target's logit."""
    tokens, embed, vocab, tiles, head_spec = _problem(x, head, options)
    steps, columns = pl.cdiv(tokens, tiles.tokens), pl.cdiv(vocab, tiles.columns)
    # Tokens are summed over for the head, so those beyond the last must be 0, not whatever memory holds.
    x, *numbers = (_pad(a, steps * tiles.tokens) for a in (x, targets, lse, dlse, dpicked))
    numbers = [a[:, None] for a in numbers]

    def run(kernel: Any, name: str, out: Any, out_spec: Any, grid: tuple, token: Any, column: Any, sums: tuple):
        return pl.pallas_call(
            functools.partial(kernel, options=options, vocab=vocab),
            out_shape=out,
            grid=grid,
            in_specs=[
                pl.BlockSpec((tiles.tokens, embed), lambda *at: (token(*at), 0)),
                head_spec(column),
                *[pl.BlockSpec((tiles.tokens, 1), lambda *at: (token(*at), 0))] * 4,
            ],
            out_specs=out_spec,
            scratch_shapes=[pltpu.VMEM(sums, jnp.float32)],
            compiler_params=_COMPILER,
            interpret=options.chosen == "tpu_interpret",
            name=name,
        )(x, head, *numbers)

    first, second = (lambda i, j: i), (lambda i, j: j)
    dx = run(
        _dx_kernel,
        "cross_entropy_dx",
        jax.ShapeDtypeStruct((tokens, embed), x.dtype),
        pl.BlockSpec((tiles.tokens, embed), lambda i, j: (i, 0)),
        (steps, columns),
        first,
        second,
        (tiles.tokens, embed),
    )
    dhead = run(
        _dhead_kernel,
        "cross_entropy_dhead",
        jax.ShapeDtypeStruct(head.shape, head.dtype),
        head_spec(first),
        (columns, steps),
        second,
        first,
        (tiles.columns, embed) if options.transposed else (embed, tiles.columns),
    )
    return dx, dhead


_COMPILER = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT)


def _problem(x: Array, head: Array, options: Any) -> tuple:
    tokens, embed = x.shape
    vocab = head.shape[0 if options.transposed else 1]
    tiles = choose_tiles(tokens, embed, vocab, x.dtype, head.dtype)

    def head_spec(column: Any) -> pl.BlockSpec:
        if options.transposed:
            return pl.BlockSpec((tiles.columns, embed), lambda *at: (column(*at), 0))
        return pl.BlockSpec((embed, tiles.columns), lambda *at: (0, column(*at)))

    return tokens, embed, vocab, tiles, head_spec


def _forward_kernel(x_ref, head_ref, targets_ref, *rest, options, vocab):
    lse_ref, picked_ref, largest_ref, top_ref, total_ref, hit_ref = rest
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        hit_ref[...] = jnp.zeros_like(hit_ref)

    logits, number, inside, _ = _tile(x_ref, head_ref, step, options, vocab)
    hit_ref[...] += jnp.sum(jnp.where(number == targets_ref[...], logits, 0.0), axis=1, keepdims=True)
    if inside is not None:
        logits = jnp.where(inside, logits, -jnp.inf)
    top = jnp.maximum(top_ref[...], jnp.max(logits, axis=1, keepdims=True))
    total_ref[...] = total_ref[...] * jnp.exp(top_ref[...] - top) + jnp.sum(jnp.exp(logits - top), 1, keepdims=True)
    top_ref[...] = top

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        lse_ref[...] = top_ref[...] + jnp.log(total_ref[...])
        picked_ref[...] = hit_ref[...]
        largest_ref[...] = top_ref[...]


def _dx_kernel(x_ref, head_ref, *rest, options, vocab):
    *numbers, dx_ref, sum_ref = rest
    d, head = _dlogits_tile(x_ref, head_ref, *numbers, pl.program_id(1), options, vocab)

    @pl.when(pl.program_id(1) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    contract = (((1,), (0 if options.transposed else 1,)), ((), ()))
    sum_ref[...] += jax.lax.dot_general(d, head, contract, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        dx_ref[...] = sum_ref[...].astype(dx_ref.dtype)


def _dhead_kernel(x_ref, head_ref, *rest, options, vocab):
    *numbers, dhead_ref, sum_ref = rest
    d, _ = _dlogits_tile(x_ref, head_ref, *numbers, pl.program_id(0), options, vocab)

    @pl.when(pl.program_id(1) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    x, contract = x_ref[...].astype(d.dtype), (((0,), (0,)), ((), ()))
    pair = (d, x) if options.transposed else (x, d)
    sum_ref[...] += jax.lax.dot_general(*pair, contract, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        dhead_ref[...] = sum_ref[...].astype(dhead_ref.dtype)


def _dlogits_tile(x_ref, head_ref, targets_ref, lse_ref, dlse_ref, dpicked_ref, step, options, vocab):
    logits, number, inside, head = _tile(x_ref, head_ref, step, options, vocab)
    hit = number == targets_ref[...]
    d = dlogits(logits, hit, lse_ref[...], dlse_ref[...], dpicked_ref[...], options.softcap)
    d = d if inside is None else jnp.where(inside, d, 0.0)
    return d.astype(options.dtype), head


def _tile(x_ref, head_ref, step, options, vocab):
    """Capped logits, the columns' numbers, which are within the vocabulary (`None`: all), and the head's tile."""
    axis = 0 if options.transposed else 1
    columns = head_ref.shape[axis]
    head = head_ref[...].astype(options.dtype)
    ragged = vocab % columns
    if ragged:
        # Beyond the last column is whatever memory holds, NaN among it, which 0 times does not remove.
        held = jax.lax.broadcasted_iota(jnp.int32, head.shape, axis) + step * columns
        head = jnp.where(held < vocab, head, jnp.zeros_like(head))
    logits = cap(logits_of(x_ref[...], head, options), options.softcap)
    number = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + step * columns
    return logits, number, number < vocab if ragged else None, head


def _pad(x: Array, size: int) -> Array:
    return jnp.pad(x, ((0, size - x.shape[0]),) + ((0, 0),) * (x.ndim - 1)) if x.shape[0] < size else x


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
