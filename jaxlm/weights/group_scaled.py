"""A kernel whose groups of inputs have a trained factor for each output."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError
from jaxlm.weights import base as weights
from jaxlm.weights.base import OverBase


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupScaled(OverBase):
    """`base[i, j] * scale[i // (in / groups), j]`: CAST's weight scaling (arXiv 2509.25996).

    `base`: any kernel `(..., in, out)`; `scale`: `(..., groups, out)`, 1 at first.
    """

    base: Any
    scale: Float[Array, "*batch groups out"]

    def dense(self) -> Array:
        w = weights.dense(self.base)
        *leading, groups, columns = self.scale.shape
        grouped = w.reshape(*leading, groups, -1, columns) * self.scale[..., :, None, :]
        return grouped.reshape(w.shape).astype(w.dtype)

    def child_axes(self, axes: tuple) -> "GroupScaled":
        # Optimizers treat the factors as they do norm scales: see `jaxlm.optim.roles`.
        return GroupScaled(weights.child_axes(self.base, axes), (*axes[:-2], "scale_groups", axes[-1]))


def add_group_scale(w: Any, groups: int = 2) -> GroupScaled:
    """The same kernel, with factors 1. Raises `ConfigError` unless `groups` divides its inputs."""
    *leading, rows, columns = w.shape
    if groups < 1 or rows % groups:
        raise ConfigError(f"{groups} groups of scales do not divide a kernel of {rows} inputs")
    return GroupScaled(w, jnp.ones((*leading, groups, columns), w.dtype))
