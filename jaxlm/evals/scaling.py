"""Scaling laws: fits with asymptotes, intervals, the best model for a compute budget, data efficiency.

    law = fit_power_law(tokens, losses)                    # loss = amplitude * tokens^-exponent + asymptote
    low, high = bootstrap_fit(fit_power_law, tokens, losses)["asymptote"]
    joint = fit_chinchilla(params, tokens, losses)
    best = joint.optimal_allocation(compute=1e21)

Both forms are linear in all but their exponents. The linear part is solved exactly, with no negative coefficient, for
each exponent that is tried, so a fit has no starting point and does not end in a local minimum of the others.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.evals.stats import Interval

EXPONENTS = (0.01, 4.0)
"""Between which exponents are looked for."""

Values = Sequence[float] | Float[np.ndarray, "points"]


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """`loss(x) = amplitude * x ** -exponent + asymptote`."""

    amplitude: float
    exponent: float
    asymptote: float

    def loss(self, x: Any) -> Any:
        """At a number or an array."""
        return self.amplitude * np.asarray(x, np.float64) ** -self.exponent + self.asymptote

    def inverse(self, loss: float) -> float:
        """The `x` at which the law reaches a loss; infinite at its asymptote and below."""
        if loss <= self.asymptote:
            return math.inf
        return (self.amplitude / (loss - self.asymptote)) ** (1 / self.exponent)


class Allocation(NamedTuple):
    """The model and the data that a compute budget is best spent on, and the loss to expect."""

    params: float
    tokens: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Chinchilla:
    """`loss(N, D) = amplitude_n * N ** -exponent_n + amplitude_d * D ** -exponent_d + asymptote`.

    N are parameters without embeddings, D tokens, in the units that the fit was given.
    """

    amplitude_n: float
    exponent_n: float
    amplitude_d: float
    exponent_d: float
    asymptote: float

    def loss(self, params: Any, tokens: Any) -> Any:
        n, d = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
        return self.amplitude_n * n**-self.exponent_n + self.amplitude_d * d**-self.exponent_d + self.asymptote

    def optimal_allocation(self, compute: float) -> Allocation:
        """The least loss at `6 * params * tokens = compute`, where both terms fall equally fast: `a C_N N^-a = b C_D
        D^-b`. (Hoffmann et al. 2022, arXiv 2203.15556, equation 4; in MiniCPM's form `N / D = K^2 (C / 6)^((b - a) /
        (a + b))`.) In units of billions, compute is in units of 1e18.

        Raises `ConfigError` where one term is absent, and the best size or data without bound.
        """
        if not compute > 0:
            raise ConfigError(f"compute is {compute}, expected > 0")
        a, b = self.exponent_n, self.exponent_d
        if not (self.amplitude_n > 0 and self.amplitude_d > 0):
            raise ConfigError(f"the loss does not depend on both params and tokens: {self}")
        ratio = (a * self.amplitude_n / (b * self.amplitude_d)) ** (1 / (a + b))
        params = ratio * (compute / 6) ** (b / (a + b))
        tokens = compute / 6 / params
        return Allocation(params, tokens, float(self.loss(params, tokens)))


def fit_power_law(x: Values, losses: Values) -> PowerLaw:
    """The power law with the least squared error over three points or more; no coefficient is negative.

    Raises `DataError` for unequal numbers of both, fewer than three different `x`, or one that is not positive.
    """
    (at,), y = _points((("x", x),), losses, 3)
    center = _center(at)

    def solve(exponents: Sequence[float]) -> tuple[float, np.ndarray]:
        return _linear(np.stack([(at / center) ** -exponents[0], np.ones_like(y)], axis=1), y)

    (exponent,) = _search(solve, 1)
    _, (amplitude, asymptote) = solve((exponent,))
    return PowerLaw(float(amplitude) * center**exponent, float(exponent), float(asymptote))


def fit_chinchilla(params: Values, tokens: Values, losses: Values) -> Chinchilla:
    """The law in both sizes with the least squared error over five points or more; no coefficient is negative.

    Raises `DataError` as `fit_power_law`, for three different values of each size.
    """
    (n, d), y = _points((("params", params), ("tokens", tokens)), losses, 5)
    centers = _center(n), _center(d)

    def solve(exponents: Sequence[float]) -> tuple[float, np.ndarray]:
        columns = [(x / c) ** -e for x, c, e in zip((n, d), centers, exponents, strict=True)]
        return _linear(np.stack([*columns, np.ones_like(y)], axis=1), y)

    a, b = _search(solve, 2)
    _, (c_n, c_d, asymptote) = solve((a, b))
    return Chinchilla(
        float(c_n) * centers[0] ** a, float(a), float(c_d) * centers[1] ** b, float(b), float(asymptote)
    )  # fmt: skip


def nested_asymptote(
    outer: Values, inner: Values, losses: Sequence[Values] | Float[np.ndarray, "outer inner"]
) -> tuple[list[PowerLaw], PowerLaw]:
    """The limit of limits: a law along `inner` for each of `outer`, and a law of their asymptotes along `outer`.

    As in Kim et al. (2025, arXiv 2509.14786): ensemble members first, model sizes second. The second law's `asymptote`
    is the joint limit.
    """
    if len(outer) != len(losses):
        raise DataError(f"{len(losses)} rows of losses for {len(outer)} outer values, expected as many")
    laws = [fit_power_law(inner, row) for row in losses]
    return laws, fit_power_law(outer, [law.asymptote for law in laws])


def data_efficiency(baseline: PowerLaw, loss: float, tokens: float) -> float:
    """How many times the tokens the baseline's law needs for the loss that a recipe reached with `tokens` of them.

    Infinite below the baseline's asymptote.
    """
    if not tokens > 0:
        raise ConfigError(f"tokens is {tokens}, expected > 0")
    return baseline.inverse(loss) / tokens


def bootstrap_fit(
    fit: Callable[..., Any], *columns: Values, resamples: int = 200, seed: int = 0, confidence: float = 0.9
) -> dict[str, Interval]:
    """Intervals of every coefficient of `fit(*columns)`, the last column being the losses.

    Residuals are resampled (Efron 1979), widened by `sqrt(n / (n - coefficients))`: laws rest on too few points to
    leave some out. NaN where there are no more points than coefficients.

    Raises `ConfigError` for fewer than two resamples or a confidence outside (0, 1).
    """
    if resamples < 2 or not 0 < confidence < 1:
        raise ConfigError(f"resamples {resamples}, confidence {confidence}: expected >= 2, and between 0 and 1")
    *sizes, losses = (np.asarray(c, np.float64) for c in columns)
    law = fit(*sizes, losses)
    names = [f.name for f in dataclasses.fields(law)]
    spare = len(losses) - len(names)
    if spare < 1:
        return dict.fromkeys(names, Interval(math.nan, math.nan))
    fitted = law.loss(*sizes)
    residuals = (losses - fitted) * math.sqrt(len(losses) / spare)
    rng = np.random.default_rng(seed)
    found = [fit(*sizes, fitted + rng.choice(residuals, len(residuals))) for _ in range(resamples)]
    tail = (1 - confidence) / 2
    edges = {name: np.quantile([getattr(f, name) for f in found], [tail, 1 - tail]) for name in names}
    return {name: Interval(*map(float, edge)) for name, edge in edges.items()}


def optimal_batch_tokens(loss: float) -> float:
    """Tokens in the best batch at a loss (nats a token on C4, MiniCPM's tokenizer): `1.21e9 / loss^6.24`.

    Source: MiniCPM (Hu et al. 2024, arXiv 2404.06395, section 3.2). Other data and tokenizers have other coefficients.
    """
    if not loss > 0:
        raise ConfigError(f"loss is {loss}, expected > 0")
    return 1.21e9 / loss**6.24


def _points(
    columns: Sequence[tuple[str, Values]], losses: Values, least: int
) -> tuple[list[np.ndarray], np.ndarray]:
    y = np.asarray(losses, np.float64)
    found = []
    for name, values in columns:
        x = np.asarray(values, np.float64)
        if x.ndim != 1 or x.shape != y.shape:
            raise DataError(f"{name} of shape {x.shape} and losses of shape {y.shape}, expected equal vectors")
        if not (np.isfinite(x).all() and (x > 0).all()):
            raise DataError(f"{name} {x.tolist()}: expected positive numbers")
        if len(np.unique(x)) < 3:
            raise DataError(f"{name} has {len(np.unique(x))} different values, expected at least 3")
        found.append(x)
    if len(y) < least:
        raise DataError(f"{len(y)} points, expected at least {least}")
    if not np.isfinite(y).all():
        raise DataError(f"losses {y.tolist()}: expected finite numbers")
    return found, y


def _center(x: np.ndarray) -> float:
    """The geometric mean: powers of what is divided by it stay near 1."""
    return float(np.exp(np.mean(np.log(x))))


def _linear(design: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Squared error and coefficients, none negative, of the best linear combination of the design's columns."""
    from scipy.optimize import nnls

    try:
        coefficients, residual = nnls(design, y)
    except RuntimeError:  # did not converge: columns that are all but equal
        return math.inf, np.zeros(design.shape[1])
    return residual**2, coefficients


def _search(solve: Callable[[Sequence[float]], tuple[float, np.ndarray]], size: int) -> tuple[float, ...]:
    """The exponents with the least error: a grid over all of their range, then steps from the best, ever smaller."""
    low, high = (math.log(edge) for edge in EXPONENTS)
    points = 40 if size == 1 else 13

    def error(point: tuple[float, ...]) -> float:
        return solve([math.exp(e) for e in point])[0]

    best = min(itertools.product(np.linspace(low, high, points), repeat=size), key=error)
    least, width = error(best), (high - low) / (points - 1)
    while width > 1e-6:
        near = [tuple(np.clip(np.add(best, s), low, high)) for s in itertools.product((-width, 0, width), repeat=size)]
        found = min(near, key=error)
        if error(found) < least:
            best, least = found, error(found)
        else:
            width /= 2
    return tuple(float(math.exp(e)) for e in best)
