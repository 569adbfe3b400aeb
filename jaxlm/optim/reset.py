"""Optimizers that forget everything they know from time to time."""

from typing import Any

import jax
import optax

from jaxlm.core.errors import ConfigError
from jaxlm.optim import wiring


def reset_state_every(inner: optax.GradientTransformation, period: int) -> optax.GradientTransformationExtraArgs:
    """`inner` with its state as after `init` at every positive multiple of `period` of the caller's `step`.

    All of it: moments, counts of bias corrections, and the bases of projections, which GaLore and its relatives then
    refresh at once only if `period` is a multiple of theirs. The state is that of `inner` itself. With `period` beyond
    the end of the run, not a bit changes. The learning rate should recover slowly: `quick_recovery`.

    Source: ReLoRA (Lialin et al., 2023, arXiv 2307.05695); Glentis et al., 2025, arXiv 2505.22922.

    Raises:
      ConfigError: a period below 1; at `update`, no `step` or no parameters.
    """
    wiring.check_count("period", period)
    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, *, step: Any = None, **extra_args: Any):
        step = wiring.require_step("reset_state_every", step)
        if params is None:
            raise ConfigError("reset_state_every needs the parameters: call update(updates, state, params, step=...)")
        again = (step > 0) & (step % period == 0)
        state = jax.lax.cond(again, lambda: inner.init(params), lambda: state)
        return inner.update(updates, state, params, step=step, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)
