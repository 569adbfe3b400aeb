"""Limits on how fast updates may grow from one step to the next."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError
from jaxlm.optim import wiring


class NormGrowthState(NamedTuple):
    """The norm of every matrix's last update, after limiting: `(leading...)` for a kernel `(leading..., in, out)`."""

    norms: Any


def limit_norm_growth(gamma: float = 1.01) -> optax.GradientTransformation:
    """Scales each matrix's update so that its norm is at most `gamma` times that of the update before.

    `x *= min(1, gamma * previous / ||x||)`; what is remembered is the limited norm. The first update, and one after
    an update of zero, is not limited. Every matrix along the leading axes has its own norm.

    Source: Fira (Chen et al., 2024, arXiv 2410.01623, section 4.3), also used by APOLLO.

    Raises:
      ConfigError: `gamma` is below 1.
    """
    check_gamma(gamma)

    def init(params: Any) -> NormGrowthState:
        return NormGrowthState(initial_norms(params))

    def update(updates: Any, state: NormGrowthState, params: Any = None):
        del params

        def one(x: Array, previous: Array) -> tuple[Array, Array]:
            y, norm = limit(x.astype(jnp.float32), previous, gamma)
            return y.astype(x.dtype), norm

        out, norms = wiring.map_leaves(one, updates, state.norms)
        return out, NormGrowthState(norms)

    return optax.GradientTransformation(init, update)


def limit(
    x: Float[Array, "*batch in out"], previous: Float[Array, "*batch"], gamma: Any
) -> tuple[Float[Array, "*batch in out"], Float[Array, "*batch"]]:
    """`limit_norm_growth` of one stack: the limited update and its norms."""
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1)))
    grown = (previous > 0) & (norm > gamma * previous)
    factor = jnp.where(grown, gamma * previous / jnp.where(norm > 0, norm, 1.0), 1.0)
    return x * factor[..., None, None], norm * factor


def initial_norms(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.zeros(p.shape[:-2], jnp.float32), params)


def check_gamma(gamma: Any) -> None:
    if wiring.is_known(gamma) and not gamma >= 1:
        raise ConfigError(f"gamma is {gamma}, expected >= 1: the norm may never grow otherwise")
