"""Products under a precision policy: forward and both gradients, each operand rounded as the policy says.

    y = quantized_matmul(x, w, precision_policy("fp8_current"))
    dense = nn.Dense(64, dot_general=functools.partial(quantized_dot_general, policy=policy))     # any Flax layer

Where the hardware multiplies a format the product is its own; elsewhere values are multiplied in a wider format that
holds them exactly, so that the same numbers come out up to the order of float32 sums: integers are exact, and so is
every single product.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError
from jaxlm.core.formats import GridFormat
from jaxlm.core.policies import PrecisionPolicy, Product
from jaxlm.core.scaled import PLAIN, Quantizer, Scaled, cut, dequantize, quantize, spread_blocks
from pallas_kernels import target as targets

# Products of so many int8 pairs still add up exactly in float32.
_EXACT_INTEGERS = 1024


def quantized_matmul(
    x: Float[Array, "*n in"],
    w: Float[Array, "in out"],
    policy: PrecisionPolicy,
    *,
    dtype: Any = None,
    scales: Float[Array, "3"] | None = None,
    meter: Float[Array, "3"] | None = None,
    key: jax.Array | None = None,
) -> Float[Array, "*n out"]:
    """`x @ w`, with `dgrad` and `wgrad` of the policy as its gradients; the result has the dtype of `x`.

    Args:
      dtype: in which operands that stay as they are get multiplied, by default that of `x`; sums are float32.
      scales: of `x`, `w` and the gradient of the result, for delayed scaling.
      meter: zeros whose "gradient" is what this product saw: the largest magnitudes of those three.
      key: for rounding at random.

    Raises:
      ConfigError: the policy needs scales or a key that are not given, or native products that the platform does not
        have.
    """
    if policy.is_random and key is None:
        raise ConfigError(f"precision policy '{policy.name}' rounds at random: its products need a key")
    if policy.history and scales is None:
        raise ConfigError(f"precision policy '{policy.name}' scales by a history: its products need scales")
    how = _How(policy, jnp.dtype(dtype or x.dtype).name, _implementation(policy))
    rows = x.reshape(-1, x.shape[-1])
    return _product(how, rows, w, scales, meter, key).reshape(*x.shape[:-1], w.shape[-1])


def quantized_dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    policy: PrecisionPolicy,
    key: jax.Array | None = None,
) -> Array:
    """`jax.lax.dot_general` under a policy: a function for the `dot_general` argument of other libraries' layers.

    `lhs` is the activation, `rhs` the weight. Batch dimensions are mapped over, each entry with randomness of
    its own. A policy that changes nothing is `lax.dot_general` itself; delayed scaling needs state, and so
    `quantized_matmul`.
    """
    options = {"precision": precision, "preferred_element_type": preferred_element_type}
    if policy.is_plain:
        return jax.lax.dot_general(lhs, rhs, dimension_numbers, **options)
    (summed_l, summed_r), (batch_l, batch_r) = dimension_numbers
    free_l = [i for i in range(lhs.ndim) if i not in (*summed_l, *batch_l)]
    free_r = [i for i in range(rhs.ndim) if i not in (*summed_r, *batch_r)]
    batch = [lhs.shape[i] for i in batch_l]
    size = int(np.prod([lhs.shape[i] for i in summed_l]))
    x = jnp.transpose(lhs, (*batch_l, *free_l, *summed_l)).reshape(*batch, -1, size)
    w = jnp.transpose(rhs, (*batch_r, *summed_r, *free_r)).reshape(*batch, size, -1)

    def multiply(x: Array, w: Array, key: jax.Array | None) -> Array:
        return quantized_matmul(x, w, policy, key=key)

    if key is not None and batch:
        key = jax.random.split(key, tuple(batch))
    for _axis in batch:
        multiply = jax.vmap(multiply)
    shape = (*batch, *(lhs.shape[i] for i in free_l), *(rhs.shape[i] for i in free_r))
    y = multiply(x, w, key).reshape(shape)
    return y if preferred_element_type is None else y.astype(preferred_element_type)


def require_native(policy: PrecisionPolicy) -> None:
    """Raises `ConfigError` if the policy is for native products and the ambient platform lacks one of them."""
    if policy.implementation != "native":
        return
    target = targets.current()
    for quantizer in {q for product in policy.products for q in product.operands if not q.is_plain}:
        if not _has(target, quantizer):
            scale = "" if quantizer.scale == "float32" else f" in blocks with {quantizer.scale} scales"
            raise ConfigError(
                f"precision policy '{policy.name}' multiplies {quantizer.format}{scale}, of which "
                f"{target.kind or target.platform} has no products: implementation 'emulated' computes the same "
                "values in a wider format, and 'auto' takes what there is"
            )


@dataclasses.dataclass(frozen=True)
class _How:
    policy: PrecisionPolicy
    dtype: str
    native: bool


def _implementation(policy: PrecisionPolicy) -> bool:
    require_native(policy)
    if policy.implementation == "auto":
        target = targets.current()
        # Scales of blocks within a product: only when asked for.
        used = [q for product in policy.products for q in product.operands if not q.is_plain]
        return all(_has(target, q) and q.scale == "float32" for q in used)
    return policy.implementation == "native"


def _has(target: targets.Target, q: Quantizer) -> bool:
    """Whether the hardware multiplies a format, with the scales that belong to it."""
    blackwell = target.platform == "gpu" and re.search(r"\bG?B(100|200|300)\b", target.kind) is not None
    if q.scale in ("e8m0", "e4m3"):
        return blackwell and (q.format, q.scale, q.block) in (
            ("e4m3", "e8m0", (1, 32)), ("e5m2", "e8m0", (1, 32)), ("e2m1", "e4m3", (1, 16)),
        )  # fmt: skip
    match q.format:
        case "int8":
            return target.platform == "gpu" or (target.chip is not None and target.chip.int8_matmul)
        case "e4m3" | "e5m2":
            return target.hopper or blackwell or "TPU7" in target.kind
        case "bfloat16":
            return target.platform in ("gpu", "tpu")
        case "float16":
            return target.platform == "gpu"
    return False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _How, x: Array, w: Array, scales: Array | None, meter: Array | None, key: jax.Array | None) -> Array:
    pair = how.policy.forward
    y = _multiply(how, pair, _operands(pair, x, w, (1, 0), scales, (0, 1), key, 0), (1, 0))
    return y.astype(x.dtype)


def _product_forward(how: _How, x: Array, w: Array, scales: Any, meter: Any, key: Any) -> tuple[Array, tuple]:
    return _product(how, x, w, scales, meter, key), (x, w, scales, meter, key)


def _product_backward(how: _How, saved: tuple, g: Array) -> tuple:
    x, w, scales, meter, key = saved
    policy, seen = how.policy, None
    if meter is not None:
        seen = jnp.stack([jnp.max(jnp.abs(a)).astype(meter.dtype) for a in (x, w, g)])

    def as_forward(a: Array, q: Quantizer, operand: int, summed: int) -> Array:
        random = None if key is None else jax.random.fold_in(key, operand)
        given = scales[operand] if q.history else None
        return dequantize(quantize(a, q, summed=summed, key=random, scale=given), q, summed=summed)

    pair, right = policy.dgrad, w
    if pair.rhs is None:
        pair, right = dataclasses.replace(pair, rhs=PLAIN), as_forward(w, policy.forward.rhs, 1, 0)
    dx = _multiply(how, pair, _operands(pair, g, right, (1, 1), scales, (2, 1), key, 2), (1, 1))
    pair, left = policy.wgrad, x
    if pair.lhs is None:
        pair, left = dataclasses.replace(pair, lhs=PLAIN), as_forward(x, policy.forward.lhs, 0, 1)
    dw = _multiply(how, pair, _operands(pair, left, g, (0, 0), scales, (0, 2), key, 4), (0, 0))
    return dx.astype(x.dtype), dw.astype(w.dtype), None, seen, None


_product.defvjp(_product_forward, _product_backward)


def _operands(
    pair: Product, a: Array, b: Array, summed: tuple, scales: Any, places: tuple, key: Any, number: int
) -> tuple[Scaled, Scaled]:
    """Both operands as the pair says. `places`: of each one's scale among those of `x`, `w` and `g`."""
    if pair.hadamard:
        signs = jax.random.rademacher(jax.random.fold_in(key, 16 + number), (pair.hadamard,), jnp.float32)
        a, b = (_rotate(m, axis, signs) for m, axis in zip((a, b), summed, strict=True))

    def one(m: Array, q: Quantizer, axis: int, place: int, count: int) -> Scaled:
        if q.is_plain:
            return Scaled(m, jnp.ones((1, 1), jnp.float32), jnp.ones((), jnp.float32))
        random = jax.random.fold_in(key, count) if q.rounding == "stochastic" else None
        return quantize(m, q, summed=axis, key=random, scale=scales[place] if q.history else None)

    return one(a, pair.lhs, summed[0], places[0], number), one(b, pair.rhs, summed[1], places[1], number + 1)


