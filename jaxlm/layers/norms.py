"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) and LayerNorm (Ba et al. 2016, arXiv 1607.06450)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core.precision import Precision
from jaxlm.layers.params import vector


class RMSNorm(nn.Module):
    """`x / rms(x) * scale` over the last axis, computed in float32.

    `unit_offset` multiplies by `1 + scale` in float32 before casting back (Gemma); otherwise the normalized value is
    cast first and multiplied by `scale` then (Llama). The two differ in bfloat16 alone.
    """

    eps: float = 1e-6
    unit_offset: bool = False
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Float[Array, "*n features"]) -> Float[Array, "*n features"]:
        init = jax.nn.initializers.zeros if self.unit_offset else jax.nn.initializers.ones
        scale = vector(self, "scale", x.shape[-1], "norm", init, self.precision.param_dtype, x.ndim)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.unit_offset:
            return (y * (1.0 + scale.astype(y.dtype))).astype(x.dtype)
        return y.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(var + eps) * scale + bias` over the last axis, computed in float32 (population variance)."""

    eps: float = 1e-5
    use_bias: bool = True
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Float[Array, "*n features"]) -> Float[Array, "*n features"]:
        ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
        dtype = self.precision.param_dtype
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        y = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + self.eps)
        y = y * vector(self, "scale", x.shape[-1], "norm", ones, dtype, x.ndim).astype(y.dtype)
        if self.use_bias:
            y = y + vector(self, "bias", x.shape[-1], "norm", zeros, dtype, x.ndim).astype(y.dtype)
        return y.astype(x.dtype)
