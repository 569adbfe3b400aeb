import math

import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.evals.stats import bootstrap, mcnemar, mean, spearman, wilson_interval


def test_mean_of_a_proportion_has_the_closed_form():
    values = [1] * 30 + [0] * 70
    estimate = mean(values)
    assert estimate.value == pytest.approx(0.3)
    assert estimate.error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_mean_of_one_item_has_no_error():
    assert mean([2.0]).value == 2
    assert math.isnan(mean([2.0]).error)


def test_bootstrap_of_a_mean_approaches_the_closed_form():
    values = np.random.default_rng(0).normal(size=400)
    estimate = bootstrap(np.mean, values, resamples=4000)
    assert estimate.value == pytest.approx(values.mean())
    # Of the bootstrap distribution itself: the deviation with divisor n.
    assert estimate.error == pytest.approx(values.std() / math.sqrt(400), rel=0.05)


def test_bootstrap_keeps_columns_together():
    num_bytes = np.arange(1, 50)
    estimate = bootstrap(lambda ll, n: ll.sum() / n.sum(), -3.0 * num_bytes, num_bytes)
    assert estimate == (-3, pytest.approx(0, abs=1e-12))


def test_bootstrap_depends_on_its_seed_alone():
    values = list(range(20))
    assert bootstrap(np.median, values, seed=3) == bootstrap(np.median, values, seed=3)
    assert bootstrap(np.median, values, seed=3).error != bootstrap(np.median, values, seed=4).error


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (10, 10), (480, 1000)])
def test_wilson_ends_solve_the_score_equation(successes, trials):
    # The interval is of those p for which |share - p| <= z sqrt(p (1 - p) / n).
    interval = wilson_interval(successes, trials)
    share = successes / trials
    for p in interval:
        assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / trials), abs=1e-6)
    assert 0 <= interval.low <= share <= interval.high <= 1


def test_wilson_in_the_literature():
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_mcnemar_counts_both_tails():
    first = [True] * 9 + [False] * 1 + [True] * 5
    second = [False] * 9 + [True] * 1 + [True] * 5
    result = mcnemar(first, second)
    assert (result.first_only, result.second_only) == (9, 1)
    assert result.p_value == pytest.approx(2 * (1 + 10) / 1024)
    assert mcnemar(second, first).p_value == result.p_value


def test_mcnemar_of_equals():
    assert mcnemar([True, False], [True, False]).p_value == 1
    assert mcnemar([True, False], [False, True]).p_value == 1
    many = mcnemar([True] * 3000 + [False] * 2000, [False] * 3000 + [True] * 2000)
    assert 0 < many.p_value < 1e-40


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mean([]), DataError, "values has shape"),
        (lambda: mean([1, math.nan]), DataError, "values: item 1 is nan"),
        (lambda: bootstrap(np.sum, [1, 2], [1]), DataError, r"columns of \[2, 1\] items"),
        (lambda: bootstrap(np.sum, [1, 2], resamples=1), ConfigError, "resamples is 1"),
        (lambda: wilson_interval(3, 2), DataError, "3 successes of 2 trials"),
        (lambda: wilson_interval(1, 2, confidence=95), ConfigError, "confidence is 95"),
        (lambda: mcnemar([True], [True, False]), DataError, "the same examples"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_rank_correlation_with_ties():
    assert spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [9, 5, 2, 1]) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: Pearson's of these.
    assert spearman([1, 2, 2, 3], [10, 30, 20, 40]) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 3, 2, 4])[0, 1])
    assert math.isnan(spearman([1, 1], [1, 2]))
    with pytest.raises(DataError, match="columns of 2 and 3 items"):
        spearman([1, 2], [1, 2, 3])
