"""Scaling laws: planted coefficients come back, SciPy's own fit agrees, allocations are optimal."""

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit, minimize_scalar

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.evals.scaling import (
    Chinchilla,
    PowerLaw,
    bootstrap_fit,
    data_efficiency,
    fit_chinchilla,
    fit_power_law,
    nested_asymptote,
    optimal_batch_tokens,
)

# Kim et al. 2025: 0.05 / N^1.02 + 3.43 with N in billions; Hoffmann et al. 2022, approach 3, in plain units.
REGULARIZED = PowerLaw(0.05, 1.02, 3.43)
HOFFMANN = Chinchilla(406.4, 0.34, 410.7, 0.28, 1.69)
SIZES = np.array([0.15, 0.3, 0.6, 1.4])


@pytest.mark.parametrize("law", [REGULARIZED, PowerLaw(0.25, 1.02, 3.34), PowerLaw(7.0, 0.05, 0.5)])
def test_a_planted_power_law_comes_back(law):
    found = fit_power_law(SIZES, law.loss(SIZES))
    assert (found.amplitude, found.exponent, found.asymptote) == pytest.approx(
        (law.amplitude, law.exponent, law.asymptote), rel=0.01
    )


def test_a_noisy_fit_is_scipys():
    x = np.array([1e6, 3e6, 1e7, 3e7, 1e8, 3e8])
    y = PowerLaw(50.0, 0.3, 1.5).loss(x) + np.random.default_rng(0).normal(0, 0.003, 6)
    found = fit_power_law(x, y)
    theirs, _ = curve_fit(lambda x, a, b, c: a * x**-b + c, x, y, p0=(50.0, 0.3, 1.5))
    assert (found.amplitude, found.exponent, found.asymptote) == pytest.approx(tuple(theirs), rel=2e-3)


def test_a_planted_joint_law_comes_back_and_noise_gives_scipys():
    n, d = (x.ravel() for x in np.meshgrid([4e7, 1e8, 3e8, 5e8, 1e9, 2e9], [1e9, 3e9, 1e10, 3e10]))
    y = HOFFMANN.loss(n, d)
    found = fit_chinchilla(n, d, y)
    for name in ("amplitude_n", "exponent_n", "amplitude_d", "exponent_d", "asymptote"):
        assert getattr(found, name) == pytest.approx(getattr(HOFFMANN, name), rel=0.01)
    y = y + np.random.default_rng(1).normal(0, 1e-3, len(y))
    found = fit_chinchilla(n, d, y)
    start = (406.4, 0.34, 410.7, 0.28, 1.69)
    theirs, _ = curve_fit(lambda x, *c: Chinchilla(*c).loss(*x), (n, d), y, p0=start, maxfev=20_000)
    errors = [np.sum((law.loss(n, d) - y) ** 2) for law in (found, Chinchilla(*theirs))]
    assert errors[0] <= errors[1] * 1.001
    assert found.exponent_n == pytest.approx(theirs[1], rel=0.02)


def test_the_allocation_is_the_best_on_the_budget():
    compute = 1e21
    best = HOFFMANN.optimal_allocation(compute)
    assert 6 * best.params * best.tokens == pytest.approx(compute)
    marginal = [
        HOFFMANN.exponent_n * HOFFMANN.amplitude_n * best.params**-HOFFMANN.exponent_n,
        HOFFMANN.exponent_d * HOFFMANN.amplitude_d * best.tokens**-HOFFMANN.exponent_d,
    ]
    assert marginal[0] == pytest.approx(marginal[1])
    found = minimize_scalar(lambda log_n: HOFFMANN.loss(math.exp(log_n), compute / 6 / math.exp(log_n)), (18, 22))
    assert best.loss == pytest.approx(found.fun)
    same = Chinchilla(400.0, 0.3, 500.0, 0.3, 1.0)
    ratios = [a.tokens / a.params for a in map(same.optimal_allocation, (1e18, 1e24))]
    assert ratios[0] == pytest.approx(ratios[1])


