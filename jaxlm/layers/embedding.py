"""Token embeddings, learned positions, and the projection to the vocabulary."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core.precision import Precision
from jaxlm.core.sharding import constrain
from jaxlm.layers.params import Initializer, weight
from jaxlm.weights import Weight, matmul, matmul_transposed, take


class Embedding(nn.Module):
    """A table `(rows, embed)` read by index, scaled by `scale` (rounded to the table's format, as Gemma does)."""

    rows: int
    embed: int
    axes: tuple[str, str]
    kernel_init: Initializer
    scale: float | None = None
    precision: Precision = Precision()

    def setup(self):
        shape = (self.rows, self.embed)
        self.table = weight(self, "table", shape, self.axes, self.kernel_init, self.precision.param_dtype)

    def __call__(self, ids: Int[Array, "batch length"]) -> Float[Array, "batch length embed"]:
        table = self.table
        if not isinstance(table, Weight):
            # Gathered over its features once; otherwise each looked-up row would be.
            table = constrain(table, self.axes[0], None)
        x = take(table, ids).astype(self.precision.activation_dtype)
        if self.scale is not None:
            x = x * jnp.asarray(self.scale, self.table.dtype).astype(x.dtype)
        return constrain(x, "batch", "length", "act_embed")

    def project(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length rows"]:
        """Float32 logits of a tied head: `x @ table.T`."""
        logits = matmul_transposed(x.astype(jnp.float32), self.table, dtype=self.precision.matmul_dtype)
        return constrain(logits, "batch", "length", "act_vocab")


class Head(nn.Module):
    """The projection `(embed, vocab)` to float32 logits."""

    vocab_size: int
    kernel_init: Initializer
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"]) -> Float[Array, "batch length vocab"]:
        shape = (x.shape[-1], self.vocab_size)
        kernel = weight(self, "kernel", shape, ("embed", "vocab"), self.kernel_init, self.precision.param_dtype)
        logits = matmul(x.astype(jnp.float32), kernel, dtype=self.precision.matmul_dtype)
        return constrain(logits, "batch", "length", "act_vocab")
