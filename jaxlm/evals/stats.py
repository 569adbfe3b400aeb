"""How sure a measured metric is: standard errors, bootstrap, intervals of proportions, paired comparisons."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from jaxlm.core.errors import ConfigError, DataError


class Estimate(NamedTuple):
    """A metric and its standard error (NaN where it cannot be told, as for a single example)."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


class Interval(NamedTuple):
    low: float
    high: float


class McNemar(NamedTuple):
    """`first_only` and `second_only`: on how many examples one system alone was right. `p_value`: two-sided."""

    first_only: int
    second_only: int
    p_value: float


def mean(values: Sequence[float] | Float[np.ndarray, "items"]) -> Estimate:
    """The mean and its standard error `s / sqrt(n)`, with the sample deviation `s` (divisor `n - 1`)."""
    values = _finite_vector("values", values)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), error)


def bootstrap(
    statistic: Callable[..., float],
    *columns: Sequence[float] | Float[np.ndarray, "items"],
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """`statistic(*columns)`, and the deviation of its values over resampled items (Efron 1979).

    Items are drawn with replacement, all columns alike: for metrics that are no means of items, such as bits per byte
    `bootstrap(lambda ll, n: -ll.sum() / n.sum() / log(2), log_likelihoods, num_bytes)`. Same seed, same result.
    """
    arrays = [_finite_vector(f"column {i}", column) for i, column in enumerate(columns)]
    if len({len(a) for a in arrays}) != 1:
        raise DataError(f"columns of {[len(a) for a in arrays]} items, expected equal numbers of them")
    if resamples < 2:
        raise ConfigError(f"resamples is {resamples}, expected at least 2")
    count = len(arrays[0])
    value = float(statistic(*arrays))
    if count == 1:
        return Estimate(value, math.nan)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        chosen = rng.integers(0, count, count)
        drawn.append(float(statistic(*(a[chosen] for a in arrays))))
    return Estimate(value, float(np.std(drawn, ddof=1)))


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """The score interval of a proportion (Wilson 1927): stays in [0, 1], and is not empty at 0 or all successes."""
    if not 0 <= successes <= trials or trials < 1:
        raise DataError(f"{successes} successes of {trials} trials, expected 0 <= successes <= trials, and a trial")
    z2 = normal_quantile((1 + _probability("confidence", confidence)) / 2) ** 2
    share = successes / trials
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(z2 * (share * (1 - share) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    return Interval(max(0.0, center - half), min(1.0, center + half))


def mcnemar(first: Sequence[bool] | Bool[np.ndarray, "items"], second: Sequence[bool]) -> McNemar:
    """Whether two systems are right equally often, from the examples on which they differ (McNemar 1947).

    Exact: under the hypothesis each discordant example falls to either system with probability 1/2, so the p-value is
    the two tails of a binomial distribution, `min(1, 2 P(X <= min(b, c)))`.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.ndim != 1 or a.shape != b.shape:
        raise DataError(f"verdicts of shapes {a.shape} and {b.shape}, expected the same examples for both systems")
    first_only, second_only = int((a & ~b).sum()), int((b & ~a).sum())
    count = first_only + second_only
    tail = sum(math.comb(count, k) for k in range(min(first_only, second_only) + 1))
    # Integers until the end: exact for any number of examples.
    return McNemar(first_only, second_only, min(1.0, 2 * tail / 2**count))


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """The rank correlation of two columns (Spearman 1904): Pearson's of their ranks, equal values sharing a mean rank.

    NaN if a column has one value only. Raises `DataError` for columns of different lengths.
    """
    columns = [_finite_vector("values", values) for values in (first, second)]
    if len(columns[0]) != len(columns[1]):
        raise DataError(f"columns of {len(columns[0])} and {len(columns[1])} items, expected as many")
    ranks = []
    for column in columns:
        _, place, counts = np.unique(column, return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
        ranks.append(rank - rank.mean())
    scale = math.sqrt(float(ranks[0] @ ranks[0]) * float(ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1]) / scale if scale else math.nan


def normal_quantile(probability: float) -> float:
    """The value below which a standard normal variable lies with this probability."""
    return NormalDist().inv_cdf(_probability("probability", probability))


def _probability(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ConfigError(f"{name} is {value}, expected a number between 0 and 1")
    return value


def _finite_vector(name: str, values: Sequence[float] | np.ndarray) -> Float[np.ndarray, "items"]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise DataError(f"{name} has shape {array.shape}, expected a vector of at least one item")
    if bad := np.flatnonzero(~np.isfinite(array)).tolist():
        raise DataError(f"{name}: item {bad[0]} is {array[bad[0]]}")
    return array