def _rotate(m: Array, axis: int, signs: Array) -> Array:
    """Random signs, then a Hadamard matrix, on each block of an axis (filled up with zeros): orthonormal."""
    size = signs.shape[0]
    h = np.ones((1, 1), np.float32)
    while h.shape[0] < size:
        h = np.block([[h, h], [h, -h]])
    mix = signs[:, None] * jnp.asarray(h * size**-0.5)
    blocks = cut(jnp.moveaxis(m.astype(jnp.float32), axis, -1), 1, size)
    rotated = jnp.matmul(blocks, mix, precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(rotated.reshape(blocks.shape[0], -1), -1, axis)


def _multiply(how: _How, pair: Product, operands: tuple[Scaled, Scaled], summed: tuple[int, int]) -> Array:
    """`sum_k a_k b_k` of two scaled matrices, `[free of a, free of b]`, float32."""
    quantizers = (pair.lhs, pair.rhs)
    if how.native and pair.lhs.scale in ("e8m0", "e4m3"):
        return _block_scaled(pair, operands, summed)
    in_blocks = [
        q.block is not None and q.scale == "float32" and s.scale.shape[axis] > 1
        for q, s, axis in zip(quantizers, operands, summed, strict=True)
    ]
    if any(in_blocks):
        if len({q.block and q.block[1] for q in quantizers}) == 1:
            return _sum_of_blocks(how, pair, operands, summed)
        # Blocks that do not pair up: the matrices that they stand for are multiplied.
        full = [dequantize(s, q, summed=axis) for q, s, axis in zip(quantizers, operands, summed, strict=True)]
        return _dot(how, (PLAIN, PLAIN), full, summed)
    values, factors = [], []
    for q, s, axis in zip(quantizers, operands, summed, strict=True):
        if s.scale.shape[axis] > 1:  # Scales of few bits: their product with a value is exact.
            values.append(s.values * spread_blocks(s.scale, s.values.shape, q.block, axis))
            factors.append(s.whole)
        else:
            values.append(s.values)
            factors.append(_along_free(s, q, axis) * s.whole)
    a, b = (f if f.ndim == 0 else f.reshape(shape) for f, shape in zip(factors, ((-1, 1), (1, -1)), strict=True))
    y = _dot(how, quantizers, values, summed)
    if all(q.block is None for q in quantizers):
        return y
    return y * (a * b)


def _along_free(s: Scaled, q: Quantizer, axis: int) -> Array:
    """The scale of each row or column of the result; one for all if there is one."""
    if q.block is None:
        return jnp.ones((), jnp.float32)
    return jnp.squeeze(spread_blocks(s.scale, s.values.shape, q.block, axis), axis)


def _sum_of_blocks(how: _How, pair: Product, operands: tuple[Scaled, Scaled], summed: tuple[int, int]) -> Array:
    """Products of blocks along the summed axis, each scaled by its own two scales, added up in float32."""
    quantizers, parts = (pair.lhs, pair.rhs), []
    count = max(s.scale.shape[axis] for s, axis in zip(operands, summed, strict=True))
    for q, s, axis in zip(quantizers, operands, summed, strict=True):
        values = jnp.moveaxis(cut(s.values, axis, q.block[1]), axis, 0)  # [blocks, ...], the summed axis where it was
        shape = (s.values.shape[0], count) if axis == 1 else (count, s.values.shape[1])
        free = spread_blocks(s.scale, s.values.shape, (q.block[0], None), axis)
        scale = jnp.broadcast_to(free, shape)
        parts.append((values, jnp.moveaxis(scale, axis, 0)))

    def add(y: Array, block: tuple) -> tuple[Array, None]:
        (a, scale_a), (b, scale_b) = block
        return y + _dot(how, quantizers, (a, b), summed) * (scale_a[:, None] * scale_b[None, :]), None

    shape = tuple(s.values.shape[1 - axis] for s, axis in zip(operands, summed, strict=True))
    return jax.lax.scan(add, jnp.zeros(shape, jnp.float32), tuple(parts))[0]


def _dot(how: _How, quantizers: tuple[Quantizer, Quantizer], values: Any, summed: tuple[int, int]) -> Array:
    """The product of values as they are stored, by the hardware's own or in a format that holds them."""
    a, b = values
    dims = (((summed[0],), (summed[1],)), ((), ()))
    formats = [q.number_format for q in quantizers]
    if all(isinstance(f, GridFormat) and f.step == 1 for f in formats):
        return _integer_dot(a, b, dims, how.native)
    plain = [q.is_plain for q in quantizers]
    if any(plain):
        dtype, exact = jnp.dtype(how.dtype), None
    elif how.native and all(q.scale == "float32" for q in quantizers):
        return jax.lax.dot_general(
            *(v.astype(f.dtype) for v, f in zip((a, b), formats, strict=True)),
            dims,
            preferred_element_type=jnp.float32,
        )
    elif targets.current().platform != "cpu" and not any(q.format.startswith(("q", "float16")) for q in quantizers):
        dtype, exact = jnp.dtype("bfloat16"), None  # Values of 8 significant bits or fewer.
    else:
        dtype, exact = jnp.dtype("float32"), jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        a.astype(dtype), b.astype(dtype), dims, precision=exact, preferred_element_type=jnp.float32
    )


