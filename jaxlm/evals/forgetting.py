"""What going on with other data does to the loss on the old: how high it jumps, when it is back, what stays lost."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxlm.core.errors import DataError


class Spike(NamedTuple):
    """The course of a loss after a change.

    `height`: its maximum above where it began (0 if it never rises). `peak_tokens`: where the maximum is.
    `recovery_tokens`: where the loss is first back at its beginning, or below, after the maximum; infinite if it never
    is. `forgetting`: its end above its beginning, negative where it improved.
    """

    height: float
    peak_tokens: float
    recovery_tokens: float
    forgetting: float


def measure_spike(
    tokens: Sequence[float] | Float[np.ndarray, "times"], losses: Sequence[float] | Float[np.ndarray, "times"]
) -> Spike:
    """The spike of losses measured at these numbers of tokens, the first at the change itself.

    A loss that is not finite counts as infinitely high. For the questions of Gupta et al. (2023, arXiv 2308.04014):
    how large the jump is that re-warming causes, and whether the loss recovers.

    Raises `DataError` for unequal lengths, fewer than two times, tokens that do not increase, or an unmeasured begin.
    """
    at, y = np.asarray(tokens, np.float64), np.asarray(losses, np.float64)
    if at.ndim != 1 or at.shape != y.shape or len(at) < 2:
        raise DataError(f"tokens of shape {at.shape} and losses of shape {y.shape}, expected two times or more of both")
    if not (np.isfinite(at).all() and (np.diff(at) > 0).all()):
        raise DataError("tokens do not increase from one measurement to the next")
    if not math.isfinite(y[0]):
        raise DataError(f"the loss at the change is {y[0]}, expected a finite number")
    y = np.where(np.isfinite(y), y, np.inf)
    peak = int(np.argmax(y))
    back = peak + np.flatnonzero(y[peak:] <= y[0])
    recovery = float(at[back[0]]) if len(back) else math.inf
    return Spike(float(y[peak] - y[0]), float(at[peak]), recovery, float(y[-1] - y[0]))
