"""Mixtures against Grain's own, against exact fractions, and across changes of weights."""

import json
import math
from fractions import Fraction

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError
from jaxlm.data.mixture import (
    Schedule,
    ScheduledMixture,
    check_weights,
    epoch_cap,
    examples_proportional,
    temperature,
)

quick = settings(deadline=None, max_examples=60)
weights_lists = st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any)


def names(weights):
    return [f"s{i}" for i in range(len(weights))]


@quick
@given(weights=weights_lists, n=st.integers(0, 400))
def test_counts_of_every_prefix_are_within_m_of_exact_shares(weights, n):
    mixture = ScheduledMixture(names(weights), [(0, weights)])
    counts = mixture.counts(n)
    assert counts.sum() == n
    for count, weight in zip(counts, weights):
        assert abs(int(count) - n * Fraction(weight, sum(weights))) < len(weights)
        assert weight or not count


@quick
@given(
    segments=st.lists(
        st.tuples(st.integers(1, 60), st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)),
        min_size=1,
        max_size=4,
    )
)
def test_locate_counts_up_in_every_source_across_segments(segments):
    mixture, start, owner = ScheduledMixture("abc"), 0, []
    for length, weights in segments:
        mixture.append(start, weights)
        start += length
        owner += [weights] * length
    source, local = mixture.locate(np.arange(start))
    seen = [0, 0, 0]
    for i, (s, j) in enumerate(zip(source.tolist(), local.tolist())):
        assert j == seen[s]
        assert owner[i][s] > 0
        seen[s] += 1
        assert mixture.counts(i + 1).tolist() == seen
    shuffled = np.random.default_rng(0).permutation(start)
    again = mixture.locate(shuffled)
    np.testing.assert_array_equal(again[0], source[shuffled])
    np.testing.assert_array_equal(again[1], local[shuffled])
    assert mixture[start - 1] == (source[-1], local[-1])


@pytest.mark.parametrize("weights", [[1], [1, 1], [1, 2], [3, 1, 2], [100, 250, 650], [5, 5, 1, 4]])
def test_equals_grain_s_mix_for_integer_weights(weights):
    sources = [grain.MapDataset.source([(s, j) for j in range(2000)]) for s in range(len(weights))]
    theirs = grain.MapDataset.mix(sources, weights)
    mixture = ScheduledMixture(names(weights), [(0, weights)])
    source, local = mixture.locate(np.arange(1500))
    assert [theirs[i] for i in range(1500)] == list(zip(source.tolist(), local.tolist()))


def test_grain_takes_it_as_a_selection_map():
    mixture = ScheduledMixture("ab", [(0, [1, 3]), (40, [0, 1])])
    sources = [grain.MapDataset.source([(s, j) for j in range(200)]) for s in range(2)]
    data = grain.MapDataset.select_from_datasets(sources, mixture)
    assert [data[i] for i in (0, 7, 39, 40, 99)] == [mixture[i] for i in (0, 7, 39, 40, 99)]


def test_far_indices_are_exact():
    mixture = ScheduledMixture("abc", [(0, [0.2, 0.3, 0.5])])
    far = len(mixture) - 10
    assert mixture.counts(far).tolist() == pytest.approx([far * 0.2, far * 0.3, far * 0.5], abs=3)
    source, local = mixture.locate(np.arange(far, far + 10))
    assert np.bincount(source).tolist() == [2, 3, 5]
    assert local.min() > far // 6


def test_small_weights_are_drawn_and_zero_weights_are_not():
    mixture = ScheduledMixture("abc", [(0, [1e-9, 0.0, 1.0])])
    assert mixture.counts(10**9).tolist() == pytest.approx([1000, 0, 10**9], abs=1000)
    assert mixture.counts(10**9)[1] == 0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, -0.1], r"mixture weight of 'code' is -0.1, expected >= 0"),
        ([math.nan, 1], r"mixture weight of 'text' is nan"),
        ([1, math.inf], r"mixture weight of 'code' is inf"),
        ([0, 0], r"all mixture weights are zero \(sources: text, code\)"),
        ([1], r"1 mixture weights for 2 sources \(text, code\)"),
        ([1, 1, 1], r"3 mixture weights for 2 sources"),
    ],
)
def test_bad_weights_are_named(weights, message):
    for check in (
        lambda: check_weights(weights, ["text", "code"]),
        lambda: ScheduledMixture(["text", "code"]).append(0, weights),
        lambda: Schedule(["text", "code"], [(0, weights)]),
    ):
        with pytest.raises(ConfigError, match=message):
            check()


