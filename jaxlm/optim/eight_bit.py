"""Adam whose two moments are stored in 8 bits an entry, with one scale for each block of entries.

A moment of a kernel `(leading..., in, out)` is kept as `codes`, uint8 in the kernel's own shape, and `scales`, float32
`(leading..., in, blocks)`: blocks are runs of entries along the last axis, the last one shorter where the block does
not divide it. So codes are sharded like the parameter, and no block crosses a row.
"""

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from jaxlm.optim import roles, wiring
from jaxlm.optim.learning_rate import LearningRate
from jaxlm.optim.wiring import DECAYED_ROLES

EIGHT_BIT_ROLES = ("matrix", "head")
"""Kernels. Embeddings stay in full precision, as the paper advises, and so does what is small."""


@functools.cache
def dynamic_code_book(signed: bool) -> np.ndarray:
    """The 256 values in [-1, 1] (signed) or [0, 1] of the dynamic tree format, sorted. Float32.

    For each decade `10^(i-6)`, `i` from 0 to 6, the midpoints of `2^i` (unsigned: `2^(i+1)`) equal cells of
    [0.1, 1], mirrored if signed; and 0 and 1. Small values keep their magnitude, large ones their digits.

    Source: 8-bit Optimizers via Block-wise Quantization (Dettmers et al., 2021, arXiv 2110.02861, section 2.2).
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1, dtype=np.float32)
        cells = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2).astype(np.float64)
        values.extend(cells)
        if signed:
            values.extend(-cells)
    return np.sort(np.asarray(values, np.float32))


class Blocks(NamedTuple):
    """A quantized array: `codes`, uint8 in its shape, and `scales`, the largest magnitude in each block."""

    codes: UInt8[Array, "*shape"]
    scales: Float[Array, "*blocks"]


def quantize_blocks(x: Float[Array, "*rows n"], block: int = 256, *, signed: bool = True) -> Blocks:
    """Each entry becomes the nearest value of the code book times the largest magnitude in its block.

    Blocks lie along the last axis; a block of zeros has scale 0 and comes back as zeros.
    """
    wiring.check_count("block", block)
    x = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(_in_blocks(x, block)), axis=-1)
    # Back in the shape of x: XLA's CPU backend is several times slower on the padded blocks.
    spread = jnp.repeat(1.0 / jnp.where(scales > 0, scales, 1.0), block, axis=-1)[..., : x.shape[-1]]
    return Blocks(_nearest_code(x * spread, signed), scales)


def dequantize_blocks(x: Blocks, block: int = 256, *, signed: bool = True) -> Float[Array, "*rows n"]:
    """The float32 array that `quantize_blocks` stored, to within half a step of the code book."""
    book = jnp.asarray(dynamic_code_book(signed))
    values = _in_blocks(book.at[x.codes].get(mode="promise_in_bounds"), block) * x.scales[..., None]
    return values.reshape(*x.codes.shape[:-1], -1)[..., : x.codes.shape[-1]]


class EightBitState(NamedTuple):
    """Trees as of the parameters: of the first and second moment, codes and scales; moments of what is not quantized
    are in `codes` as they are, with None for scales."""

    count: jax.Array
    mu_codes: Any
    mu_scales: Any
    nu_codes: Any
    nu_scales: Any


def scale_by_adam_8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, block: int = 256, min_size: int = 4096
) -> optax.GradientTransformation:
    """Adam's direction; both moments are dequantized, updated in float32 and quantized again in every step.

    Arrays whose last two axes have fewer than `min_size` entries keep unquantized moments.

    Source: Dettmers et al., 2021, arXiv 2110.02861. Blocks of 2048 in the paper, 256 in current bitsandbytes, which
    cuts blocks from the flattened tensor.

    Raises:
      ConfigError: betas outside [0, 1), block or min_size below 1.
    """
    wiring.check_betas(b1, b2, eps)
    wiring.check_count("block", block)
    wiring.check_count("min_size", min_size)

    def is_small(p: Array) -> bool:
        return p.ndim < 2 or p.shape[-2] * p.shape[-1] < min_size

    def init(params: Any) -> EightBitState:
        def zeros(p: Array, signed: bool) -> Blocks:
            if is_small(p):
                return Blocks(jnp.zeros_like(p), None)
            zero = int(np.searchsorted(dynamic_code_book(signed), 0.0))
            blocks = -(-p.shape[-1] // block)
            return Blocks(jnp.full(p.shape, zero, jnp.uint8), jnp.zeros((*p.shape[:-1], blocks), jnp.float32))

        moments = [_unzip(jax.tree.map(lambda p, s=signed: zeros(p, s), params), params) for signed in (True, False)]
        return EightBitState(jnp.zeros((), jnp.int32), *moments[0], *moments[1])

    def update(updates: Any, state: EightBitState, params: Any = None):
        del params
        count = optax.safe_increment(state.count)

        def one(g, *stored):
            mu, nu = Blocks(*stored[:2]), Blocks(*stored[2:])
            small = is_small(g)
            m = mu.codes if small else dequantize_blocks(mu, block, signed=True)
            v = nu.codes if small else dequantize_blocks(nu, block, signed=False)
            m, v, direction, correction = wiring.adam_direction(m, v, g, count, b1, b2, eps)
            if small:
                new = (Blocks(m.astype(mu.codes.dtype), None), Blocks(v.astype(nu.codes.dtype), None))
            else:
                new = (quantize_blocks(m, block, signed=True), quantize_blocks(v, block, signed=False))
            return ((correction * direction).astype(g.dtype), *new[0], *new[1])

        out, *new = wiring.map_leaves(one, updates, *state[1:])
        return out, EightBitState(count, *new)

    return optax.GradientTransformation(init, update)


def adamw_8bit(
    learning_rate: LearningRate,
    *,
    axes: Any,
    block: int = 256,
    min_size: int = 4096,
    matrix_roles: roles.Predicate | Collection[str] = EIGHT_BIT_ROLES,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: roles.Predicate | Collection[str] = DECAYED_ROLES,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with 8-bit moments for kernels and head; embeddings and everything else have Adam's own.

    Source: Dettmers et al., 2021, arXiv 2110.02861.

    Args:
      block: entries along the last axis that share a scale.
      min_size: matrices with fewer entries keep unquantized moments.
      matrix_roles: which parameters are quantized: roles, or a predicate on `(path, role)`.
      The other arguments are those of `adamw`.

    Raises:
      ConfigError: a value out of its range, a leaf without a role, an unknown role, nothing to quantize.
    """
    quantized = scale_by_adam_8bit(b1, b2, eps, block=block, min_size=min_size)
    return wiring.optimizer(
        learning_rate,
        wiring.matrix_or_adam("adamw_8bit", quantized, matrix_roles, wiring.adam(b1, b2, eps), axes),
        axes=axes,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
    )


