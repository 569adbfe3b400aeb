"""SPAM and Stable-SPAM: Adam that clips gradient spikes and forgets its moments from time to time.

Both take every parameter. Resets follow the caller's `step`: they happen where it is a positive multiple of the period.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxlm.optim import roles, wiring
from jaxlm.optim.learning_rate import LearningRate
from jaxlm.optim.wiring import DECAYED_ROLES


class SpamState(NamedTuple):
    count: jax.Array
    mu: Any
    nu: Any


def scale_by_spam(
    *,
    period: int = 500,
    warmup: int = 150,
    threshold: float = 5000.0,
    quiet: int = 20,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction with spikes clipped and moments reset; elementwise; needs `step`.

    A gradient with `g^2 > threshold * v` becomes `sign(g) * sqrt(threshold * v)`, except in the first `quiet` steps
    of the run and after each reset, when `v` knows too little. At a reset both moments become zero, and the direction
    is multiplied by a factor that rises along a cosine from near 0.01 to 1 over the next `warmup` steps. The count of
    the bias correction goes on, as in the released code.

    Source: SPAM: Spike-Aware Adam with Momentum Reset (Huang et al., 2025, arXiv 2501.06842) and its released code.

    Raises:
      ConfigError: period or warmup below 1, a threshold <= 0, betas outside [0, 1).
    """
    wiring.check_count("period", period)
    wiring.check_count("warmup", warmup)
    wiring.check_positive("threshold", threshold)
    wiring.check_betas(b1, b2, eps)

    def init(params: Any) -> SpamState:
        return SpamState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(updates: Any, state: SpamState, params: Any = None, *, step: Any = None, **extra_args: Any):
        del params, extra_args
        step = wiring.require_step("spam", step)
        phase = step % period
        reset = (phase == 0) & (step > 0)
        clips = (step >= quiet) & (phase >= quiet)
        # After a reset: 1 - 0.99 times a cosine from 1, already one step on, that is at 0 a step after the warm-up.
        rising = 1.0 - 0.99 * 0.5 * (1.0 + jnp.cos(jnp.pi * (phase + 1) / (warmup + 1)))
        factor = jnp.where((step >= period) & (phase < warmup), rising, 1.0)
        count = optax.safe_increment(state.count)

        def one(g, mu, nu):
            x = g.astype(jnp.float32)
            m, v = (jnp.where(reset, 0.0, moment.astype(jnp.float32)) for moment in (mu, nu))
            bound = threshold * v
            x = jnp.where(clips & (x * x > bound), jnp.sign(x) * jnp.sqrt(bound), x)
            m, v, direction, correction = wiring.adam_direction(m, v, x, count, b1, b2, eps)
            return (factor * correction * direction).astype(g.dtype), m.astype(mu.dtype), v.astype(nu.dtype)

        out, mu, nu = wiring.map_leaves(one, updates, state.mu, state.nu)
        return out, SpamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


class StableSpamState(NamedTuple):
    """`count`: updates since the last reset; `total`: all of them. The rest per parameter, norms per layer."""

    count: jax.Array
    total: jax.Array
    mu: Any
    nu: Any
    largest: Any
    norm: Any
    squared_norm: Any


