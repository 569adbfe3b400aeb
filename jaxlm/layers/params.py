"""How every layer creates and reads its parameters."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.core.errors import ConfigError
from jaxlm.weights import Weight

Initializer = Callable[..., jax.Array]


def weight(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer, dtype):
    """The parameter `name` of `module`: created (boxed with its logical axes) at initialization, else read.

    What is read may be an array or a `Weight` of logical shape `shape`. Raises `ConfigError`, by name, when it is
    missing or has another shape (linen itself checks nothing here, and a wrong norm scale would broadcast silently).
    """
    if module.is_initializing():
        # The box is taken off by hand: its own `unbox` would constrain the value's sharding.
        return module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype, unbox=False).value
    path = "/".join((*module.path, name))
    if not module.has_variable("params", name):
        raise ConfigError(f"parameter '{path}' of shape {shape} is missing")
    value = module.get_variable("params", name)
    if tuple(value.shape) != shape:
        raise ConfigError(
            f"parameter '{path}' has shape {tuple(value.shape)}, expected {shape} "
            "(inside the layer scan; its stack has one more, leading, axis)"
        )
    return value


def vector(module: nn.Module, name: str, size: int, axis: str, init: Initializer, dtype, ndim: int) -> jax.Array:
    """A one-axis parameter (bias, scale) shaped to be combined with an array of `ndim` axes along its last."""
    value = weight(module, name, (size,), (axis,), init, dtype)
    if isinstance(value, Weight):
        raise ConfigError(f"parameter '{'/'.join((*module.path, name))}' must be an array, got {type(value).__name__}")
    return jnp.reshape(value, (1,) * (ndim - 1) + (size,))
