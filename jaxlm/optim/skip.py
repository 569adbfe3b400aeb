"""Updates that are left out because their gradient is far larger than the ones before."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import ConfigError

_MAD = 1.4826  # standard deviations in a median absolute deviation, of a normal distribution


class SkipSpikesState(NamedTuple):
    """`norms`: of the last gradients, NaN where there were none yet. `seen`: gradients so far. `spike_skipped`: 1 if
    the last update was left out (the training step's metric of that name). `skipped`: all that were."""

    norms: Float[Array, "window"]
    seen: Int[Array, ""]
    spike_skipped: Float[Array, ""]
    skipped: Int[Array, ""]
    inner: Any


def skip_spikes(
    inner: optax.GradientTransformation, deviations: float = 6.0, *, window: int = 128, warmup: int = 32
) -> optax.GradientTransformationExtraArgs:
    """`inner`, except that a gradient whose global norm is a spike gives no update and leaves its state alone.

    A spike is a norm above the median of the last `window` by more than `deviations` robust standard deviations
    (1.4826 times the median absolute deviation, but at least a tenth of the median), once `warmup` are known. Skipped
    norms count among the last ones, so that a lasting change of scale is followed after half a window at most.

    Source: skipping as `SkipStepAdamW` of OLMo-core does (6 standard deviations, 128 steps); the released code differs:
    mean and deviation, by which one spike hides the next, and of the loss as well as of the norm.

    Raises:
      ConfigError: `deviations` not above 0; not 2 <= `warmup` <= `window`.
    """
    if not deviations > 0:
        raise ConfigError(f"deviations is {deviations}, expected above 0")
    if not 2 <= warmup <= window:
        raise ConfigError(f"warmup is {warmup}, expected from 2 to the window of {window}")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> SkipSpikesState:
        zero = jnp.zeros((), jnp.int32)
        return SkipSpikesState(jnp.full(window, jnp.nan), zero, jnp.zeros(()), zero, inner.init(params))

    def update(updates: Any, state: SkipSpikesState, params: Any = None, **extra_args: Any):
        norm = optax.global_norm(updates).astype(jnp.float32)
        middle = jnp.nanmedian(state.norms)
        deviation = _MAD * jnp.nanmedian(jnp.abs(state.norms - middle))
        spike = (state.seen >= warmup) & (norm > middle + deviations * jnp.maximum(deviation, 0.1 * middle))
        new, inner_state = jax.lax.cond(
            spike,
            lambda: (jax.tree.map(jnp.zeros_like, updates), state.inner),
            lambda: inner.update(updates, state.inner, params, **extra_args),
        )
        norms = state.norms.at[state.seen % window].set(norm)
        flag = spike.astype(jnp.float32)
        return new, SkipSpikesState(norms, state.seen + 1, flag, state.skipped + spike, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
