"""Number formats of few bits, exactly: floating point, integers, fixed point; rounding to nearest and at random.

    e4m3 = number_format("e4m3")
    values = e4m3.round(x)                    # float32, each one a value of the format; too large ones saturate
    codes = e4m3.encode(values)               # the bits, as whole numbers; e4m3.decode(codes) == values
    random = e4m3.round(x, key)               # stochastic: the mean over keys is x

Values are carried in float32, which holds every one of them, so that all of this runs the same on any platform.
What shares a scale is `jaxlm.core.scaled`'s business.

Sources: FP8 Formats for Deep Learning (Micikevicius et al., 2022, arXiv 2209.05433); OCP Microscaling Formats
specification 1.0 (2023); Deep Learning with Limited Numerical Precision (Gupta et al., 2015, arXiv 1502.02551).
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Format:
    """A finite set of numbers. `largest` and `smallest` are its greatest and least, `bits` what one takes."""

    name: str
    bits: int
    largest: float
    smallest: float

    @property
    def exponent(self) -> int:
        """That of the largest power of two in the format."""
        return math.floor(math.log2(self.largest))

    def round(self, x: Float[Array, "..."], key: jax.Array | None = None) -> Float[Array, "..."]:
        """The nearest value (ties to even), float32; with `key` one of the two neighbors, so that the mean is `x`.

        What is too large becomes the largest value; IEEE's formats (`float16`, `bfloat16`) have infinities for that.
        NaN stays NaN. Random neighbors are chosen to 1/65,536 of their distance.
        """
        raise NotImplementedError(f"{type(self).__name__}.round")

    def encode(self, values: Float[Array, "..."]) -> Int[Array, "..."]:
        """The code of each of the format's values, as the hardware stores it."""
        raise NotImplementedError(f"{type(self).__name__}.encode")

    def decode(self, codes: Int[Array, "..."]) -> Float[Array, "..."]:
        """The inverse of `encode`, float32."""
        raise NotImplementedError(f"{type(self).__name__}.decode")


@dataclasses.dataclass(frozen=True)
class FloatFormat(Format):
    """Sign, exponent and mantissa, with subnormal numbers. `infinite`: what is too large becomes infinite."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    infinite: bool = False
    dtype: str | None = None
    """JAX's name of it."""

    @property
    def least_exponent(self) -> int:
        """That of the smallest normal number."""
        return 1 - self.bias

    def round(self, x: Float[Array, "..."], key: jax.Array | None = None) -> Float[Array, "..."]:
        x = x.astype(jnp.float32)
        if self.name == "bfloat16":  # Quanta below float32's normal range would be flushed to zero.
            return jax.lax.reduce_precision(x, 8, 7) if key is None else _truncated(x, key)
        if not self.infinite:
            x = jnp.clip(x, self.smallest, self.largest)
        exponent = jnp.maximum(_exponent(x), self.least_exponent)
        quantum = _power_of_two(exponent - self.mantissa_bits)
        y = _whole(x / quantum, key) * quantum
        if self.infinite:
            y = jnp.where(jnp.abs(y) > self.largest, jnp.sign(y) * jnp.inf, y)
        return y

    def encode(self, values: Float[Array, "..."]) -> Int[Array, "..."]:
        values = values.astype(jnp.float32)
        if self.name == "bfloat16":
            return (jax.lax.bitcast_convert_type(values, jnp.uint32) >> 16).astype(jnp.uint16)
        exponent = jnp.clip(_exponent(values), self.least_exponent, self.exponent)
        mantissa = jnp.abs(values) / _power_of_two(exponent - self.mantissa_bits)
        # A normal number's mantissa has its leading one, which adds 1 to the exponent's field.
        size = mantissa.astype(jnp.int32) + ((exponent - self.least_exponent) << self.mantissa_bits)
        sign = jnp.signbit(values).astype(jnp.int32) << (self.bits - 1)
        return (sign | size).astype(jnp.uint8 if self.bits <= 8 else jnp.uint16)

    def decode(self, codes: Int[Array, "..."]) -> Float[Array, "..."]:
        if self.name == "bfloat16":
            return jax.lax.bitcast_convert_type(codes.astype(jnp.uint32) << 16, jnp.float32)
        codes = codes.astype(jnp.int32)
        size = codes & ((1 << (self.bits - 1)) - 1)
        field = size >> self.mantissa_bits
        mantissa = (size & ((1 << self.mantissa_bits) - 1)) + jnp.where(field > 0, 1 << self.mantissa_bits, 0)
        exponent = jnp.maximum(field, 1) - self.bias - self.mantissa_bits
        value = mantissa.astype(jnp.float32) * _power_of_two(exponent)
        return jnp.where(codes >> (self.bits - 1), -value, value)


@dataclasses.dataclass(frozen=True)
class GridFormat(Format):
    """Whole numbers from `smallest / step` to `largest / step`, times `step`, a power of two."""

    step: float = 1.0

    def round(self, x: Float[Array, "..."], key: jax.Array | None = None) -> Float[Array, "..."]:
        x = jnp.clip(x.astype(jnp.float32), self.smallest, self.largest)
        return _whole(x / self.step, key) * self.step

    def encode(self, values: Float[Array, "..."]) -> Int[Array, "..."]:
        return (values / self.step).astype(jnp.int8 if self.bits <= 8 else jnp.int32)

    def decode(self, codes: Int[Array, "..."]) -> Float[Array, "..."]:
        return codes.astype(jnp.float32) * self.step


