"""Any model's kernels as `Quantized` weights: round to nearest in 8 or 4 bits, with three ways to choose a scale.

    params = quantize(params, QuantizeConfig(bits=4, group=32))

The model runs as before, from the packed weights. Formats and conventions as usual for round-to-nearest: symmetric
codes use [-127, 127] and [-8, 7] with `scale = max|w| / 127` and `/ 7`; asymmetric ones 255 and 15 levels between the
block's least and largest weight. Rounding is half to even.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.core import sharding, trees
from jaxlm.core.errors import ConfigError
from jaxlm.weights import LowRank, Quantized, Weight, dense
from pallas_kernels.quantized_matmul import pack

CLIPPING = ("none", "percentile", "mse")
# Ratios of the whole range that are tried; 1 is first, so ties keep it.
_RATIOS = tuple(1 - 0.02 * i for i in range(26))

# The code of weight 0, and of a block's minimum, by (bits, symmetric).
_OFFSETS = {(8, True): 0, (8, False): -128, (4, True): 8, (4, False): 0}


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """How kernels are stored."""

    bits: int = 8
    """8 or 4."""
    group: int | None = None
    """Weights of a block along the input axis, 32, 64 or 128 say; `None` is one block a column (per channel). Where it
    does not divide a kernel's inputs, blocks are the largest smaller multiple of 16 that does (of 576 at 128: 96)."""
    symmetric: bool = True
    """Without a minimum for each block."""
    clipping: str = "none"
    """`none`: a block's whole range; `percentile`: of its weights; `mse`: the fraction of the range, from 0.5 to 1,
    that minimizes the squared error."""
    percentile: float = 99.9
    """Percentage of a block's weights that `percentile` keeps unclipped."""
    scale_dtype: str = "float16"
    """Format of scales and minimums; codes are chosen for the scale as rounded to it."""
    skip: tuple[str, ...] = ()
    """Patterns of paths that stay as they are, `blocks/*/down/kernel` say."""
    embeddings: bool = False
    """Also the token embedding (along its features) and the output head."""
    activation_bits: int | None = None
    """8: products quantize their inputs too, a scale a token (W8A8)."""

    def __post_init__(self):
        if self.bits not in (4, 8):
            raise ConfigError(f"bits is {self.bits}, expected 4 or 8")
        if self.group is not None and (self.group < 16 or self.group % 16):
            raise ConfigError(f"group is {self.group}, expected a positive multiple of 16")
        if self.clipping not in CLIPPING:
            raise ConfigError(f"clipping '{self.clipping}' (valid: {', '.join(CLIPPING)})")
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile is {self.percentile}, expected above 50 and at most 100")
        if self.scale_dtype not in ("float16", "bfloat16", "float32"):
            raise ConfigError(f"scale_dtype '{self.scale_dtype}' (valid: float16, bfloat16, float32)")
        if self.activation_bits not in (None, 8):
            raise ConfigError(f"activation_bits is {self.activation_bits}, expected None or 8")
        if self.activation_bits and (self.bits != 8 or not self.symmetric):
            raise ConfigError("activation_bits=8 takes bits=8 and symmetric=True")


def quantize(params: Any, config: QuantizeConfig, axes: Any = None) -> Any:
    """The parameters with `Quantized` weights for all kernels of the blocks, stacks of layers as one weight.

    Under an adapter (`LowRank`) its base is quantized. `axes`, the model's tree of logical axis names, is needed only
    for kernels on a mesh of several devices.

    Raises `ConfigError` naming the parameter when it cannot be stored so (an odd number of inputs in 4 bits, say), is
    quantized already, is not finite, or when nothing is left to quantize or a pattern of `skip` matches nothing.
    """
    return _map_kernels(_convert, params, config, axes)


