import math

import pytest

from jaxlm.core.errors import DataError
from jaxlm.evals.forgetting import measure_retention, measure_spike


def test_a_spike_that_recovers_and_one_that_does_not():
    found = measure_spike([0, 10, 20, 30, 40], [2.0, 2.5, 2.2, 1.9, 1.8])
    assert found == pytest.approx((0.5, 10, 30, -0.2))
    lost = measure_spike([0, 10, 20], [2.0, 3.0, 2.5])
    assert lost == pytest.approx((1.0, 10, math.inf, 0.5))


def test_a_loss_that_only_falls_has_no_spike():
    assert measure_spike([0, 1, 2], [2.0, 1.5, 1.0]) == (0.0, 0.0, 0.0, -1.0)


def test_a_loss_that_diverges_is_infinitely_high():
    found = measure_spike([0, 1, 2], [2.0, math.nan, 1.0])
    assert found.height == math.inf
    assert found.recovery_tokens == 2


@pytest.mark.parametrize(
    ("tokens", "losses", "said"),
    [
        ([0, 1], [1.0], "of both"),
        ([0], [1.0], "two times"),
        ([0, 0], [1.0, 2.0], "do not increase"),
        ([0, 1], [math.nan, 2.0], "at the change is nan"),
    ],
)
def test_what_cannot_be_measured_is_refused(tokens, losses, said):
    with pytest.raises(DataError, match=said):
        measure_spike(tokens, losses)


def test_retention_is_the_share_of_each_skill_that_is_left():
    found = measure_retention({"a": 0.8, "b": 0.5, "c": 0.0}, {"a": 0.2, "b": 0.9, "c": 0.3})
    assert found.kept == pytest.approx((0.25 + 1.0) / 2)
    assert found.changes == pytest.approx({"a": -0.6, "b": 0.4, "c": 0.3})
    assert math.isnan(measure_retention({"a": 0.0}, {"a": 1.0}).kept)
    with pytest.raises(DataError, match=r"before are \['a'\] and after \['b'\]"):
        measure_retention({"a": 1.0}, {"b": 1.0})
    with pytest.raises(DataError, match="a score of 'a' is nan"):
        measure_retention({"a": 1.0}, {"a": math.nan})
