"""Which number format is used where in a model."""

import dataclasses

import jax.numpy as jnp

from jaxlm.core.errors import ConfigError, nearest

FLOATS = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Precision:
    """Number formats of a model. Norms, softmax, logits and losses are computed in float32 whatever is said here."""

    params: str = "float32"
    """Format in which weights are initialized and stored."""
    activations: str = "float32"
    """Format of the residual stream and everything elementwise. (On CPUs keep it float32: bfloat16 is slow there.)"""
    matmul: str | None = None
    """Format of the operands of matrix products; accumulation is float32. By default that of the activations."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value not in FLOATS:
                raise ConfigError(f"precision.{field.name} is '{value}': {nearest(str(value), FLOATS)}")

    @property
    def param_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.params)

    @property
    def activation_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.activations)

    @property
    def matmul_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.matmul or self.activations)


BFLOAT16 = Precision(activations="bfloat16")
