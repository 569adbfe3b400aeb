"""Learning-rate schedules that Optax lacks: pure functions of the step, traceable, without any state.

`step` counts the updates made before this one, so the first update has step 0 and the last `total_steps - 1`.
They are Optax schedules: `optax.join_schedules([before, rewarm(...)], [steps_before])` continues one with
another.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import ConfigError, nearest

Step = int | Int[Array, ""]
Schedule = Callable[[Step], Float[Array, ""]]
DecayShape = Literal["linear", "cosine", "sqrt", "exponential"]

DECAY_SHAPES = ("linear", "cosine", "sqrt", "exponential")


def warmup_stable_decay(
    peak: float,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int,
    shape: DecayShape = "linear",
    end_fraction: float = 0.0,
) -> Schedule:
    """Linear warm-up from 0, a constant `peak`, then a decay over the last `decay_steps`.

    With `x` the part of the decay that is done, the rate falls from `peak` to `end_fraction * peak` as
    `linear`: `1 - x`; `cosine`: `(1 + cos(pi x)) / 2`; `sqrt`: `1 - sqrt(x)`; each scaled to end there; or
    `exponential`: `end_fraction ** x`, whose half-life is `decay_steps * log(2) / log(1 / end_fraction)`
    steps (the paper's decay with a half-life of `h` steps is `end_fraction = 0.5 ** (decay_steps / h)`).
    From `total_steps` on the rate stays at its end.

    Two runs that differ in `total_steps` alone have the same rates until the shorter one starts to decay,
    so a checkpoint from the constant part may be decayed at any time.

    Source: MiniCPM (Hu et al., 2024, arXiv 2404.06395, section 4.2); `sqrt` is the "1-sqrt" of Hägele et al.
    (2024, arXiv 2405.18392).

    Args:
      peak: the rate of the constant part, >= 0. This and the numbers of steps may be traced, as those that a sweep
        varies are (`ScheduleFromHparams`); then they are not checked.
      total_steps: length of the run in updates, decay included.
      warmup_steps: updates before the peak is reached; 0 starts at the peak.
      decay_steps: updates from the peak to the end; 0 leaves the decay out.
      shape: the form of the decay.
      end_fraction: the rate at the end as a fraction of the peak, in [0, 1]; > 0 for `exponential`.

    Raises:
      ConfigError: the parts do not fit into `total_steps`, or a value is out of its range.
    """
    if shape not in DECAY_SHAPES:
        raise ConfigError(f"decay shape '{shape}' is unknown: {nearest(str(shape), DECAY_SHAPES)}")
    _check("warmup_stable_decay", peak, total_steps, warmup_steps, end_fraction)
    known = all(map(is_known, (total_steps, warmup_steps, decay_steps)))
    if known and (decay_steps < 0 or warmup_steps + decay_steps > total_steps):
        raise ConfigError(
            f"warmup_stable_decay: decay_steps is {decay_steps}, expected 0 <= decay_steps <= total_steps - "
            f"warmup_steps = {total_steps - warmup_steps}"
        )
    if shape == "exponential" and end_fraction == 0:
        raise ConfigError("warmup_stable_decay: an exponential decay never reaches end_fraction 0; expected > 0")
    decay_start = total_steps - decay_steps

    def schedule(step: Step) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        warm = step / jnp.maximum(warmup_steps, 1)
        x = jnp.clip((step - decay_start) / jnp.maximum(decay_steps, 1), 0.0, 1.0)
        return peak * jnp.where(step < warmup_steps, warm, _decay(shape, x, end_fraction))

    return schedule


def rewarm(
    peak: float,
    total_steps: int,
    warmup_steps: int,
    *,
    end_fraction: float = 0.1,
    start: float = 0.0,
) -> Schedule:
    """The schedule of a continued run: up to `peak` again, then a cosine down to `end_fraction * peak`.

    Step 0 is the first update of the continuation. `warmup_steps=0` jumps to the peak. From `total_steps` on
    the rate stays at its end.

    Source: Continual Pre-Training of Large Language Models: How to (re)warm your model? (Gupta et al., 2023,
    arXiv 2308.04014), whose warm-ups start from 0 and last 0, 0.5, 1 or 2 % of the continuation.

    Args:
      peak: the rate reached after the warm-up, >= 0. This and what follows `total_steps` may be traced, as the
        numbers that a sweep varies are (`ScheduleFromHparams`); then they are not checked.
      total_steps: length of the continuation in updates, warm-up included.
      warmup_steps: updates of the linear warm-up.
      end_fraction: the rate at the end as a fraction of the peak, in [0, 1]; 1 stays at the peak.
      start: the rate of the first update when there is a warm-up, such as the last one of the run before.

    Raises:
      ConfigError: the warm-up is longer than the run, or a value is out of its range.
    """
    _check("rewarm", peak, total_steps, warmup_steps, end_fraction)
    if is_known(start) and not (math.isfinite(start) and start >= 0):
        raise ConfigError(f"rewarm: start is {start}, expected a finite number >= 0")

    def schedule(step: Step) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        warm = start + (peak - start) * step / jnp.maximum(warmup_steps, 1)
        x = jnp.clip((step - warmup_steps) / jnp.maximum(total_steps - warmup_steps, 1), 0.0, 1.0)
        return jnp.where(step < warmup_steps, warm, peak * _decay("cosine", x, end_fraction))

    return schedule


def quick_recovery(schedule: Schedule, cycle: int, recovery: int = 10, start_fraction: float = 1e-3) -> Schedule:
    """`schedule` with a short ramp after each restart, at the positive multiples of `cycle`.

    In the `recovery` steps from a restart on, the rate rises linearly from `start_fraction` of
    `schedule(restart + recovery)` to that; everywhere else it is `schedule`. The ramp is part of restarting an
    optimizer: with fresh moments Adam's first steps have full size whatever the gradient.

    Source: Scalable Parameter and Memory Efficient Pretraining for LLM (Glentis et al., 2025, arXiv 2505.22922).

    Args:
      schedule: any schedule of the step.
      cycle: steps between restarts; as in `reset_state_every`.
      recovery: steps of the ramp, from 2 to `cycle`.
      start_fraction: where it begins, in [0, 1].

    Raises:
      ConfigError: a value out of its range.
    """
    if cycle < 1:
        raise ConfigError(f"quick_recovery: cycle is {cycle}, expected >= 1")
    if not 2 <= recovery <= cycle:
        raise ConfigError(f"quick_recovery: recovery is {recovery}, expected 2 <= recovery <= cycle = {cycle}")
    if not 0 <= start_fraction <= 1:
        raise ConfigError(f"quick_recovery: start_fraction is {start_fraction}, expected 0 <= start_fraction <= 1")

    def recovering(step: Step) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.int32)
        since = step % cycle
        ramp = start_fraction + (1.0 - start_fraction) * since / (recovery - 1)
        target = schedule(step - since + recovery)
        return jnp.where((step >= cycle) & (since < recovery), target * ramp, schedule(step))

    return recovering


def _decay(shape: DecayShape, x: Float[Array, ""], end: float) -> Float[Array, ""]:
    if shape == "exponential":
        return end**x
    falling = {
        "linear": lambda: 1.0 - x,
        "cosine": lambda: 0.5 * (1.0 + jnp.cos(jnp.pi * x)),
        "sqrt": lambda: 1.0 - jnp.sqrt(x),
    }[shape]()
    return end + (1.0 - end) * falling


def _check(name: str, peak: float, total_steps: int, warmup_steps: int, end_fraction: float) -> None:
    if is_known(peak) and not (math.isfinite(peak) and peak >= 0):
        raise ConfigError(f"{name}: peak is {peak}, expected a finite number >= 0")
    if is_known(total_steps) and total_steps < 1:
        raise ConfigError(f"{name}: total_steps is {total_steps}, expected >= 1")
    if is_known(warmup_steps) and is_known(total_steps) and not 0 <= warmup_steps <= total_steps:
        raise ConfigError(
            f"{name}: warmup_steps is {warmup_steps}, expected 0 <= warmup_steps <= total_steps = {total_steps}"
        )
    if is_known(end_fraction) and not 0 <= end_fraction <= 1:
        raise ConfigError(f"{name}: end_fraction is {end_fraction}, expected 0 <= end_fraction <= 1")


def is_known(value: float) -> bool:
    """Whether a number can be looked at now."""
    return not isinstance(value, jax.core.Tracer)
