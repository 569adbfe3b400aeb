"""What the beginning of a training run says about its end, and stopping runs by it.

Pareja et al. (2025, arXiv 2412.13337) find that of fine-tuning runs, those with low gradient norms and high losses
early on end best. `signal_table` measures that on finished runs; `halve` is successive halving (Jamieson and
Talwalkar 2016, arXiv 1502.07943) by such a signal, on runs under way or, looking back, on finished ones:

    plan = halving_plan(samples=6144, runs=9, first=0.1)
    kept = halve(plan, names, lambda name, samples: train_to(name, samples).grad_norm)

Gradient norms depend on how the loss is normalized and, through noise, on the batch: compare runs of one normalization
at equal samples seen, and look at the correlation within groups of equal batches too.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.evals.stats import spearman

SIGNALS = ("grad_norm", "loss")


class EarlyRun(NamedTuple):
    """A finished run: its mean gradient norm before clipping and its mean training loss early on, how good it became
    (the higher the better), and the group of runs that it can be compared with best (its batch size, say)."""

    name: str
    grad_norm: float
    loss: float
    final: float
    group: Hashable = None


class Correlation(NamedTuple):
    """A rank correlation with a bootstrap interval over runs. `within`: of ranks inside each group, `None` where no
    group has two runs or more, or nothing differs."""

    value: float
    low: float
    high: float
    within: float | None
    runs: int

    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


class Rung(NamedTuple):
    """At `samples` seen, the best `keep` runs go on."""

    samples: int
    keep: int


class Halving(NamedTuple):
    """`kept`: runs that are trained to the end, best signal first. `stopped`: the samples that others were stopped at.
    `samples`: spent on all runs; `share`: of what training all to the end takes."""

    kept: tuple[str, ...]
    stopped: Mapping[str, int]
    samples: int
    share: float


def early_mean(
    values: Sequence[float] | Float[np.ndarray, "steps"], samples_per_step: int, samples: int
) -> float:
    """The mean of a metric over the steps of the first `samples` samples, one step at least.

    Raises `DataError` for a run that is shorter, or values that are not finite.
    """
    steps = max(1, samples // samples_per_step)
    if steps > len(values):
        found = f"{steps} steps of {samples_per_step}, but there are {len(values)}"
        raise DataError(f"the first {samples} samples are {found}")
    mean = float(np.mean(np.asarray(values, np.float64)[:steps]))
    if not math.isfinite(mean):
        raise DataError(f"the mean over the first {steps} steps is {mean}")
    return mean


def signal_table(
    runs: Sequence[EarlyRun], *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, Correlation]:
    """The rank correlation of each signal (`grad_norm`, `loss`) with how good runs became.

    The interval is between percentiles over resampled runs (Efron 1979); resamples in which a column has one value only
    are left out. It treats runs as independent, which points of one grid with several seeds are not quite.

    Raises `DataError` for fewer than three runs, `ConfigError` for bad settings.
    """
    if len(runs) < 3:
        raise DataError(f"{len(runs)} runs, expected at least three to correlate")
    if not 0 < confidence < 1 or resamples < 2:
        raise ConfigError(f"confidence {confidence} and resamples {resamples}: expected a share, and at least 2")
    final = np.array([run.final for run in runs])
    groups = [run.group for run in runs]
    found = {}
    for name in SIGNALS:
        signal = np.array([getattr(run, name) for run in runs])
        rng = np.random.default_rng(seed)
        drawn = (rng.integers(0, len(runs), len(runs)) for _ in range(resamples))
        values = np.array([spearman(signal[i], final[i]) for i in drawn])
        values = values[np.isfinite(values)]
        tails = 50 * (1 - confidence)
        low, high = np.percentile(values, [tails, 100 - tails]) if len(values) else (math.nan, math.nan)
        value = spearman(signal, final)
        found[name] = Correlation(value, float(low), float(high), _within(signal, final, groups), len(runs))
    return found


def halving_plan(samples: int, runs: int, first: float = 0.1, factor: float = 2.0) -> list[Rung]:
    """Rungs at the share `first` of `samples` and each time `factor` times as many, which keep one in `factor` runs
    (at least one) of those left.

    Raises `ConfigError` for settings without a rung before the end.
    """
    if samples < 1 or runs < 2 or not 0 < first < 1 or not factor > 1:
        raise ConfigError(
            f"samples {samples}, runs {runs}, first {first}, factor {factor}: expected at least 1, at least 2, a share "
            "between 0 and 1, and more than 1"
        )
    plan, at, left = [], first * samples, runs
    while at < samples and left > 1:
        left = max(1, math.floor(left / factor))
        plan.append(Rung(max(1, round(at)), left))
        at *= factor
    return plan


def halve(
    plan: Sequence[Rung], names: Sequence[str], signal: Callable[[str, int], float], samples: int
) -> Halving:
    """Stops runs rung by rung: at each, those with the lowest `signal` go on, ties by order.

    Args:
      plan: of `halving_plan`, in order.
      names: of the runs.
      signal: `(name, samples)` gives a run's signal at so many samples seen, having trained it up to there if it is
        under way; the lower the better (minus the loss, where high losses are good). NaN counts as the worst.
      samples: of a run that is trained to the end.

    Raises `ConfigError` for a plan whose rungs do not increase in samples and decrease in runs, or go beyond the end.
    """
    at = [rung.samples for rung in plan]
    keeps = [len(names), *(rung.keep for rung in plan)]
    if at != sorted(set(at)) or any(a < b for a, b in zip(keeps, keeps[1:])) or min(keeps) < 1 or at[-1:] > [samples]:
        raise ConfigError(f"the plan {list(map(tuple, plan))} does not stop {len(names)} runs before {samples} samples")
    left, stopped = list(names), {}
    for rung in plan:
        value = {name: signal(name, rung.samples) for name in left}
        ranked = sorted(left, key=lambda name: math.inf if math.isnan(value[name]) else value[name])
        left = ranked[: rung.keep]
        stopped |= dict.fromkeys(ranked[rung.keep :], rung.samples)
    spent = sum(stopped.values()) + samples * len(left)
    return Halving(tuple(left), stopped, spent, spent / (samples * len(names)))


def samples_to_peak(samples: Sequence[int], scores: Sequence[float], tolerance: float = 0.0) -> int:
    """The samples seen at the first evaluation whose score is within `tolerance` of the highest.

    Raises `DataError` for unequal lengths, or scores none of which is a number.
    """
    values = np.asarray(scores, np.float64)
    if len(samples) != len(values) or not np.isfinite(values).any():
        raise DataError(f"{len(samples)} numbers of samples and scores {values.tolist()}: expected as many, one finite")
    return int(samples[int(np.argmax(values >= np.nanmax(values) - tolerance))])


def _within(signal: np.ndarray, final: np.ndarray, groups: Sequence[Hashable]) -> float | None:
    """The mean of the groups' own rank correlations, by their numbers of runs."""
    total, weight = 0.0, 0
    for group in dict.fromkeys(groups):
        mine = np.array([g == group for g in groups])
        value = spearman(signal[mine], final[mine]) if mine.sum() > 1 else math.nan
        if math.isfinite(value):
            total, weight = total + value * int(mine.sum()), weight + int(mine.sum())
    return total / weight if weight else None