def _integer_dot(a: Array, b: Array, dims: Any, native: bool) -> Array:
    """Exact sums of products of integers up to 127, as float32."""
    ((i,), (j,)), _ = dims
    size = a.shape[i]
    if native:
        a, b = a.astype(jnp.int8), b.astype(jnp.int8)
        return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.int32).astype(jnp.float32)
    multiply = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=dims,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    if size <= _EXACT_INTEGERS:
        return multiply(a, b)
    pieces = (jnp.moveaxis(cut(m, axis, _EXACT_INTEGERS), axis, 0) for m, axis in ((a, i), (b, j)))
    shape = (a.shape[1 - i], b.shape[1 - j])

    def add(y: Array, piece: tuple) -> tuple[Array, None]:
        return y + multiply(*piece).astype(jnp.int32), None

    return jax.lax.scan(add, jnp.zeros(shape, jnp.int32), tuple(pieces))[0].astype(jnp.float32)


def _block_scaled(pair: Product, operands: tuple[Scaled, Scaled], summed: tuple[int, int]) -> Array:
    """Blackwell's own product of MX and NVFP4 operands."""
    arrays = []
    for q, s, axis in zip((pair.lhs, pair.rhs), operands, summed, strict=True):
        values, scale = (s.values, s.scale) if axis == 1 else (s.values.T, s.scale.T)
        scale_dtype = jnp.float8_e8m0fnu if q.scale == "e8m0" else jnp.float8_e4m3fn
        arrays.append((values.astype(q.number_format.dtype)[None], scale.astype(scale_dtype)[None]))
    (a, scale_a), (b, scale_b) = arrays
    y = jax.nn.scaled_matmul(a, b, scale_a, scale_b, preferred_element_type=jnp.float32)[0]
    return y * (operands[0].whole * operands[1].whole)
