"""Feed-forward layers: plain, and gated (GLU variants, Shazeer 2020, arXiv 2002.05202)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from jaxlm.core.precision import Precision
from jaxlm.core.sharding import constrain
from jaxlm.layers.context import Probe
from jaxlm.layers.linear import Linear
from jaxlm.layers.params import Initializer

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
}


class MLP(nn.Module):
    """`down(act(gate(x)) * up(x))` if gated, else `down(act(up(x)))`."""

    hidden: int
    activation: str
    gated: bool
    use_bias: bool
    kernel_init: Initializer
    out_kernel_init: Initializer
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Float[Array, "batch length embed"], probe: Probe) -> Float[Array, "batch length embed"]:
        def linear(name: str, features: int, axes: tuple[str, str], init: Initializer) -> Linear:
            bias_axis = "norm" if axes[-1] == "embed" else None
            return Linear(features, axes, init, self.use_bias, bias_axis, self.precision, name=name)

        activation = ACTIVATIONS[self.activation]

        def widen(name: str) -> Float[Array, "batch length mlp"]:
            wide = linear(name, self.hidden, ("embed", "mlp"), self.kernel_init)(x, probe)
            return checkpoint_name(wide, "mlp_projection")

        up = widen("up")
        if self.gated:
            hidden = activation(widen("gate")) * up
        else:
            hidden = activation(up)
        hidden = constrain(hidden, "batch", "length", "act_mlp")
        return linear("down", x.shape[-1], ("mlp", "embed"), self.out_kernel_init)(hidden, probe)
