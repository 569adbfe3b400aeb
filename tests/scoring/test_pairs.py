import math

import jax
import jax.numpy as jnp
import pytest

from jaxlm.core.errors import DataError
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.scoring import TokenizerEncoding, encode_pair, score_pairs, score_texts, score_tokens
from jaxlm.testing import GreedyTokenizer, tiny_decoder

BYTES = TokenizerEncoding(ByteTokenizer())


@pytest.fixture(scope="module")
def model():
    return tiny_decoder("llama", vocab_size=270)


def test_spaces_move_to_the_continuation():
    assert encode_pair(BYTES, "a  ", "b") == (list(b"a"), list(b"  b"))
    assert encode_pair(BYTES, "a", " b") == (list(b"a"), list(b" b"))
    assert encode_pair(BYTES, "a\n", "b") == (list(b"a"), list(b"\nb"))


def test_merges_across_the_boundary_stay():
    tokenizer = GreedyTokenizer()
    context, continuation = encode_pair(TokenizerEncoding(tokenizer), "xab", "cde")
    # "xabc" is x, abc: the two ids of "xab" are those of the whole up to "c".
    assert context == tokenizer.encode("xab")
    assert continuation == tokenizer.encode("xabcde")[2:] == tokenizer.encode("de")
    assert continuation != tokenizer.encode("cde")


def test_an_empty_context_is_the_prefix():
    assert encode_pair(BYTES, "", "ab") == ([256], list(b"ab"))
    assert encode_pair(TokenizerEncoding(ByteTokenizer(), add_bos=True), "", "ab") == ([256], list(b"ab"))


def test_a_continuation_may_lend_the_prefix():
    class Encoding:
        prefix = 97

        def encode_plain(self, text):
            return list(text.encode())

    assert encode_pair(Encoding(), "", "abc") == ([97], list(b"bc"))


def test_bos_where_asked_for():
    encoding = TokenizerEncoding(ByteTokenizer(), add_bos=True)
    assert encode_pair(encoding, "a ", "b") == ([256, *b"a"], list(b" b"))


def test_pairs_are_sums_of_tokens(model):
    pairs = [("one two", " three"), ("", "x"), ("a ", "b")]
    scores = score_pairs(*model, BYTES, pairs)
    expected = score_tokens(*model, [list(b"one two three"), [256, *b"x"], list(b"a b")], counts=[6, 1, 2])
    for score, tokens in zip(scores, expected):
        assert score.log_likelihood == pytest.approx(tokens.total, abs=1e-6)
        assert score.num_tokens == len(tokens.greedy)
        assert score.greedy == tokens.all_greedy


def test_uniform_model_in_closed_form(model):
    uniform = jax.tree.map(jnp.zeros_like, model[1])
    (pair,) = score_pairs(model[0], uniform, BYTES, [("q", " four")])
    assert pair.log_likelihood == pytest.approx(-5 * math.log(270), rel=1e-6)
    assert not pair.greedy
    (text,) = score_texts(model[0], uniform, BYTES, ["zwei wörter " * 20])
    assert text.log_likelihood == pytest.approx(-260 * math.log(270), rel=1e-6)
    assert (text.num_tokens, text.num_bytes, text.num_words) == (260, 260, 40)


def test_a_continuation_without_tokens_is_named(model):
    with pytest.raises(DataError, match="pair 1: the continuation '' adds no token"):
        score_pairs(*model, BYTES, [("a", "b"), ("a", "")])
