"""A rate network in continuous time, after Euler's method: the recurrent network of neuroscience.

    h_t = relu((1 - alpha) h_{t-1} + alpha (W_in x_t + W_rec h_{t-1})),    y_t = W_out h_t,    h_0 = 0

with `alpha = dt / tau` and no biases. At `alpha = 1` it is a plain ReLU network. As in the released code of Liu et al.
(2024, arXiv 2310.08513), the leak is inside the ReLU.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError
from jaxlm.core.keys import fold
from jaxlm.models.initialization import low_rank_init

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class CTRNN:
    """The functions of a network; it holds no weights. Kernels are `(in, out)`: `y = x @ kernel`."""

    num_inputs: int
    num_hidden: int
    num_outputs: int
    alpha: float = 1.0

    def __post_init__(self):
        for name in ("num_inputs", "num_hidden", "num_outputs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}, expected above 0 and at most 1")

    def init(
        self, key: jax.Array, *, rank: int | Array | None = None, gain: float = 1.25, match: str | None = "frobenius"
    ) -> dict[str, Any]:
        """Fresh variables `{"params": ...}`: recurrent weights of deviation `gain / sqrt(hidden)`, of `rank` if given
        (see `low_rank_init`), others uniform in `+- 1 / sqrt(fan in)`."""
        n = self.num_hidden

        def uniform(name: str, shape: tuple[int, int]) -> Array:
            return jax.random.uniform(fold(key, name), shape, minval=-1.0, maxval=1.0) / shape[0] ** 0.5

        return {
            "params": {
                "input": {"kernel": uniform("input", (self.num_inputs, n))},
                "recurrent": {"kernel": low_rank_init(fold(key, "recurrent"), (n, n), rank, gain=gain, match=match)},
                "output": {"kernel": uniform("output", (n, self.num_outputs))},
            }
        }

    def axes(self) -> dict[str, Any]:
        """The tree of logical axis names of the parameters."""
        names = {"input": ("inputs", "hidden"), "recurrent": ("hidden", "hidden"), "output": ("hidden", "outputs")}
        return {name: {"kernel": axes} for name, axes in names.items()}

    def apply(
        self, variables: Mapping[str, Params], inputs: Float[Array, "batch length inputs"]
    ) -> Float[Array, "batch length outputs"]:
        """The outputs at every step."""
        return self.run(variables["params"], inputs)[0]

    def run(
        self, params: Params, inputs: Float[Array, "batch length inputs"]
    ) -> tuple[Float[Array, "batch length outputs"], Float[Array, "batch length hidden"]]:
        """Outputs and rates at every step."""
        recurrent = params["recurrent"]["kernel"]
        driven = jnp.swapaxes(inputs @ params["input"]["kernel"], 0, 1)

        def step(h: Array, drive: Array) -> tuple[Array, Array]:
            h = jax.nn.relu((1 - self.alpha) * h + self.alpha * (drive + h @ recurrent))
            return h, h

        start = jnp.zeros((inputs.shape[0], self.num_hidden), driven.dtype)
        hidden = jnp.swapaxes(jax.lax.scan(step, start, driven)[1], 0, 1)
        return hidden @ params["output"]["kernel"], hidden
