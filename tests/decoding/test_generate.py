"""`generate`: shapes, samples, buckets, keys, bad input; against a model without a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.decoding import DecoderStepper, Forbid, GenerationConfig, MinP, RepetitionPenalty, TopK, TopP, generate
from jaxlm.decoding import generator as machine
from jaxlm.decoding.generate import bucket, prompt_keys
from jaxlm.decoding.reference import reference_generate
from tests.decoding.steppers import hash_logits_of, make

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
STEPPER, SALT = make("hash")


def test_samples_equal_the_reference_one_by_one():
    config = GenerationConfig(
        max_new_tokens=12, temperature=1.3, top_k=9, top_p=0.9, repetition_penalty=1.1, seed=4, num_samples=2
    )
    out = generate(STEPPER, SALT, PROMPTS, config, stop_ids=(0, 3))
    assert out.tokens.shape == out.logprobs.shape == out.mask.shape == (3, 2, 12)
    for i, prompt in enumerate(PROMPTS):
        for j in range(2):
            expected = reference_generate(
                hash_logits_of(7, 16),
                prompt,
                max_new_tokens=12,
                key=jax.random.fold_in(prompt_keys(4, 3)[i], j),
                stop_ids=(0, 3),
                temperature=1.3,
                top_k=9,
                top_p=0.9,
                repetition_penalty=1.1,
            )
            length = out.lengths[i, j]
            assert out.tokens[i, j, :length].tolist() == expected.tokens
            np.testing.assert_allclose(out.logprobs[i, j, :length], expected.logprobs, atol=1e-5)
            assert out.stopped[i, j] == expected.stopped
            assert not out.tokens[i, j, length:].any()
            assert not out.logprobs[i, j, length:].any()
            assert out.mask[i, j].sum() == length
    assert out.stopped.any()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2-shared"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_cached_loop_equals_full_forward_passes(name, temperature):
    stepper, params = make(name)
    config = GenerationConfig(max_new_tokens=8, temperature=temperature, repetition_penalty=1.3)
    out = generate(stepper, params, PROMPTS, config)
    model = stepper.model

    @jax.jit
    def forward(tokens):
        return model.apply({"params": params}, tokens)

    def logits(tokens):
        return forward(np.pad(tokens, (0, 16 - len(tokens)))[None])[0, : len(tokens)]

    for i, prompt in enumerate(PROMPTS[:2]):
        key = jax.random.fold_in(prompt_keys(0, 3)[i], 0)
        expected = reference_generate(
            logits, prompt, max_new_tokens=8, key=key, temperature=temperature, repetition_penalty=1.3
        )
        assert out.tokens[i, 0].tolist() == expected.tokens
        np.testing.assert_allclose(out.logprobs[i, 0], expected.logprobs, atol=1e-4)


def test_a_prompts_samples_do_not_depend_on_its_company():
    config = GenerationConfig(max_new_tokens=10)
    keys = prompt_keys(0, 3)
    together = generate(STEPPER, SALT, PROMPTS, config, keys=keys)
    for i in range(3):
        alone = generate(STEPPER, SALT, PROMPTS[i : i + 1], config, keys=keys[i : i + 1])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
    more = generate(STEPPER, SALT, PROMPTS, dataclasses.replace(config, num_samples=3), keys=keys)
    np.testing.assert_array_equal(more.tokens[:, :1], together.tokens)
    other = generate(STEPPER, SALT, PROMPTS, dataclasses.replace(config, seed=1))
    assert (other.tokens != together.tokens).any()


def test_one_compilation_a_bucket():
    machine._prefill.clear_cache()
    machine._advance.clear_cache()
    batches = [PROMPTS, [[5] * 20, [1], [2, 2], [3]]]
    for salt, prompts in enumerate(batches):
        for new, top_k, temperature in ((9, 10, 0.5), (30, 13, 1.5)):
            config = GenerationConfig(
                max_new_tokens=new, temperature=temperature, top_k=top_k, min_p=0.1 / top_k, seed=salt
            )
            generate(STEPPER, jnp.uint32(salt), prompts, config, stop_ids=(salt, 7)[: salt + 1])
    assert machine._prefill._cache_size() == 1
    assert machine._advance._cache_size() == 1
    generate(STEPPER, SALT, [[1] * 33], GenerationConfig(max_new_tokens=4))
    assert machine._advance._cache_size() == 2


def test_buckets_are_powers_of_two_from_the_smallest():
    assert [bucket(n) for n in (1, 31, 32, 33, 64, 65)] == [32, 32, 32, 64, 64, 128]
    assert [bucket(n, 1) for n in (1, 2, 3, 5, 8)] == [1, 2, 4, 8, 8]


def test_settings_become_the_processors_that_they_need():
    def kinds(**settings):
        return [type(p) for p in GenerationConfig(**settings).processors()]

    assert kinds() == []
    assert kinds(temperature=0, top_k=5, top_p=0.5, min_p=0.1) == []
    assert kinds(top_p=0.5, min_p=0.1, top_k=5, repetition_penalty=2) == [RepetitionPenalty, TopK, TopP, MinP]
    assert GenerationConfig(top_k=50, top_p=0.5).processors()[1] == TopP(0.5, 64)  # sorts 64 numbers, not all


def test_extra_processors_join_at_their_stage():
    allowed = np.isin(np.arange(16), (2, 3))
    config = GenerationConfig(max_new_tokens=20, top_k=1, temperature=1.5, repetition_penalty=1.2)
    out = generate(STEPPER, SALT, PROMPTS, config, processors=[Forbid(~allowed)], processed_logprobs=True)
    assert set(np.unique(out.tokens)) == {2, 3}
    np.testing.assert_allclose(out.processed_logprobs, 0.0, atol=1e-5)  # only one token was left


def test_capacity_ends_rows_and_refuses_longer_prompts():
    out = generate(STEPPER, SALT, PROMPTS, GenerationConfig(max_new_tokens=10), capacity=9)
    assert out.lengths[:, 0].tolist() == [4, 7, 2]
    assert not out.stopped.any()
    with pytest.raises(ConfigError, match="prompt 2 has 7 tokens, which leaves none of a capacity of 7 free"):
        generate(STEPPER, SALT, PROMPTS, GenerationConfig(max_new_tokens=10), capacity=7)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts to continue"),
        ([[1], []], "prompt 1 is empty"),
        ([[1], [2], [3, 16]], "prompt 2 holds token 16; the vocabulary has ids 0 to 15"),
        ([[-1]], "prompt 0 holds token -1"),
    ],
)
def test_bad_prompts_are_named(prompts, message):
    with pytest.raises(ConfigError, match=message):
        generate(STEPPER, SALT, prompts, GenerationConfig())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("num_samples", 0),
        ("stop", ("",)),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"generation\.{field} is .*, expected"):
        GenerationConfig(**{field: value})


def test_other_bad_arguments_are_named():
    with pytest.raises(ConfigError, match="use generate_text"):
        generate(STEPPER, SALT, PROMPTS, GenerationConfig(stop=("a",)))
    with pytest.raises(ConfigError, match="2 keys for 3 prompts"):
        generate(STEPPER, SALT, PROMPTS, GenerationConfig(), keys=prompt_keys(0, 2))


def test_both_cache_modes_agree():
    stepper, params = make("llama")
    config = GenerationConfig(max_new_tokens=8, num_samples=2)
    a = generate(stepper, params, PROMPTS, config)
    b = generate(DecoderStepper(stepper.model, shared=True), params, PROMPTS, config)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
