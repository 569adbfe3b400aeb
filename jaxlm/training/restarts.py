"""Steps that change parameters from time to time, beside the optimizer."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxlm.core.errors import ConfigError
from jaxlm.core.keys import fold
from jaxlm.training.state import TrainState
from jaxlm.training.step import Step


def change_every(step: Step, period: int, change: Callable[[jax.Array, Any], Any]) -> Step:
    """`step`, before which what is trained becomes `change(key, trainable)` at every positive multiple of `period`.

    It follows the state's own step under one `lax.cond`, so a resumed run changes what the uninterrupted one would,
    and with a `period` beyond the run nothing is different, to the bit. The optimizer's state is left alone: see
    `jaxlm.optim.reset_state_every`. `change` must keep shapes and formats.

    Raises `ConfigError` for a period below 1.
    """
    if period < 1:
        raise ConfigError(f"period is {period}, expected at least 1")

    def changing(state: TrainState, frozen: Any, batch: Mapping[str, jax.Array]):
        again = (state.step > 0) & (state.step % period == 0)
        key = fold(state.key, "change", state.step)
        trainable = jax.lax.cond(again, lambda: change(key, state.trainable), lambda: state.trainable)
        return step(dataclasses.replace(state, trainable=trainable), frozen, batch)

    return changing