def test_schedules_are_logs():
    schedule = Schedule(["text", "code"], [(0, [1, 1])])
    schedule.append(10, [0.25, 0.75])
    for step in (10, 3):
        with pytest.raises(ConfigError, match=f"entry at step {step} after one at step 10"):
            schedule.append(step, [1, 1])
    with pytest.raises(ConfigError, match="first entry of a schedule is at step 5"):
        Schedule(["a"], [(5, [1])])
    mixture = schedule.mixture(batch_size=4)
    assert mixture.counts(40).tolist() == [20, 20]
    assert mixture.counts(80).tolist() == [30, 50]
    with pytest.raises(ConfigError, match="index 40 after ones from index 40"):
        mixture.append(40, [1, 1])
    with pytest.raises(ConfigError, match="start at index 3, expected 0"):
        ScheduledMixture("ab", [(3, [1, 1])])
    again = Schedule.from_json(["text", "code"], json.loads(json.dumps(schedule.to_json())))
    assert again.entries == schedule.entries
    assert schedule.mixture(4, scale=[3, 1]).counts(40).tolist() == [30, 10]


def test_proportional_shares_and_temperature():
    np.testing.assert_allclose(examples_proportional([10, 30, 60]), [0.1, 0.3, 0.6])
    np.testing.assert_allclose(examples_proportional([10, 30, 60], cap=30), np.array([1, 3, 3]) / 7)
    np.testing.assert_allclose(temperature([1, 4], 2), [1 / 3, 2 / 3])
    np.testing.assert_allclose(temperature([0.1, 0.9], 1), [0.1, 0.9])
    np.testing.assert_allclose(temperature([1e-200, 1, 0], 1e9), [0.5, 0.5, 0], atol=1e-6)
    for bad in (0, -1, math.nan):
        with pytest.raises(ConfigError, match="temperature"):
            temperature([1, 1], bad)
    with pytest.raises(ConfigError, match="not all zero"):
        examples_proportional([0, 0])


@quick
@given(
    sources=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 1000)), min_size=1, max_size=6),
    fill=st.floats(0.01, 1.0),
    epochs=st.floats(0.5, 8),
)
def test_epoch_cap_is_the_water_filling_solution(sources, fill, epochs):
    weights, sizes = (np.array(x, float) for x in zip(*sources))
    limits = epochs * sizes
    budget = fill * limits.sum()
    shares = epoch_cap(weights, sizes, budget, epochs)
    draws = shares * budget
    assert shares.sum() == pytest.approx(1)
    assert (draws <= limits * (1 + 1e-9)).all()
    # Optimal: whoever is not at the limit has the same, highest, level of draws per weight.
    level = draws / weights
    free = draws < limits * (1 - 1e-9)
    if free.any():
        np.testing.assert_allclose(level[free], level.max(), rtol=1e-6)


def test_epoch_cap_by_hand():
    # b is limited to 2 * 100; a takes the remaining 800.
    np.testing.assert_allclose(epoch_cap([1, 1], [1000, 100], 1000, 2), [0.8, 0.2])
    np.testing.assert_allclose(epoch_cap([3, 1], [1000, 1000], 1000, 2), [0.75, 0.25])
    np.testing.assert_allclose(epoch_cap([1, 0], [500, 9999], 1000, 2), [1, 0])
    with pytest.raises(ConfigError, match="hold 1000 tokens, fewer than the budget of 1001"):
        epoch_cap([1, 0], [500, 9999], 1001, 2)
