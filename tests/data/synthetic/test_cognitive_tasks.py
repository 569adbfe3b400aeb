"""Cognitive tasks: periods, what is shown when, and that the answer is what the stimuli say."""

import jax
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.data.synthetic.cognitive_tasks import PERIODS, CognitiveTask, Periods


@pytest.mark.parametrize("name", PERIODS)
def test_trials_are_eight_steps_that_end_in_a_decision(name):
    task = CognitiveTask(name)
    batch = jax.jit(lambda key: task.sample(key, 64))(jax.random.key(0))
    assert batch["inputs"].shape == (64, 8, task.num_inputs)
    targets = np.asarray(batch["targets"])
    assert not targets[:, :7].any()
    assert set(targets[:, 7]) == {1, 2}
    assert task.decision_steps == slice(7, 8)
    np.testing.assert_array_equal(batch["inputs"][0, :, 0], [1] * 7 + [0])
    np.testing.assert_allclose(task.sample(jax.random.key(0), 64)["inputs"], batch["inputs"], atol=1e-6)
    assert (task.sample(jax.random.key(1), 64)["targets"] != targets).any()


def test_without_noise_the_stimuli_decide_a_choice():
    batch = CognitiveTask("choice", noise=0.0).sample(jax.random.key(0), 200)
    inputs, answer = np.asarray(batch["inputs"]), np.asarray(batch["targets"])[:, -1] - 1
    difference = inputs[:, :7, 1] - inputs[:, :7, 2]
    assert (difference == difference[:, :1]).all()
    np.testing.assert_allclose(np.unique(np.abs(difference).round(4)), [0, 0.064, 0.128, 0.256, 0.512], atol=1e-4)
    clear = np.abs(difference[:, 0]) > 1e-4
    np.testing.assert_array_equal(difference[clear, 0] < 0, answer[clear] == 1)
    np.testing.assert_allclose(inputs[:, :7, 1:].mean(-1), 0.5, atol=1e-6)
    assert not inputs[:, 7, 1:].any()


def test_samples_match_or_do_not():
    batch = CognitiveTask("match", noise=0.0).sample(jax.random.key(0), 50)
    inputs, answer = np.asarray(batch["inputs"]), np.asarray(batch["targets"])[:, -1]
    same = (inputs[:, 0, 1:] == inputs[:, 6, 1:]).all(-1)
    np.testing.assert_array_equal(same, answer == 1)
    assert 0.2 < same.mean() < 0.8
    assert set(inputs[:, 0, 1]) == {0, 1}
    assert not inputs[:, 1:6, 1:].any()
    assert not inputs[:, 7].any()


def test_the_cue_says_which_stimulus_counts():
    batch = CognitiveTask("context", noise=0.0).sample(jax.random.key(0), 200)
    inputs, answer = np.asarray(batch["inputs"]), np.asarray(batch["targets"])[:, -1] - 1
    first, second = (inputs[:, 0, i] < inputs[:, 0, i + 1] for i in (1, 3))
    cue = inputs[:, :, 5:]
    assert (cue.sum(-1) == 1).all()
    np.testing.assert_array_equal(np.where(cue[:, 0, 0] == 1, first, second), answer == 1)
    assert (first != second).any()
    assert not inputs[:, 2:, 1:5].any()


def test_noise_is_on_the_stimuli_alone():
    batch = CognitiveTask("match", noise=0.1).sample(jax.random.key(0), 500)
    inputs = np.asarray(batch["inputs"])
    assert np.std(inputs[:, 0, 1] - inputs[:, 0, 1].round()) == pytest.approx(0.1, rel=0.1)
    assert not inputs[:, 1:6, 1:].any()


def test_what_is_no_task_is_refused():
    with pytest.raises(ConfigError, match="no task 'mach': did you mean 'match'"):
        CognitiveTask("mach")
    with pytest.raises(ConfigError, match="periods of task 'choice'"):
        CognitiveTask("choice", Periods(3, 0, 1, 1))
    with pytest.raises(ConfigError, match="noise is -1"):
        CognitiveTask("choice", noise=-1.0)
    assert CognitiveTask("match", Periods(2, 3, 2, 2)).length == 9