def scale_by_stable_spam(
    own_ndim: Any,
    *,
    period: int = 1000,
    gamma1: float = 0.7,
    gamma2: float = 0.9,
    theta: float = 0.999,
    decay_steps: int | None = None,
    decay_to: float = 0.5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction for gradients whose spikes and norms are brought back to their running averages; needs `step`.

    Each parameter of each layer by itself: entries above the running average (`theta`) of the largest are scaled down
    to it; then the gradient is given the norm `n1 / sqrt(n2)`, with `n1` and `n2` running averages of norm (`gamma1`)
    and squared norm (`gamma2`), all bias-corrected. Every `period` steps the moments and the count of their
    correction become zero. A gradient of zero changes nothing.

    Args:
      own_ndim: a function from parameters to the tree of how many of each one's last axes are its own; those before
        are layers and experts, each with statistics of its own.
      decay_steps: length of the run over which `b1` and `gamma1` fall by a cosine to `decay_to` times themselves;
        None keeps them.

    Source: Stable-SPAM (Huang et al., 2025, arXiv 2502.17055) and its released code.

    Raises:
      ConfigError: a period below 1, rates outside [0, 1).
    """
    wiring.check_count("period", period)
    wiring.check_betas(b1, b2, eps)
    for name, value in (("gamma1", gamma1), ("gamma2", gamma2), ("theta", theta)):
        wiring.check_fraction(name, value)
    if decay_steps is not None:
        wiring.check_count("decay_steps", decay_steps)

    def init(params: Any) -> StableSpamState:
        def statistic() -> Any:
            return jax.tree.map(
                lambda p, own: jnp.zeros(p.shape[: p.ndim - own], jnp.float32), params, own_ndim(params)
            )

        counts = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        moments = (optax.tree.zeros_like(params), optax.tree.zeros_like(params))
        return StableSpamState(*counts, *moments, statistic(), statistic(), statistic())

    def update(updates: Any, state: StableSpamState, params: Any = None, *, step: Any = None, **extra_args: Any):
        del params, extra_args
        step = wiring.require_step("stable_spam", step)
        reset = (step % period == 0) & (step > 0)
        count = jnp.where(reset, 1, optax.safe_increment(state.count))
        total = optax.safe_increment(state.total)
        shrink = 1.0
        if decay_steps is not None:
            x = jnp.minimum(step / decay_steps, 1.0)
            shrink = decay_to + (1.0 - decay_to) * 0.5 * (1.0 + jnp.cos(math.pi * x))
        beta, gamma = b1 * shrink, gamma1 * shrink

        def one(g, own, mu, nu, largest, norm, squared):
            x = g.astype(jnp.float32)
            axes = tuple(range(-own, 0))

            def spread(statistic: Array) -> Array:
                return statistic.reshape(*statistic.shape, *[1] * own)

            peak = jnp.max(jnp.abs(x), axis=axes)
            largest = theta * largest + (1 - theta) * peak
            bound = largest / _debias(theta, total)
            x = jnp.where(jnp.abs(x) > spread(bound), x / spread(jnp.where(peak > 0, peak, 1.0)) * spread(bound), x)
            size = jnp.sqrt(jnp.sum(x * x, axis=axes))
            active = size > 0
            norm = jnp.where(active, gamma * norm + (1 - gamma) * size, norm)
            squared = jnp.where(active, gamma2 * squared + (1 - gamma2) * size * size, squared)
            target = (norm / _debias(gamma, total)) / (jnp.sqrt(squared / _debias(gamma2, total)) + eps)
            x = x * spread(target / jnp.where(active, size, 1.0))

            m, v = (jnp.where(reset, 0.0, moment.astype(jnp.float32)) for moment in (mu, nu))
            new_m, new_v, direction, correction = wiring.adam_direction(m, v, x, count, beta, b2, eps)
            moves = spread(active)
            m, v = jnp.where(moves, new_m, m), jnp.where(moves, new_v, v)
            out = jnp.where(moves, correction * direction, 0.0)
            return out.astype(g.dtype), m.astype(mu.dtype), v.astype(nu.dtype), largest, norm, squared

        rest = (state.mu, state.nu, state.largest, state.norm, state.squared_norm)
        out, *new = wiring.map_leaves(one, updates, own_ndim(updates), *rest)
        return out, StableSpamState(count, total, *new)

    return optax.GradientTransformationExtraArgs(init, update)


def spam(
    learning_rate: LearningRate,
    *,
    axes: Any,
    period: int = 500,
    warmup: int = 150,
    threshold: float = 5000.0,
    quiet: int = 20,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    decay: roles.Predicate | Collection[str] = DECAYED_ROLES,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SPAM on every parameter: Adam with spike clipping, and moments reset every `period` steps (`scale_by_spam`).

    Source: Huang et al., 2025, arXiv 2501.06842.

    Args:
      period, warmup, threshold, quiet: as in `scale_by_spam`.
      The other arguments are those of `adamw`.

    Raises:
      ConfigError: a value out of its range, a leaf without a role, an unknown role.
    """
    direction = scale_by_spam(
        period=period, warmup=warmup, threshold=threshold, quiet=quiet, b1=b1, b2=b2, eps=eps
    )
    return wiring.optimizer(
        learning_rate, direction, axes=axes, weight_decay=weight_decay, decay=decay, clip_norm=clip_norm
    )


def stable_spam(
    learning_rate: LearningRate,
    *,
    axes: Any,
    period: int = 1000,
    gamma1: float = 0.7,
    gamma2: float = 0.9,
    theta: float = 0.999,
    decay_steps: int | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: roles.Predicate | Collection[str] = DECAYED_ROLES,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Stable-SPAM on every parameter of every layer by itself (`scale_by_stable_spam`).

    Source: Huang et al., 2025, arXiv 2502.17055.

    Args:
      period, gamma1, gamma2, theta, decay_steps: as in `scale_by_stable_spam`.
      The other arguments are those of `adamw`.

    Raises:
      ConfigError: a value out of its range, a leaf without a role, an unknown role.
    """
    direction = scale_by_stable_spam(
        lambda params: roles.own_ndim(params, axes),
        period=period,
        gamma1=gamma1,
        gamma2=gamma2,
        theta=theta,
        decay_steps=decay_steps,
        b1=b1,
        b2=b2,
        eps=eps,
    )
    return wiring.optimizer(
        learning_rate, direction, axes=axes, weight_decay=weight_decay, decay=decay, clip_norm=clip_norm
    )


def _debias(rate: Any, count: Array) -> Float[Array, ""]:
    return 1.0 - jnp.asarray(rate, jnp.float32) ** count.astype(jnp.float32)
