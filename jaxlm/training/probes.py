"""What can be measured of a model in training, from the outside."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.objectives.base import Objective, StepContext


def gradient_variance(
    objective: Objective, params: Any, batches: Mapping[str, Array], frozen: Any = None
) -> dict[str, Float[Array, "..."]]:
    """How much the gradient of each matrix varies from batch to batch: `sum_i ||g_i - mean g||^2 / (n - 1)`.

    The quantity of Glentis et al. (2025, arXiv 2506.16659), there with the gradient of one large batch in place of the
    mean over the small ones. Traceable; all of `params` are differentiated.

    Args:
      batches: `n >= 2` batches, stacked along axis 0.

    Returns:
      By path, for each leaf with two axes or more, an array of its leading axes: a number for each layer's matrix.
    """
    count = next(iter(batches.values())).shape[0]
    if count < 2:
        raise ConfigError(f"{count} batches, expected at least 2")
    ctx = StepContext(frozen=frozen, key=jax.random.key(0))

    def gradient(batch: Mapping[str, Array]) -> dict[str, Array]:
        totals = jax.lax.stop_gradient(objective.totals(params, batch, ctx))
        grads = jax.grad(lambda p: objective.loss(p, batch, ctx, totals)[0])(params)
        return {path: g.astype(jnp.float32) for path, g in trees.named_leaves(grads) if g.ndim >= 2}

    def square(g: Array) -> Array:
        return jnp.sum(g * g, axis=(-2, -1))

    def add(sums: tuple, batch: Mapping[str, Array]) -> tuple[tuple, None]:
        grads = gradient(batch)
        return jax.tree.map(jnp.add, sums, (grads, jax.tree.map(square, grads))), None

    first = {name: x[0] for name, x in batches.items()}
    shapes = jax.eval_shape(gradient, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes, jax.eval_shape(_squares(square), shapes)))
    (total, squares), _ = jax.lax.scan(add, zeros, dict(batches))
    return {path: (squares[path] - square(total[path]) / count) / (count - 1) for path in squares}


def _squares(square: Any) -> Any:
    return lambda tree: jax.tree.map(square, tree)
