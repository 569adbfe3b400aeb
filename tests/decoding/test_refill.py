"""Refill gives each prompt what plain generation gives it, in fewer steps."""

import dataclasses

import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.decoding import GenerationConfig, RepetitionPenalty, generate, generate_refilled, refilled
from jaxlm.decoding import generator as machine
from tests.decoding.steppers import make

RANDOM = np.random.default_rng(3)
PROMPTS = [RANDOM.integers(2, 16, n).tolist() for n in RANDOM.integers(1, 40, 13)]


def check_same(a, b, atol=0.0):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if x is not None:
            np.testing.assert_allclose(x, y, atol=atol, err_msg=field.name)


@pytest.mark.parametrize(("slots", "chunk"), [(1, 3), (3, 5), (16, 4), (100, 64)])
def test_results_are_those_of_plain_generation_in_issue_order(slots, chunk):
    stepper, salt = make("hash")
    config = GenerationConfig(max_new_tokens=30, num_samples=2, top_k=12, repetition_penalty=1.05, seed=9)
    plain = generate(stepper, salt, PROMPTS, config, stop_ids=(0, 1))
    check_same(generate_refilled(stepper, salt, PROMPTS, config, slots=slots, chunk=chunk, stop_ids=(0, 1)), plain)


def test_a_real_model_too():
    stepper, params = make("llama")
    config = GenerationConfig(max_new_tokens=10)
    options = {"stop_ids": tuple(range(12)), "processors": [RepetitionPenalty(1.3)]}
    plain = generate(stepper, params, PROMPTS[:6], config, **options)
    assert plain.stopped.any()
    check_same(generate_refilled(stepper, params, PROMPTS[:6], config, slots=3, chunk=3, **options), plain, 1e-4)


def test_rows_are_kept_busy(monkeypatch):
    """Lengths are geometric here: a batch waits for its longest row, refill for nearly nobody."""
    stepper, salt = make("hash")
    config = GenerationConfig(max_new_tokens=60, num_samples=8)
    steps = []
    advance = machine.Generator.advance

    def counting(self, params, state, n):
        before = np.array(state.lengths)
        state = advance(self, params, state, n)
        steps.append(int((np.array(state.lengths) - before).max()))
        return state

    monkeypatch.setattr(machine.Generator, "advance", counting)
    found = list(refilled(stepper, salt, PROMPTS, config, slots=8, chunk=2, stop_ids=(0, 1)))
    lengths = np.zeros(8 * len(PROMPTS), int)
    for sample in found:
        lengths[sample.prompt * 8 + sample.number] = len(sample.tokens)
    plain = sum(batch.max() for batch in lengths.reshape(-1, 8))  # as many rows at a time, without refill
    assert len(found) == len(lengths)
    assert lengths.min() > 0
    assert sum(steps) < 0.6 * plain
    # Never more than: all work divided over the rows, what a chunk makes finished rows wait, and the last rows' end.
    assert sum(steps) <= (lengths + 1).sum() / 8 + lengths.max() + 2


def test_what_it_cannot_do_is_refused():
    stepper, params = make("gpt2-shared")
    with pytest.raises(ConfigError, match="index per row"):
        next(refilled(stepper, params, PROMPTS, GenerationConfig()))
    stepper, salt = make("hash")
    with pytest.raises(ConfigError, match="use generate_text"):
        next(refilled(stepper, salt, PROMPTS, GenerationConfig(stop=("x",))))
    with pytest.raises(ConfigError, match="prompt 0 holds token 99"):
        next(refilled(stepper, salt, [[99]], GenerationConfig()))
