"""Sampling from ensembles: what the combined model says, with mapped members and with members one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.decoding import DecoderStepper, EnsembleStepper, GenerationConfig, StackedStepper, generate
from jaxlm.models import EnsembleModel, stack_members
from jaxlm.models.ensemble import COMBINE
from jaxlm.testing import tiny_decoder
from tests.decoding.steppers import HashStepper

PROMPTS = [[3, 1, 4], [1, 5]]


@pytest.fixture(scope="module")
def setting():
    model, one = tiny_decoder("llama", num_layers=1)
    _, other = tiny_decoder("llama", seed=1, num_layers=1)
    return model, [one, other]


@pytest.mark.parametrize("combine", COMBINE)
def test_greedy_samples_are_the_argmax_of_the_combined_model(setting, combine):
    model, members = setting
    stacked = stack_members(members)
    config = GenerationConfig(max_new_tokens=5, temperature=0)
    found = generate(StackedStepper(DecoderStepper(model), combine), stacked, PROMPTS, config)
    apply = jax.jit(EnsembleModel(model, combine).apply)
    for prompt, new, logprobs in zip(PROMPTS, found.tokens[:, 0], found.logprobs[:, 0]):
        whole = jnp.asarray([[*prompt, *new.tolist()]])
        after = jax.nn.log_softmax(apply({"params": stacked}, whole))[0, len(prompt) - 1 : -1]
        assert np.argmax(after, axis=-1).tolist() == new.tolist()
        np.testing.assert_allclose(np.max(after, axis=-1), logprobs, atol=1e-4)


def test_mapped_members_are_members_one_by_one(setting):
    model, members = setting
    config, stepper = GenerationConfig(max_new_tokens=6, seed=2, num_samples=2), DecoderStepper(model)
    mapped = generate(StackedStepper(stepper), stack_members(members), PROMPTS, config)
    listed = generate(EnsembleStepper((stepper, stepper)), tuple(members), PROMPTS, config)
    np.testing.assert_array_equal(mapped.tokens, listed.tokens)
    np.testing.assert_allclose(mapped.logprobs, listed.logprobs, atol=1e-4)


def test_members_of_different_vocabularies_are_refused():
    with pytest.raises(ConfigError, match=r"sizes \[16, 8\]"):
        EnsembleStepper((HashStepper(), HashStepper(8)))
    with pytest.raises(ConfigError, match="combine is 'votes'"):
        StackedStepper(HashStepper(), "votes")
