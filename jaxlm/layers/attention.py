"""Grouped-query self-attention with rotary positions, optional head normalization, cache and extra sources."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxlm.core.precision import Precision
from jaxlm.core.sharding import constrain
from jaxlm.layers import rotary
from jaxlm.layers.attend import KeyValues, Visible, attend, attend_with_weights
from jaxlm.layers.context import Probe
from jaxlm.layers.linear import Linear
from jaxlm.layers.norms import RMSNorm
from jaxlm.layers.params import Initializer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """What one layer's attention needs beside the hidden state.

    `rope`: cosines and sines, or `None` for none. `visible`: what its own tokens see. `key_bias`: on its own keys.
    `others`: sources beside its own keys and values (cache, extra keys). `scale`: of the logits.
    """

    rope: tuple[Array, Array] | None
    visible: Visible
    scale: Float[Array, ""] | float
    key_bias: Float[Array, "batch length"] | None = None
    others: tuple[KeyValues, ...] = ()


class Attention(nn.Module):
    """Projects to queries, keys and values, attends, projects back. Returns its new keys and values (rotated) too."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    norm_eps: float
    norm_unit_offset: bool
    softcap: float | None
    implementation: str
    kernel_init: Initializer
    out_kernel_init: Initializer
    precision: Precision = Precision()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length embed"], inputs: AttentionInputs, probe: Probe
    ) -> tuple[Float[Array, "batch length embed"], tuple[Array, Array]]:
        batch, length, embed = x.shape

        def heads(name: str, count: int, axis: str) -> Float[Array, "batch length heads head_dim"]:
            axes = ("embed", axis)
            linear = Linear(
                count * self.head_dim, axes, self.kernel_init, self.qkv_bias, precision=self.precision, name=name
            )
            projected = checkpoint_name(linear(x, probe), "attention_projection")
            return projected.reshape(batch, length, count, self.head_dim)

        def norm(name: str) -> RMSNorm:
            return RMSNorm(self.norm_eps, self.norm_unit_offset, self.precision, name=name)

        q = heads("query", self.num_heads, "heads")
        k = heads("key", self.num_kv_heads, "kv_heads")
        v = heads("value", self.num_kv_heads, "kv_heads")
        if self.qk_norm:
            q, k = norm("query_norm")(q), norm("key_norm")(k)
        if inputs.rope is not None:
            q, k = rotary.rotate(q, *inputs.rope), rotary.rotate(k, *inputs.rope)
        q = constrain(q, "batch", "length", "act_heads", None)
        k = constrain(k, "batch", "length", "act_kv_heads", None)
        v = constrain(v, "batch", "length", "act_kv_heads", None)

        sources = (*inputs.others, KeyValues(k, v, inputs.visible, inputs.key_bias))
        options = {"scale": inputs.scale, "softcap": self.softcap, "dtype": self.precision.matmul_dtype}
        if probe.wants("attn_weights"):
            out, weights = attend_with_weights(q, sources, **options)
            probe("attn_weights", weights)
        else:
            out = attend(q, sources, implementation=self.implementation, **options)
        out = constrain(out, "batch", "length", "act_heads", None)
        flat = jnp.reshape(out, (batch, length, self.num_heads * self.head_dim))
        linear = Linear(
            embed, ("heads", "embed"), self.out_kernel_init, self.out_bias, "norm", self.precision, name="out"
        )
        return linear(flat, probe), (k, v)