def abstract_quantize(params: Any, config: QuantizeConfig, axes: Any = None) -> Any:
    """The shapes of what `quantize` returns, from the shapes of the parameters; nothing is computed of their size."""

    def convert(path: str, w: Any, config: QuantizeConfig, axis: int, names: Any) -> Quantized:
        # Along the other axis all is alike: eight of it tell the rest.
        other = -3 - axis
        size = list(w.shape[-2:])
        size[other] = 8

        def widen(x: Array) -> jax.ShapeDtypeStruct:
            shape = list(x.shape)
            shape[other] = w.shape[other]
            return jax.ShapeDtypeStruct((*w.shape[:-2], *shape), x.dtype)

        return jax.tree.map(widen, _convert(path, jnp.zeros(size, w.dtype), config, axis, names))

    return _map_kernels(convert, params, config, axes)


def quantize_matrix(w: Float[Array, "*batch in out"], config: QuantizeConfig, axis: int = -2) -> Quantized:
    """One matrix, or a stack of them, in blocks along `axis`. Raises `ConfigError` when its size does not fit."""
    return _convert("matrix", w, config, axis, None)


def _map_kernels(convert: Callable[..., Quantized], params: Any, config: QuantizeConfig, axes: Any) -> Any:
    """The parameters with `convert(path, w, config, axis, names)` for each kernel that a configuration means."""
    done = 0
    unmatched = set(config.skip)
    named = {} if axes is None else dict(trees.named_leaves(axes, is_leaf=sharding.is_axes))

    def one(path: str, w: Any) -> Any:
        nonlocal done
        matches = {pattern for pattern in config.skip if fnmatch.fnmatch(path, pattern)}
        unmatched.difference_update(matches)
        axis = _blocked_axis(path, w, config)
        if matches or axis is None:
            return w
        done += 1
        if isinstance(w, LowRank):
            return dataclasses.replace(w, base=convert(path, w.base, config, axis, named.get(path)))
        return convert(path, w, config, axis, named.get(path))

    out = trees.map_named(one, params, is_leaf=lambda x: isinstance(x, Weight))
    if unmatched:
        raise ConfigError(f"skip: no parameter's path matches {sorted(unmatched)}")
    if not done:
        raise ConfigError("no kernel to quantize: paths of kernels end in '/kernel' and begin with 'blocks/'")
    return out


def _blocked_axis(path: str, w: Any, config: QuantizeConfig) -> int | None:
    """The axis to quantize along, or `None` for what is no kernel."""
    first, last = path.split("/")[0], path.split("/")[-1]
    if len(w.shape) < 2:
        return None
    if last == "kernel" and (first == "blocks" or config.embeddings):
        return -2
    return -1 if last == "table" and first == "embedding" and config.embeddings else None


def _convert(path: str, w: Any, config: QuantizeConfig, axis: int, names: Any) -> Quantized:
    if isinstance(w, Quantized):
        raise ConfigError(f"{path} is quantized already, to {w.bits} bits: make it dense first")
    w = dense(w)
    size = w.shape[axis]
    group = size if config.group is None else _fitting(path, size, config.group)
    if config.bits == 4 and group % 2:
        raise ConfigError(f"{path} has {size} inputs: an odd number cannot be packed in 4 bits")
    flat = w.reshape(-1, *w.shape[-2:])
    settings = dataclasses.replace(config, skip=())
    codes, scale, minimum, finite = _quantize_stack(flat, settings, group, axis)
    if not bool(finite):
        raise ConfigError(f"{path} has weights that are not finite")
    leading = w.shape[:-2]
    codes, scale, minimum = (
        None if x is None else x.reshape(*leading, *x.shape[1:]) for x in (codes, scale, minimum)
    )
    if config.bits == 4:
        codes = jnp.asarray(pack(np.asarray(codes), 4, group, axis)[0])
    return Quantized(
        codes,
        scale,
        minimum=minimum,
        bits=config.bits,
        offset=_OFFSETS[config.bits, config.symmetric],
        axis=axis,
        dtype=np.dtype(w.dtype),
        activation_bits=config.activation_bits if axis == -2 else None,
        names=None if names is None else tuple(names[-2:]),
    )


