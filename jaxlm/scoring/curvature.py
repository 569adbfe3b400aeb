"""How sharp a minimum is: the trace of a loss's Hessian, estimated with an error bar, and of the Fisher matrix.

    found = hessian_trace(loss, params, draw, jax.random.key(0), draws=256)        # found.value, found.error

`loss(params, batch)` is any scalar function and `draw(key)` a batch, so the trace is that of the loss over the whole
distribution of `draw`. The Hessian is never formed: `z^T H z` for a random `z` takes one gradient and its derivative
along `z` (Hutchinson, 1990). Losses with custom derivatives need plain implementations (`CausalLM(model,
implementation="reference")`, `attention="reference"`), dropout and the like off.

Traces are not invariant to how a model is parametrized: compare sizes only after `jaxlm.surgery.widen_by_tiling`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.keys import fold
from jaxlm.objectives.base import Batch, Objective, StepContext

PROBES = ("rademacher", "gaussian")

Draw = Callable[[jax.Array], Batch]


class Trace(NamedTuple):
    """An estimate and its standard error."""

    value: Float[Array, ""]
    error: Float[Array, ""]


def hvp(loss: Callable[[Any], Array], params: Any, direction: Any) -> Any:
    """The product of the Hessian of `loss` at `params` with a `direction` of the same structure."""
    return jax.jvp(jax.grad(loss), (params,), (direction,))[1]


def hessian_trace(
    loss: Callable[[Any, Batch], Array],
    params: Any,
    draw: Draw,
    key: jax.Array,
    *,
    draws: int = 256,
    probe: str = "rademacher",
    chosen: Callable[[str], bool] | None = None,
) -> Trace:
    """The trace of the Hessian of the expected loss by the chosen parameters (all by default), by `draws` batches.

    Each draw has a batch and a direction of its own, so the error covers both. `rademacher` directions (random signs)
    are exact on a diagonal Hessian and never vary more than `gaussian` ones. Traceable.

    Raises `ConfigError` for fewer than two draws or an unknown probe.
    """
    if probe not in PROBES:
        raise ConfigError(f"probe is '{probe}': {nearest(probe, PROBES)}")
    picked, put_back = trees.pick(params, chosen)
    sampler = jax.random.rademacher if probe == "rademacher" else jax.random.normal

    def one(key: jax.Array) -> Float[Array, ""]:
        batch = draw(fold(key, "batch"))
        direction = {path: sampler(fold(key, path), x.shape, x.dtype) for path, x in picked.items()}
        product = hvp(lambda leaves: loss(put_back(leaves), batch), picked, direction)
        return sum(jnp.vdot(direction[path], product[path]).astype(jnp.float32) for path in picked)

    return _average(one, key, draws)


def fisher_trace(
    logits: Callable[[Any, Batch], tuple[Array, Array]],
    params: Any,
    draw: Draw,
    key: jax.Array,
    *,
    draws: int = 256,
    chosen: Callable[[str], bool] | None = None,
) -> Trace:
    """The trace of the Fisher matrix of a mean cross-entropy, `E |grad log p(y | x)|^2` with `y` from the model itself.

    Equal to the Hessian's where the model is the data's distribution, and cheaper. `logits(params, batch)` gives
    logits `[..., classes]` and weights `[...]`, 0 or 1, of the predictions that the loss averages. As scores of
    independent labels have mean zero, one gradient of the sum serves a whole batch: `E |sum g_i|^2 = sum E |g_i|^2`.
    """
    picked, put_back = trees.pick(params, chosen)

    def one(key: jax.Array) -> Float[Array, ""]:
        batch = draw(fold(key, "batch"))
        scores, weights = logits(params, batch)
        labels = jax.random.categorical(fold(key, "labels"), scores)

        def summed(leaves: Any) -> Float[Array, ""]:
            logp = jax.nn.log_softmax(logits(put_back(leaves), batch)[0])
            return jnp.sum(weights * jnp.take_along_axis(logp, labels[..., None], axis=-1)[..., 0])

        grads = jax.grad(summed)(picked)
        square = sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in grads.values())
        return square / jnp.maximum(jnp.sum(weights), 1.0)

    return _average(one, key, draws)


def objective_loss(objective: Objective) -> Callable[[Any, Batch], Array]:
    """An objective as a `loss(params, batch)`: its mean over the batch. What it draws, it draws from `batch["key"]`."""

    def loss(params: Any, batch: Batch) -> Array:
        batch = dict(batch)
        ctx = StepContext(key=batch.pop("key", None))
        totals = jax.lax.stop_gradient(objective.totals(params, batch, ctx))
        return objective.loss(params, batch, ctx, totals)[0]

    return loss


def _average(one: Callable[[jax.Array], Array], key: jax.Array, draws: int) -> Trace:
    if draws < 2:
        raise ConfigError(f"draws is {draws}, expected at least 2")
    found = jax.lax.map(one, jax.random.split(key, draws))
    return Trace(jnp.mean(found), jnp.std(found, ddof=1) / draws**0.5)
