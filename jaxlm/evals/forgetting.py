"""What going on with other data does to the old: how high a loss jumps, when it is back, what stays lost of skills."""

import math
import statistics
from collections.abc import Mapping, Sequence
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


class Retention(NamedTuple):
    """What is left of skills. `changes`: of each score. `kept`: the mean over skills that were there before of the
    share of the score that remains, at most 1 each, so that a gain in one hides no loss in another; NaN if none was
    there."""

    changes: Mapping[str, float]
    kept: float


def measure_retention(before: Mapping[str, float], after: Mapping[str, float]) -> Retention:
    """The retention of scores (the higher the better, 0 for nothing) by skill, before and after further training.

    Raises `DataError` for other skills after than before, or a score that is negative or no number.
    """
    if before.keys() != after.keys() or not before:
        raise DataError(f"skills before are {sorted(before)} and after {sorted(after)}, expected the same, one or more")
    for name in before:
        for score in (before[name], after[name]):
            if not (math.isfinite(score) and score >= 0):
                raise DataError(f"a score of '{name}' is {score}, expected a number of at least 0")
    shares = [min(1.0, after[name] / score) for name, score in before.items() if score > 0]
    kept = statistics.fmean(shares) if shares else math.nan
    return Retention({name: after[name] - score for name, score in before.items()}, kept)
