"""Text in, text out: stop strings across tokens, characters across tokens, pieces that are never taken back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.decoding import DecoderStepper, GenerationConfig, generate_text, stream_text
from jaxlm.decoding.text import _Text
from jaxlm.testing import tiny_decoder

FACE_HEAD = "\N{GRINNING FACE}".encode()[:3]
PIECES = (b"", b"", b"a", b"b", b"ab", b"STO", b"P!", b"\xc3", b"\xa9", FACE_HEAD, b"\x80", b"\n")
BOS, EOS, A, B, AB, STO, P, C3, A9, FACE, TAIL, LINE = range(len(PIECES))


class ToyTokenizer:
    """One id a letter of "ab"; the others only come from the model."""

    vocab_size = len(PIECES)
    special_ids = {"bos": BOS, "eos": EOS}

    def encode(self, text):
        return [{"a": A, "b": B}[letter] for letter in text]

    def token_bytes(self, token):
        return PIECES[token]


@dataclasses.dataclass(frozen=True)
class Script:
    """Says `params[first letter]`, token by token, whatever is fed."""

    vocab_size: int = len(PIECES)
    max_length: int | None = None
    per_row: bool = True

    def init(self, params, batch, capacity):
        return jnp.zeros((batch, 2), jnp.int32)  # which script, how many tokens so far

    def step(self, params, carry, tokens, counts=None, *, last_only=False):
        assert last_only
        which = jnp.where(carry[:, 1] == 0, tokens[:, min(1, tokens.shape[1] - 1)], carry[:, 0])
        length = carry[:, 1] + counts
        said = params[which, jnp.clip(length - 2, 0, params.shape[1] - 1)]
        return 100.0 * jax.nn.one_hot(said, self.vocab_size), jnp.stack([which, length], axis=1)

    def repeat(self, carry, n):
        return jnp.repeat(carry, n, axis=0)


def say(a=(), b=(), prompts=("a", "b"), **options):
    """Completions and streamed pieces where "a" is followed by the tokens `a`, and "b" by `b`."""
    table = np.full((len(PIECES), 24), EOS, np.int32)
    table[A, : len(a)], table[B, : len(b)] = a, b
    config = GenerationConfig(**{"max_new_tokens": 24, "temperature": 0.0, **options})
    arguments = (Script(), jnp.asarray(table), ToyTokenizer())
    completions = [samples[0] for samples in generate_text(*arguments, prompts, config)]
    for chunk in (1, 3, 16):
        streamed = [list(stream_text(*arguments, prompt, config, chunk=chunk)) for prompt in prompts]
        assert ["".join(pieces) for pieces in streamed] == [c.text for c in completions]
        assert all(all(pieces) for pieces in streamed)  # no empty ones
    return completions


def test_eos_ends_a_text_and_is_its_last_token():
    one, two = say([AB, A], [B])
    assert (one.text, one.tokens, one.finish_reason) == ("aba", (AB, A, EOS), "stop")
    assert (two.text, two.tokens, two.finish_reason) == ("b", (B, EOS), "stop")
    np.testing.assert_allclose(one.logprobs, 0.0, atol=1e-3)


def test_the_limit_ends_a_text():
    one, two = say([AB] * 9, [B, B], max_new_tokens=3)
    assert (one.text, len(one.tokens), one.finish_reason) == ("ababab", 3, "length")
    assert (two.text, len(two.tokens), two.finish_reason) == ("bb", 3, "stop")


def test_a_stop_string_may_begin_and_end_inside_tokens():
    one, two = say([AB, STO, P, A], [STO, STO, A, P, B], stop=("bSTOP", "zz"))
    assert (one.text, one.tokens, one.finish_reason) == ("a", (AB, STO, P), "stop")
    assert (two.text, two.finish_reason) == ("STOSTOaP!b", "stop")  # by EOS; no stop string in it


def test_the_stop_string_that_is_complete_first_counts():
    one, _ = say([A, B, A, AB, STO, P], stop=("baab", "aa", "P"))
    assert (one.text, one.tokens) == ("ab", (A, B, A, AB))
    one, _ = say([STO, P], stop=("TO", "STO", "O"))
    assert (one.text, one.tokens) == ("", (STO,))


def test_a_stop_string_is_not_looked_for_in_the_prompt():
    (one,) = say([B, A, LINE, A], prompts=("a",), stop=("ab", "\n"))
    assert (one.text, one.tokens) == ("ba", (B, A, LINE))


def test_a_character_is_streamed_when_it_is_complete():
    table = np.full((len(PIECES), 24), EOS, np.int32)
    table[A, :9] = [A, C3, A9, FACE, TAIL, B, C3, B, C3]
    config = GenerationConfig(max_new_tokens=24, temperature=0.0)
    arguments = (Script(), jnp.asarray(table), ToyTokenizer())
    pieces = list(stream_text(*arguments, "a", config, chunk=1))
    assert pieces == ["a", "\N{LATIN SMALL LETTER E WITH ACUTE}", "\N{GRINNING FACE}", "b", "\ufffdb", "\ufffd"]
    assert generate_text(*arguments, ["a"], config)[0][0].text == "".join(pieces)


def test_what_may_be_a_stop_string_is_held_back():
    table = np.full((len(PIECES), 24), EOS, np.int32)
    table[A, :6] = [A, STO, A, STO, P, A]
    config = GenerationConfig(max_new_tokens=24, temperature=0.0, stop=("STOP",))
    assert list(stream_text(Script(), jnp.asarray(table), ToyTokenizer(), "a", config, chunk=1)) == ["a", "STOa"]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(range(2, len(PIECES))), max_size=20),
    st.lists(st.text("abSTOP!\n\N{LATIN SMALL LETTER E WITH ACUTE}", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_any_text_in_any_chunks(tokens, stops, chunk):
    """Against reading the bytes one by one."""
    raw = b"".join(PIECES[t] for t in tokens)
    cut = len(raw)
    for end in range(len(raw) + 1):
        found = [s for s in stops if raw[:end].endswith(s.encode())]
        if found:
            cut = end - max(len(s.encode()) for s in found)
            break
    text, pieces = _Text(ToyTokenizer(), stops), []
    for low in range(0, len(tokens), chunk):
        text.feed(tokens[low : low + chunk])
        pieces.append(text.piece())
    pieces.append(text.flush())
    assert "".join(pieces) == text.final() == raw[:cut].decode("utf-8", errors="replace")
    assert text.stopped == (cut < len(raw))


def test_a_real_model_streams_what_it_generates():
    model, params = tiny_decoder(vocab_size=320, num_layers=2)
    stepper, tokenizer = DecoderStepper(model), ByteTokenizer()
    config = GenerationConfig(max_new_tokens=30, num_samples=2, stop=("e",), seed=3, temperature=0.7)
    completions = generate_text(stepper, params, tokenizer, ["def ", "", "\N{SNOWMAN}"], config)
    assert [len(samples) for samples in completions] == [2, 2, 2]
    assert completions[0][0] != completions[0][1]
    for sample in range(2):
        pieces = stream_text(stepper, params, tokenizer, "def ", config, sample=sample)
        assert "".join(pieces) == completions[0][sample].text
    # Ids that the tokenizer does not have are never drawn, though the model has them.
    assert max(t for samples in completions for c in samples for t in c.tokens) < tokenizer.vocab_size


def test_a_tokenizer_with_more_ids_than_the_model_is_refused():
    model, params = tiny_decoder(num_layers=2)
    with pytest.raises(ConfigError, match=r"a tokenizer with \d+ ids for a model with 64"):
        generate_text(DecoderStepper(model), params, ByteTokenizer(), ["a"], GenerationConfig())