def _fitting(path: str, size: int, group: int) -> int:
    """The largest multiple of 16 up to `group` that divides `size`."""
    for block in range(group, 0, -16):
        if size % block == 0:
            return block
    raise ConfigError(f"{path} has {size} inputs, which blocks of {group} or a smaller multiple of 16 do not divide")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize_stack(w: Array, config: QuantizeConfig, group: int, axis: int) -> tuple:
    """Codes (int8, or uint8 from 0 for 4 bits), scale, minimum or `None`, and whether all is finite; of a stack."""

    def one(matrix: Array) -> tuple:
        matrix = matrix.astype(jnp.float32)
        # Blocks last: [other axis, blocks, group].
        rows = jnp.moveaxis(matrix, axis, -1)
        blocks = rows.reshape(*rows.shape[:-1], -1, group)
        codes, scale, minimum = _quantize_blocks(blocks, config)

        def back(x: Array) -> Array:
            return jnp.moveaxis(x, -1, axis)

        codes = back(codes.reshape(rows.shape))
        return codes, back(scale), None if minimum is None else back(minimum), jnp.all(jnp.isfinite(matrix))

    codes, scale, minimum, finite = jax.lax.map(one, w)
    return codes, scale, minimum, jnp.all(finite)


def _quantize_blocks(blocks: Float[Array, "rows blocks group"], config: QuantizeConfig) -> tuple:
    low, high = _range(blocks, config)
    if config.clipping != "mse":
        return _round(blocks, low, high, config)

    def error(ratio: Array) -> Array:
        codes, scale, minimum = _round(blocks, ratio * low, ratio * high, config)
        restored = _restore(codes, scale, minimum, config)
        return jnp.sum(jnp.square(restored - blocks), axis=-1)

    def better(best: tuple, ratio: Array) -> tuple:
        least, kept = best
        now = error(ratio)
        return (jnp.minimum(least, now), jnp.where(now < least, ratio, kept)), None

    start = jnp.full(low.shape, jnp.inf), jnp.ones_like(low)
    (_, ratio), _ = jax.lax.scan(better, start, jnp.array(_RATIOS, jnp.float32))
    return _round(blocks, ratio * low, ratio * high, config)


def _range(blocks: Array, config: QuantizeConfig) -> tuple[Array, Array]:
    """The least and largest weight of each block that is not clipped; of symmetric codes, minus and plus one bound."""
    cut = 100.0 if config.clipping != "percentile" else config.percentile
    if config.symmetric:
        top = jnp.percentile(jnp.abs(blocks), cut, axis=-1) if cut < 100 else jnp.max(jnp.abs(blocks), axis=-1)
        return -top, top
    if cut < 100:
        outside = (100 - cut) / 2
        return jnp.percentile(blocks, outside, axis=-1), jnp.percentile(blocks, 100 - outside, axis=-1)
    return jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)


def _round(blocks: Array, low: Array, high: Array, config: QuantizeConfig) -> tuple[Array, Array, Array | None]:
    dtype = jnp.dtype(config.scale_dtype)
    if config.symmetric:
        top = 127 if config.bits == 8 else 7
        scale, minimum = _scale(high / top, dtype), None
        codes = jnp.round(blocks / scale.astype(jnp.float32)[..., None])
        if config.bits == 8:
            return jnp.clip(codes, -127, 127).astype(jnp.int8), scale, None
        return (jnp.clip(codes, -8, 7) + 8).astype(jnp.uint8), scale, None
    levels = 255 if config.bits == 8 else 15
    scale, minimum = _scale((high - low) / levels, dtype), low.astype(dtype)
    codes = jnp.round((blocks - minimum.astype(jnp.float32)[..., None]) / scale.astype(jnp.float32)[..., None])
    codes = jnp.clip(codes, 0, levels)
    return (codes - 128).astype(jnp.int8) if config.bits == 8 else codes.astype(jnp.uint8), scale, minimum


def _scale(scale: Array, dtype: Any) -> Array:
    # A block of equal weights has no range; a scale must not vanish when it is rounded.
    return jnp.where(scale == 0, 1.0, jnp.maximum(scale, float(jnp.finfo(dtype).tiny))).astype(dtype)


def _restore(codes: Array, scale: Array, minimum: Array | None, config: QuantizeConfig) -> Array:
    offset = _OFFSETS[config.bits, config.symmetric]
    full = (codes.astype(jnp.float32) - offset) * scale.astype(jnp.float32)[..., None]
    return full if minimum is None else full + minimum.astype(jnp.float32)[..., None]
