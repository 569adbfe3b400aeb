"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), half-split pairing, and their rescalings.

The pairing is that of the Hugging Face checkpoints: dimension `i` is rotated with dimension `i + dim/2`.
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import ConfigError, nearest

KINDS = ("linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A change of the rotation frequencies that stretches the context."""

    kind: str
    """`linear` (Chen et al. 2023, arXiv 2306.15595), `dynamic` (NTK-aware, base grows with the length),
    `llama3` (Llama 3.1), `yarn` (Peng et al. 2023, arXiv 2309.00071)."""
    factor: float
    original_length: int
    """Context length of the model before stretching."""
    low_frequency_factor: float = 1.0
    """Of `llama3`."""
    high_frequency_factor: float = 4.0
    """Of `llama3`."""
    beta_fast: float = 32.0
    """Of `yarn`: dimensions that turn more often than this over the original length keep their frequency."""
    beta_slow: float = 1.0
    """Of `yarn`: dimensions that turn less often than this are divided by the factor."""
    attention_factor: float | None = None
    """Of `yarn`: multiplies sine and cosine; by default `0.1 ln(factor) + 1`."""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ConfigError(f"rope_scaling.kind is '{self.kind}': {nearest(self.kind, KINDS)}")
        if not 1 <= self.factor < math.inf:
            raise ConfigError(f"rope_scaling.factor is {self.factor}, expected >= 1")
        for name in ("original_length", "beta_fast", "beta_slow"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"rope_scaling.{name} is {getattr(self, name)}, expected a positive number")


def frequencies(dim: int, theta: float, scaling: RopeScaling | None = None, length=None) -> Float[Array, "half"]:
    """Radians per position of the `dim / 2` rotated pairs.

    `length` (a number, may be traced) is the current sequence length, which `dynamic` scaling depends on.
    """
    exponents = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    plain = theta**-exponents
    if scaling is None:
        return plain
    factor, original = scaling.factor, scaling.original_length
    match scaling.kind:
        case "linear":
            return plain / factor
        case "dynamic":
            current = jnp.maximum(jnp.asarray(original if length is None else length, jnp.float32), original)
            base = theta * (factor * current / original - (factor - 1)) ** (dim / (dim - 2))
            return base**-exponents
        case "llama3":
            low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
            turns = original * plain / (2 * math.pi)
            smooth = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
            return (1 - smooth) * plain / factor + smooth * plain
        case _:  # yarn

            def dimension(turns: float) -> float:
                return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

            low = max(math.floor(dimension(scaling.beta_fast)), 0)
            high = min(math.ceil(dimension(scaling.beta_slow)), dim - 1)
            ramp = jnp.clip((jnp.arange(dim // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3), 0.0, 1.0)
            return plain / factor * ramp + plain * (1 - ramp)


def ntk_theta(theta: float, dim: int, factor: float) -> float:
    """The theta for a context longer by `factor`, positions left as they are: `theta * factor^(dim / (dim - 2))`.

    The slowest of the `dim / 2` rotated pairs turns `factor` times slower, as with interpolation, the fastest stays.
    (NTK-aware scaling, bloc97 2023; YaRN, Peng et al. 2023, arXiv 2309.00071, section 3.1. A theta chosen by hand is
    the adjusted base frequency of Xiong et al. 2023, arXiv 2309.16039.)

    Raises `ConfigError` for a factor below 1, or fewer than two pairs.
    """
    if factor < 1:
        raise ConfigError(f"factor is {factor}, expected >= 1")
    if dim < 4:
        raise ConfigError(f"{dim} rotated dimensions, expected at least 4")
    return theta * factor ** (dim / (dim - 2))


def tables(
    positions: Int[Array, "batch length"], dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]:
    """Cosines and sines of the rotation angles at `positions`, in float32, for `dim` rotated dimensions."""
    length = jnp.max(positions) + 1 if scaling is not None and scaling.kind == "dynamic" else None
    angles = positions[..., None].astype(jnp.float32) * frequencies(dim, theta, scaling, length)[None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is not None and scaling.kind == "yarn":
        gain = scaling.attention_factor
        gain = 0.1 * math.log(scaling.factor) + 1.0 if gain is None else gain
        cos, sin = cos * gain, sin * gain
    return cos, sin


def rotate(
    x: Float[Array, "batch length heads dim"],
    cos: Float[Array, "batch length half"],
    sin: Float[Array, "batch length half"],
) -> Float[Array, "batch length heads dim"]:
    """Rotates the first `2 * half` dimensions of each head; the others pass through."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :].astype(x.dtype), sin[:, :, None, :].astype(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)
