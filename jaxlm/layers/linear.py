"""Linear projections."""

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from jaxlm.core.precision import Precision
from jaxlm.layers.context import Probe
from jaxlm.layers.params import Initializer, vector, weight
from jaxlm.weights import matmul


class Linear(nn.Module):
    """`x @ kernel + bias`, kernel `(in, out)`; its input is the site `<path>.input`."""

    features: int
    axes: tuple[str, str]
    kernel_init: Initializer
    use_bias: bool = False
    bias_axis: str | None = None
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: Float[Array, "*n in"], probe: Probe) -> Float[Array, "*n out"]:
        x = probe("/".join(self.path) + ".input", x)
        dtype = self.precision.param_dtype
        kernel = weight(self, "kernel", (x.shape[-1], self.features), self.axes, self.kernel_init, dtype)
        y = matmul(x, kernel, dtype=self.precision.matmul_dtype)
        if self.use_bias:
            axis = self.bias_axis or self.axes[-1]
            bias = vector(self, "bias", self.features, axis, jax.nn.initializers.zeros, dtype, y.ndim)
            y = y + bias.astype(y.dtype)
        return y
