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

    # Welford's recursion: squares minus the square of the mean would be rounding where gradients hardly differ.
    def add(carry: tuple, batch: Mapping[str, Array]) -> tuple[tuple, None]:
        means, squares, seen = carry
        grads, seen = gradient(batch), seen + 1
        new = {path: means[path] + (g - means[path]) / seen for path, g in grads.items()}
        squares = {
            path: squares[path] + jnp.sum((g - means[path]) * (g - new[path]), axis=(-2, -1))
            for path, g in grads.items()
        }
        return (new, squares, seen), None

    shapes = jax.eval_shape(gradient, {name: x[0] for name, x in batches.items()})
    means = {path: jnp.zeros(s.shape, s.dtype) for path, s in shapes.items()}
    squares = {path: jnp.zeros(s.shape[:-2], s.dtype) for path, s in shapes.items()}
    (_, squares, _), _ = jax.lax.scan(add, (means, squares, jnp.zeros((), jnp.float32)), dict(batches))
    return {path: x / (count - 1) for path, x in squares.items()}


def trajectory_curvature(
    objective: Objective, before: Any, after: Any, batch: Mapping[str, Array], frozen: Any = None
) -> dict[str, Float[Array, ""]]:
    """The shape of the loss along the last update `v = after - before`, from the gradients on one batch at both ends.

    `grad_norm`: at `after`. `cosine`: between both gradients. `slope`: `D1 = g(after) . v / |v|`. `second_derivative`:
    `D2 = (g(after) - g(before)) . v / |v|^2`, for small updates `v^T H v / |v|^2`. `curvature`: of the loss as a curve,
    `|D2| / (1 + D1^2)^1.5`. From MiniCPM (Hu et al. 2024, arXiv 2404.06395, section 4), where the curvature rises as
    the rate decays. Traceable.
    """
    ctx = StepContext(frozen=frozen, key=jax.random.key(0))

    def gradient(params: Any) -> Any:
        totals = jax.lax.stop_gradient(objective.totals(params, batch, ctx))
        return jax.grad(lambda p: objective.loss(p, batch, ctx, totals)[0])(params)

    def dot(a: Any, b: Any) -> Array:
        products = jax.tree.map(lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32)), a, b)
        return sum(jax.tree.leaves(products))

    old, new = gradient(before), gradient(after)
    v = jax.tree.map(jnp.subtract, after, before)
    length = jnp.sqrt(dot(v, v))
    norms = jnp.sqrt(dot(old, old)), jnp.sqrt(dot(new, new))
    slope = dot(new, v) / length
    second = dot(jax.tree.map(jnp.subtract, new, old), v) / length**2
    return {
        "grad_norm": norms[1],
        "cosine": dot(old, new) / (norms[0] * norms[1]),
        "slope": slope,
        "second_derivative": second,
        "curvature": jnp.abs(second) / (1 + slope**2) ** 1.5,
    }
