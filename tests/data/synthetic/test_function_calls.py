import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.synthetic import function_calls as calls
from jaxlm.verify.plans import parse_plan, plans_equal


def test_requests_have_the_plans_that_fulfill_them():
    for example in calls.draw_examples(200, 2):
        plan = parse_plan(example.plan)
        used = [x for call in plan for x in call.arguments if isinstance(x, int)]
        # Every result but the last ones is used by a later call.
        assert set(range(len(plan))) - set(used) == {
            i for i, call in enumerate(plan) if call.function in ("show", "send", "remind")
        }
        texts = {x for call in plan for x in call.arguments if isinstance(x, str)}
        assert all(text in example.request for text in texts)
        assert example.request.count("summary") == sum(call.function == "summarize" for call in plan)
        assert calls.decode([*calls.encode(example.plan), calls.VOCABULARY.index(calls.END), 5]).count("(") == len(plan)
        assert plans_equal(calls.decode(calls.encode(example.plan)), example.plan)


def test_a_request_has_one_plan():
    """Also of examples that were drawn apart, as those to train on and to be judged by are."""
    plans = {}
    for seed in range(20):
        for example in calls.draw_examples(300, 2, seed):
            assert plans.setdefault(example.request, example.plan) == example.plan, example.request
    assert any(" summary in " in request for request in plans)
    assert any(" summary of the " in request and " in " in request for request in plans)


def test_examples_differ_and_are_apart_from_those_excluded():
    first = calls.draw_examples(100, 1, seed=1)
    more = calls.draw_examples(100, 1, seed=2, exclude=first)
    requests = [e.request for e in (*first, *more)]
    assert len(set(requests)) == 200
    assert first == calls.draw_examples(100, 1, seed=1)
    assert max(e.request.count("summary") + e.request.count(" in ") for e in first) == 1


def test_the_loss_is_on_the_plan_alone():
    (example,) = calls.draw_examples(1, 1)
    batch = calls.example_arrays([example], 64)
    weights, inputs, targets = (batch[name][0] for name in ("loss_weights", "inputs", "targets"))
    counted = targets[weights > 0]
    assert plans_equal(calls.decode(counted), example.plan)
    assert calls.VOCABULARY[counted[-1]] == calls.END
    before = len(calls.prompt(example))
    assert inputs[:before].tolist() == calls.prompt(example)
    assert np.flatnonzero(weights)[0] == before - 1
    assert batch["segment_ids"][0].sum() == len(np.trim_zeros(inputs, "b"))


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="fewer than 100000"):
        calls.draw_examples(100_000, 0)
    with pytest.raises(DataError, match="rows hold 8"):
        calls.example_arrays(calls.draw_examples(1, 2), 8)
    with pytest.raises(DataError, match="'tomorrow' is not in the vocabulary"):
        calls.encode("show me tomorrow")
