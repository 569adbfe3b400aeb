"""A two-layer linear network, `f(x) = x W w`: nonlinear learning whose kernel has a closed form.

The testbed of theory on rich and lazy learning (Liu et al., 2024, arXiv 2310.08513, section 3; Saxe et al., 2014).
With `W` the kernel `(features, hidden)` and `w` `(hidden, 1)`, the tangent kernel of inputs `X` is
`X (W W^T + |w|^2 I) X^T`, and gradient flow conserves `W^T W - w w^T`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError
from jaxlm.models.initialization import low_rank_init

Params = Mapping[str, Any]


def init_linear_network(
    key: jax.Array, features: int, hidden: int, *, rank: int | None = None, norm: float = 1.0
) -> dict[str, Any]:
    """A random first layer of this rank and Frobenius norm, and a second layer of zeros."""
    kernel = low_rank_init(key, (features, hidden), rank)
    return _params(kernel, norm)


def init_aligned_network(
    key: jax.Array, teacher: Float[Array, "features"], hidden: int, *, norm: float = 1.0
) -> dict[str, Any]:
    """A first layer of rank 1 that already reads out the teacher's direction: `teacher u^T`, with a random `u`."""
    direction = jax.random.normal(key, (hidden,))
    return _params(jnp.outer(teacher, direction), norm)


def linear_network(params: Params, x: Float[Array, "batch features"]) -> Float[Array, "batch"]:
    """The outputs."""
    return (x @ params["first"]["kernel"] @ params["second"]["kernel"])[:, 0]


def hidden_units(params: Params, x: Float[Array, "batch features"]) -> Float[Array, "batch hidden"]:
    """The activations of the hidden layer."""
    return x @ params["first"]["kernel"]


def exact_tangent_kernel(params: Params, x: Float[Array, "batch features"]) -> Float[Array, "batch batch"]:
    """The tangent kernel in closed form."""
    first, second = params["first"]["kernel"], params["second"]["kernel"]
    hidden = x @ first
    return hidden @ hidden.T + jnp.sum(jnp.square(second)) * (x @ x.T)


def conserved(params: Params) -> Float[Array, "hidden hidden"]:
    """`W^T W - w w^T`, which gradient flow on any loss leaves as it is."""
    first, second = params["first"]["kernel"], params["second"]["kernel"]
    return first.T @ first - second @ second.T


def _params(kernel: Float[Array, "features hidden"], norm: float) -> dict[str, Any]:
    if norm <= 0:
        raise ConfigError(f"norm is {norm}, expected above 0")
    kernel = kernel * norm / jnp.linalg.norm(kernel)
    return {"first": {"kernel": kernel}, "second": {"kernel": jnp.zeros((kernel.shape[1], 1))}}