def test_minicpms_ratio_of_tokens_to_parameters():
    # a .29, b .23, K^2 .01, e -.10 in billions: D / N is 192 at N = 1.88, D = 361.
    a, b = 0.29, 0.23
    law = Chinchilla(1.0, a, a / b / 0.1 ** (a + b), b, 0.0)
    best = law.optimal_allocation(6 * 1.88 * 361)
    ratio = 0.01 * (1.88 * 361) ** ((b - a) / (a + b))
    assert best.params / best.tokens == pytest.approx(ratio)
    assert best.tokens / best.params == pytest.approx(192, rel=0.12)  # of exponents given to two digits


def test_limits_of_limits():
    members = np.array([1, 2, 3, 4, 5])
    losses = [PowerLaw(0.25, 1.02, REGULARIZED.loss(n)).loss(members) for n in SIZES]
    laws, limit = nested_asymptote(SIZES, members, losses)
    assert [law.asymptote for law in laws] == pytest.approx(REGULARIZED.loss(SIZES).tolist(), rel=1e-3)
    assert limit.asymptote == pytest.approx(3.43, rel=1e-3)


def test_data_efficiency_is_how_much_more_the_baseline_needs():
    baseline = PowerLaw(1.0, 0.24, 1.9)
    assert data_efficiency(baseline, float(baseline.loss(5.0)), 1.0) == pytest.approx(5.0)
    assert data_efficiency(baseline, 1.9, 1.0) == math.inf


def test_intervals_hold_the_planted_law_and_shrink_with_the_noise():
    x, law = np.geomspace(1, 100, 8), PowerLaw(1.0, 0.5, 2.0)
    noise = np.random.default_rng(0).normal(0, 1, 8)
    wide, narrow = (
        bootstrap_fit(fit_power_law, x, law.loss(x) + scale * noise, resamples=60, confidence=0.99)
        for scale in (1e-2, 1e-3)
    )
    for name in ("amplitude", "exponent", "asymptote"):
        assert wide[name].low < getattr(law, name) < wide[name].high
        assert narrow[name].high - narrow[name].low < 0.3 * (wide[name].high - wide[name].low)
    exact = bootstrap_fit(fit_power_law, x, law.loss(x), resamples=5)["exponent"]
    assert (exact.low, exact.high) == pytest.approx((0.5, 0.5), rel=1e-3)
    assert math.isnan(bootstrap_fit(fit_power_law, x[:3], law.loss(x[:3]))["asymptote"].low)


def test_the_batch_size_rule():
    assert optimal_batch_tokens(2.5) == pytest.approx(3.98e6, rel=0.005)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: fit_power_law([1, 2], [3, 2]), DataError, "2 different values"),
        (lambda: fit_power_law([1, 2, 0], [3, 2, 1]), DataError, "positive numbers"),
        (lambda: fit_power_law([1, 2, 3], [3, 2]), DataError, "equal vectors"),
        (lambda: fit_power_law([1, 2, 3], [3, 2, math.nan]), DataError, "finite"),
        (lambda: fit_chinchilla([1, 2, 3], [1, 2, 3], [3, 2, 1]), DataError, "3 points, expected at least 5"),
        (lambda: nested_asymptote([1, 2, 3], [1, 2, 3], [[3, 2, 1]]), DataError, "1 rows"),
        (lambda: Chinchilla(0.0, 1, 1, 1, 1).optimal_allocation(1.0), ConfigError, "does not depend"),
        (lambda: HOFFMANN.optimal_allocation(0.0), ConfigError, "compute is 0"),
        (lambda: bootstrap_fit(fit_power_law, [1, 2, 3], [3, 2, 1], confidence=1.0), ConfigError, "confidence 1.0"),
        (lambda: optimal_batch_tokens(0.0), ConfigError, "loss is 0"),
        (lambda: data_efficiency(REGULARIZED, 3.5, 0.0), ConfigError, "tokens is 0"),
    ],
)
def test_what_cannot_be_fitted_is_named(call, error, said):
    with pytest.raises(error, match=said):
        call()
