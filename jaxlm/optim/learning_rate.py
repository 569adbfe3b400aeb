"""The last link of an optimizer: minus the learning rate of the step that the caller names.

Optax's own `scale_by_learning_rate` counts its updates. Here the rate follows the `step` given to `update`,
so it cannot drift from the run's step after a restart or a skipped update, and where many members are
trained in one program (`vmap` over their states) the rate stays one unmapped number. A rate that a sweep
varies is read from `hparams`, which is mapped with the members.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.optim.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class FromHparams:
    """A number read from the run's `hparams`: `hparams[name]`, times `schedule(step)` if there is one.

    For a sweep, give the schedule a peak of 1 and each member its own peak in `hparams`.
    """

    name: str = "learning_rate"
    schedule: Schedule | None = None


@dataclasses.dataclass(frozen=True)
class ScheduleFromHparams:
    """A schedule of which a sweep varies more than the height: `make(hparams)(step)`.

        ScheduleFromHparams(lambda h: rewarm(h["peak"], steps, h["warmup_steps"], end_fraction=h["end_fraction"]))

    Members with other peaks and warm-ups, and one whose rate is constant, then share one compiled program.
    """

    make: Callable[[Mapping[str, Any]], Schedule]


LearningRate = float | Schedule | FromHparams | ScheduleFromHparams


def scale_by_learning_rate(learning_rate: LearningRate) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates by minus the learning rate of `step`. Stateless; keeps every dtype.

    Called as `update(updates, state, params, step=..., hparams=...)`: a schedule needs `step`, `FromHparams`
    needs `hparams`; other extra arguments are ignored.

    Raises:
      ConfigError: a negative or non-finite number; and at the first `update`, when what the rate needs was
      not given.
    """
    if isinstance(learning_rate, (int, float)) and not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise ConfigError(f"learning_rate is {learning_rate}, expected a finite number >= 0")

    def update(updates, state, params=None, *, step=None, hparams=None, **extra_args):
        del params, extra_args
        rate = jnp.asarray(value_of(learning_rate, step, hparams))
        return jax.tree.map(lambda u: u * -rate.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def value_of(learning_rate: LearningRate, step: Any = None, hparams: Any = None) -> Any:
    """The learning rate at `step`, as `scale_by_learning_rate` uses it: what a run logs."""
    factor = 1.0
    if isinstance(learning_rate, ScheduleFromHparams):
        try:
            learning_rate = learning_rate.make(hparams or {})
        except KeyError as error:
            raise ConfigError(f"the schedule reads {error} of hparams, which are {sorted(hparams or {})}") from error
    if isinstance(learning_rate, FromHparams):
        if hparams is None or learning_rate.name not in hparams:
            raise ConfigError(
                f"a setting of the optimizer is hparams['{learning_rate.name}'], but update() was given "
                + ("no hparams" if hparams is None else f"hparams without it: {nearest(learning_rate.name, hparams)}")
            )
        factor, learning_rate = hparams[learning_rate.name], learning_rate.schedule
        if learning_rate is None:
            return factor
    if not callable(learning_rate):
        return learning_rate
    if step is None:
        raise ConfigError("the learning rate follows the step: call update(..., step=...)")
    return factor * learning_rate(step)
