"""Training with rounded weights: straight-through gradients, and a step size that is learned."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.weights.base import OverBase, Weight, check_kernels


def straight_through(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """`y`, with the gradient of `x`."""
    return _straight_through(x, y.astype(x.dtype))


@jax.custom_vjp
def _straight_through(x: Array, y: Array) -> Array:
    return y


_straight_through.defvjp(lambda x, y: (y, None), lambda _, g: (g, None))


def fake_quant(w: Float[Array, "..."], step: Float[Array, "..."] | float, bits: int) -> Float[Array, "..."]:
    """`step * clip(round(w / step), -Q, Q)` with `Q = 2^(bits-1) - 1`; the gradient is 1 within the range, 0 outside.

    Raises:
      ConfigError: fewer than 2 bits, or more than 16.
    """
    top = _top(bits)
    inside = jnp.abs(w) <= top * step
    rounded = step * jnp.clip(jnp.round(w / step), -top, top)
    return straight_through(jnp.where(inside, w, jax.lax.stop_gradient(w)), rounded)


def learned_step_quant(w: Float[Array, "..."], step: Float[Array, ""], bits: int) -> Float[Array, "..."]:
    """`step * clip(round(w / step), -2^(bits-1), 2^(bits-1) - 1)`, differentiable in both (LSQ).

    The gradient of `w` is 1 within the range and 0 outside; that of `step` is `round(v) - v` within the range and the
    bound outside, `v = w / step`, times `1 / sqrt(w.size * Q)`.

    Source: Learned Step Size Quantization (Esser et al., 2020, arXiv 1902.08153, sections 2.1 and 2.2).
    """
    low, high = -_top(bits) - 1, _top(bits)
    gradient_scale = (w.size * high) ** -0.5
    step = straight_through(step * gradient_scale, step)
    v = w / step
    inside = (v >= low) & (v <= high)
    clipped = jnp.where(inside, v, jnp.where(v < low, float(low), float(high)))
    return straight_through(clipped, jnp.round(clipped)) * step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LearnedStep(OverBase):
    """A kernel `base` `(..., in, out)` rounded to `bits` by a step a matrix, `step` `(...)`; both are trained.

    What products see is `learned_step_quant(base, step, bits)`.
    """

    base: Float[Array, "*batch in out"]
    step: Float[Array, "*batch"]
    bits: int = dataclasses.field(default=4, metadata={"static": True})

    def dense(self) -> Array:
        quant = learned_step_quant
        for _ in range(self.base.ndim - 2):
            quant = jax.vmap(quant, in_axes=(0, 0, None))
        return quant(self.base, self.step, self.bits).astype(self.dtype)

    def child_axes(self, axes: tuple) -> "LearnedStep":
        return LearnedStep(axes, tuple(axes[:-2]), self.bits)


def learn_steps(params: Any, kernels: Collection[str], bits: int) -> Any:
    """The parameters with `LearnedStep` for the kernels of these paths, steps being `2 mean|w| / sqrt(Q)` at first.

    Raises:
      ConfigError: fewer than 2 bits, or more than 16; a path that there is not; a kernel that is not a dense array.
    """
    top = _top(bits)
    check_kernels(params, kernels)

    def one(path: str, w: Any) -> Any:
        if path not in kernels:
            return w
        if isinstance(w, Weight):
            raise ConfigError(f"{path} is {type(w).__name__}: only dense kernels can learn a step")
        step = 2 * jnp.mean(jnp.abs(w.astype(jnp.float32)), axis=(-2, -1)) / top**0.5
        return LearnedStep(w, step, bits)

    return trees.map_named(one, params, is_leaf=lambda x: isinstance(x, Weight))


def _top(bits: int) -> int:
    if not 2 <= bits <= 16:
        raise ConfigError(f"bits is {bits}, expected from 2 to 16")
    return 2 ** (bits - 1) - 1