@dataclasses.dataclass(frozen=True)
class Unrounded(Format):
    """float32 itself."""

    def round(self, x: Float[Array, "..."], key: jax.Array | None = None) -> Float[Array, "..."]:
        return x.astype(jnp.float32)

    def encode(self, values: Float[Array, "..."]) -> Int[Array, "..."]:
        return jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)

    def decode(self, codes: Int[Array, "..."]) -> Float[Array, "..."]:
        return jax.lax.bitcast_convert_type(codes.astype(jnp.uint32), jnp.float32)


def fixed_point(integer_bits: int, fraction_bits: int) -> GridFormat:
    """Signed fixed point `<IL, FL>`: multiples of `2^-FL` in `[-2^(IL-1), 2^(IL-1) - 2^-FL]` (Gupta et al., 2015).

    Raises:
      ConfigError: fewer than 1 integer bit (the sign's), negative fraction bits, more than 24 bits in all.
    """
    bits = integer_bits + fraction_bits
    if integer_bits < 1 or fraction_bits < 0 or bits > 24:
        raise ConfigError(
            f"fixed point with {integer_bits} integer and {fraction_bits} fraction bits: expected at least 1 and 0, "
            "and no more than 24 in all"
        )
    step, bound = 2.0**-fraction_bits, 2.0 ** (integer_bits - 1)
    return GridFormat(f"q{integer_bits}.{fraction_bits}", bits, bound - step, -bound, step)


def _float(name: str, exponent: int, mantissa: int, bias: int, largest: float, dtype: str | None = None) -> Format:
    infinite = name in ("float16", "bfloat16")
    return FloatFormat(name, 1 + exponent + mantissa, largest, -largest, exponent, mantissa, bias, infinite, dtype)


FORMATS: dict[str, Format] = {
    "float32": Unrounded("float32", 32, float(jnp.finfo(jnp.float32).max), float(jnp.finfo(jnp.float32).min)),
    "bfloat16": _float("bfloat16", 8, 7, 127, float(jnp.finfo(jnp.bfloat16).max), "bfloat16"),
    "float16": _float("float16", 5, 10, 15, 65504.0, "float16"),
    "e4m3": _float("e4m3", 4, 3, 7, 448.0, "float8_e4m3fn"),
    "e5m2": _float("e5m2", 5, 2, 15, 57344.0, "float8_e5m2"),
    "e3m2": _float("e3m2", 3, 2, 3, 28.0),
    "e2m3": _float("e2m3", 2, 3, 1, 7.5),
    "e2m1": _float("e2m1", 2, 1, 1, 6.0, "float4_e2m1fn"),
    # Symmetric: the least code of two's complement is left out.
    "int8": GridFormat("int8", 8, 127.0, -127.0),
    "int4": GridFormat("int4", 4, 7.0, -7.0),
    "ternary": GridFormat("ternary", 2, 1.0, -1.0),
}
"""Formats by name. `q<IL>.<FL>`, as in `q2.6` (the elements of MXINT8), is fixed point. E4M3 is the one without
infinities; what overflows in E5M2 saturates too."""


@functools.cache
def number_format(name: str) -> Format:
    """The format of a name; `ConfigError` for names that there are not."""
    if match := re.fullmatch(r"q(\d+)\.(\d+)", name):
        return fixed_point(int(match[1]), int(match[2]))
    if name not in FORMATS:
        raise ConfigError(f"no number format '{name}': {nearest(name, [*FORMATS, 'q3.13'])}")
    return FORMATS[name]


def stochastic_round(x: Float[Array, "..."], key: jax.Array, name: str = "bfloat16") -> Float[Array, "..."]:
    """`x` rounded at random to a format, in that format's dtype where JAX has it and else float32.

    The mean over keys is `x`, up to 1/65,536 of the distance between neighbors (exactly for bfloat16).
    """
    y = number_format(name).round(x, key)
    dtype = getattr(number_format(name), "dtype", None)
    return y if dtype is None else y.astype(dtype)


def e8m0(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """The shared scale `2^exponent` of an MX block. Exponents are held in [-126, 127]: E8M0 also has -127, which
    float32 on most hardware flushes to zero, so blocks that small (below `2^-118` for E4M3) lose one bit."""
    return _power_of_two(jnp.clip(exponent, -126, 127))


def floor_log2(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """The exponent of the largest power of two that is no larger than `|x|`, exactly; -127 for zero."""
    return _exponent(x.astype(jnp.float32))


def _exponent(x: Array) -> Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return ((bits >> 23) & 0xFF) - 127


def _power_of_two(exponent: Array) -> Array:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _whole(x: Array, key: jax.Array | None) -> Array:
    if key is None:
        return jnp.round(x)
    # Rounded down where the fraction is below a uniform number, half a step from both its ends: no bias.
    noise = (jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.float32) + 0.5) * 2.0**-16
    low = jnp.floor(x)
    return low + (x - low > noise)


def _truncated(x: Array, key: jax.Array) -> Array:
    """bfloat16 at random: a uniform 16-bit number is added to the bits that are then cut off."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    y = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), y, x)