def _nearest_code(x: Array, signed: bool) -> UInt8[Array, "*shape"]:
    """The index of the nearest value of the code book, for `x` in [-1, 1] or [0, 1].

    By arithmetic instead of a search: within a decade cells are equal, and a handful of comparisons find the decade.
    """
    book = dynamic_code_book(signed).astype(np.float64)
    positive = book[book > 0]
    size = jnp.abs(x)
    place = jnp.zeros(x.shape, jnp.int32)  # 0 is zero, 1 the smallest value
    first = 0
    for i in range(7):
        cells = 2 ** (i if signed else i + 1)
        below = positive[first - 1] if first else 0.0
        cell = jnp.floor((size * 10.0 ** (6 - i) - 0.1) * (cells / 0.9)).astype(jnp.int32)
        edge = np.float32((below + positive[first]) / 2)
        place = jnp.where(size > edge, first + 1 + jnp.clip(cell, 0, cells - 1), place)
        first += cells
    if not signed:
        place = jnp.where(size > np.float32((positive[-2] + 1.0) / 2), first + 1, place)
        return place.astype(jnp.uint8)
    place = jnp.where(x > np.float32((positive[-2] + 1.0) / 2), first + 1, place)
    return (first + jnp.where(x < 0, -place, place)).astype(jnp.uint8)


def _in_blocks(x: Array, block: int) -> Array:
    """The last axis in two, `(blocks, block)`, with zeros after its end."""
    missing = -x.shape[-1] % block
    if missing:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return x.reshape(*x.shape[:-1], -1, block)


def _unzip(tree: Any, like: Any) -> tuple[Any, Any]:
    treedef = jax.tree.structure(like)
    pairs = treedef.flatten_up_to(tree)
    return treedef.unflatten([p.codes for p in pairs]), treedef.unflatten([p.scales for p in pairs])
