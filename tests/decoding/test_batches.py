import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.decoding import DecoderStepper, GenerationConfig, complete, generate_text
from jaxlm.testing import tiny_decoder

PROMPTS = ["def ", "a", "one two three four five six", "", "abc " * 11, [5, 6, 7]]


@pytest.fixture(scope="module")
def subject():
    model, params = tiny_decoder("llama", vocab_size=259)
    return DecoderStepper(model), params, ByteTokenizer()


@pytest.mark.parametrize("num_samples", [1, 2])
def test_equals_one_batch_of_all(subject, num_samples):
    config = GenerationConfig(max_new_tokens=8, num_samples=num_samples, seed=3)
    expected = generate_text(*subject, PROMPTS, config)
    calls = []
    results = complete(*subject, PROMPTS, config, batch_size=4, progress=lambda *call: calls.append(call))
    assert [[c.tokens for c in r] for r in results] == [[c.tokens for c in r] for r in expected]
    assert calls == [(4, 6), (6, 6)]


def test_ids_are_taken_as_they_are(subject):
    config = GenerationConfig(max_new_tokens=6, temperature=0)
    text, ids = complete(*subject, ["ab", [256, 97, 98]], config)
    assert text[0].tokens == ids[0].tokens


def test_stop_ids_replace_the_end_of_text(subject):
    config = GenerationConfig(max_new_tokens=6, temperature=0)
    ((free,),) = complete(*subject, ["ab"], config)
    ((stopped,),) = complete(*subject, ["ab"], config, stop_ids=[free.tokens[2]])
    assert stopped.tokens == free.tokens[: free.tokens.index(free.tokens[2]) + 1]
    assert stopped.finish_reason == "stop"


def test_long_prompts_lose_their_beginning(subject):
    config = GenerationConfig(max_new_tokens=6, temperature=0)
    whole, end = complete(*subject, [list(range(40)), list(range(30, 40))], config, max_length=16)
    assert whole[0].tokens == end[0].tokens


def test_nothing_to_complete(subject):
    assert complete(*subject, [], GenerationConfig()) == []


def test_bad_sizes_are_named(subject):
    with pytest.raises(ConfigError, match="max_new_tokens is 16, expected less than the context of 16"):
        complete(*subject, ["a"], GenerationConfig(max_new_tokens=16), max_length=16)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        complete(*subject, ["a"], GenerationConfig(), batch_size=0)
