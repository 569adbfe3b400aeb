import math

import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.evals.early_signals import (
    EarlyRun,
    Rung,
    early_mean,
    halve,
    halving_plan,
    samples_to_peak,
    signal_table,
)


def runs(count=12, seed=0):
    """The final quality falls with the gradient norm; the loss says nothing."""
    rng = np.random.default_rng(seed)
    norms, losses = np.arange(count) + 1.0, rng.permutation(count) + 0.0
    return [EarlyRun(str(i), norms[i], losses[i], -(norms[i] ** 2), i % 2) for i in range(count)]


def test_correlations_are_those_of_ranks_with_an_interval():
    table = signal_table(runs())
    norm, loss = table["grad_norm"], table["loss"]
    assert norm.value == norm.within == -1
    assert (norm.low, norm.high) == (-1, -1)
    assert norm.excludes_zero()
    assert loss.low < loss.value < loss.high
    assert loss.low < 0 < loss.high
    assert not loss.excludes_zero()
    assert loss.runs == 12
    assert signal_table(runs()) == table


def test_the_interval_of_many_runs_is_fishers():
    rng = np.random.default_rng(1)
    x = rng.normal(size=400)
    y = 0.6 * x + 0.8 * rng.normal(size=400)
    found = signal_table([EarlyRun(str(i), a, a, b) for i, (a, b) in enumerate(zip(x, y))])["loss"]
    # The standard error of Fisher's z for ranks: sqrt((1 + r^2 / 2) / (n - 3)) (Bonett and Wright 2000).
    z, error = math.atanh(found.value), math.sqrt((1 + found.value**2 / 2) / 397)
    assert found.low == pytest.approx(math.tanh(z - 1.96 * error), abs=0.02)
    assert found.high == pytest.approx(math.tanh(z + 1.96 * error), abs=0.02)


def test_groups_are_compared_within_themselves():
    # Between groups the signal rises with quality, within each it falls.
    found = signal_table([EarlyRun(f"{g}{i}", 10 * g + i, 1.0, 10 * g - i, g) for g in range(3) for i in range(3)])
    assert found["grad_norm"].value > 0
    assert found["grad_norm"].within == -1
    assert found["loss"].within is None
    assert math.isnan(found["loss"].value)
    assert math.isnan(found["loss"].low)


def test_early_means_are_of_equal_samples():
    values = [4.0, 2.0, 9.0, 9.0]
    assert early_mean(values, 8, 16) == 3.0
    assert early_mean(values, 8, 20) == 3.0
    assert early_mean(values, 64, 16) == 4.0
    with pytest.raises(DataError, match="5 steps of 8, but there are 4"):
        early_mean(values, 8, 40)
    with pytest.raises(DataError, match="is nan"):
        early_mean([math.nan], 8, 8)


def test_halving_keeps_the_lowest_signals_and_counts_samples():
    assert halving_plan(1000, 9, 0.1) == [Rung(100, 4), Rung(200, 2), Rung(400, 1)]
    assert halving_plan(1000, 100, 0.5) == [Rung(500, 50)]
    signals = {"a": 3.0, "b": 1.0, "c": 2.0, "d": math.nan}
    asked = []

    def signal(name, samples):
        asked.append((name, samples))
        return signals[name] if samples == 100 else -signals[name]

    found = halve([Rung(100, 2), Rung(200, 1)], list(signals), signal, 1000)
    assert found.kept == ("c",)
    assert found.stopped == {"a": 100, "d": 100, "b": 200}
    assert (found.samples, found.share) == (1400, 0.35)
    assert asked[4:] == [("b", 200), ("c", 200)]  # those stopped are not trained on


def test_the_peak_is_where_the_maximum_is_nearly_reached():
    assert samples_to_peak([10, 20, 30, 40], [0.1, 0.79, math.nan, 0.8]) == 40
    assert samples_to_peak([10, 20, 30, 40], [0.1, 0.79, math.nan, 0.8], 0.02) == 20
    with pytest.raises(DataError, match="one finite"):
        samples_to_peak([10], [math.nan])


def test_bad_input_is_named():
    with pytest.raises(DataError, match="2 runs"):
        signal_table(runs(2))
    with pytest.raises(ConfigError, match="confidence 95"):
        signal_table(runs(), confidence=95)
    with pytest.raises(ConfigError, match="first 1.0"):
        halving_plan(100, 4, 1.0)
    for plan in ([Rung(200, 2), Rung(100, 1)], [Rung(100, 1), Rung(200, 2)], [Rung(2000, 1)], [Rung(100, 0)]):
        with pytest.raises(ConfigError, match="does not stop 4 runs before 1000"):
            halve(plan, list("abcd"), lambda name, samples: 0.0, 1000)
