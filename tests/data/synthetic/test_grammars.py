"""Grammars against enumeration of all sentences and parses, and against NLTK where it is installed."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.synthetic.grammars import (
    conditional_entropy,
    emissions,
    inside,
    layered_grammar,
    parse_grammar,
    root_labels,
    sample_sentences,
    sentence_log_prob,
    span_labels,
    word_conditionals,
)

# Recursive and ambiguous: "a a a" has two parses from S, and X and S share rules.
TEXT = """
S -> S X [0.2] | X S [0.1] | X X [0.3] | 'a' [0.2]
S -> 'b' [0.1] | 'b' [0.1]
X -> X S [0.25] | 'a' [0.25] | 'c' [0.5]
"""
GRAMMAR = parse_grammar(TEXT)
LAYERED = layered_grammar(0, levels=2, symbols=3, words=6, roots=2, rules=3, leaf_words=3)


def derivations(grammar, symbol, words):
    """The probability of `words` from a symbol, by recursion over all parses."""
    total = grammar.lexical[symbol, words[0]] if len(words) == 1 else 0.0
    for cut in range(1, len(words)):
        for left, right in zip(*np.nonzero(grammar.binary[symbol])):
            inner = derivations(grammar, left, words[:cut]) * derivations(grammar, right, words[cut:])
            total += grammar.binary[symbol, left, right] * inner
    return total


def all_sentences(grammar, length):
    return np.array(list(itertools.product(range(len(grammar.words)), repeat=length)))


def exact(grammar, rows):
    return np.array(
        [sum(p * derivations(grammar, s, tuple(row)) for s, p in enumerate(grammar.start) if p) for row in rows]
    )


@pytest.mark.parametrize(("grammar", "length"), [(GRAMMAR, 4), (LAYERED, 3)])
def test_probabilities_are_sums_over_all_parses(grammar, length):
    rows = all_sentences(grammar, length)
    truth = exact(grammar, rows)
    assert truth.max() > 0
    found = np.exp(sentence_log_prob(grammar, jnp.asarray(rows), jnp.full(len(rows), length)))
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-9)


def test_probabilities_of_all_sentences_add_up_to_one():
    total = 0.0
    for length in range(1, 5):
        rows = np.concatenate([all_sentences(LAYERED, length), np.full((6**length, 4 - length), -1)], axis=1)
        total += np.exp(sentence_log_prob(LAYERED, jnp.asarray(rows), jnp.full(len(rows), length))).sum()
    assert total == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("grammar", "length"), [(GRAMMAR, 4), (LAYERED, 3)])
def test_conditionals_are_ratios_of_sentence_probabilities(grammar, length):
    rows = all_sentences(grammar, length)
    table = exact(grammar, rows).reshape((len(grammar.words),) * length)
    possible = rows[table.reshape(-1) > 0][:40]
    padded = np.concatenate([possible, np.full((len(possible), 2), -1)], axis=1)
    lengths = jnp.full(len(possible), length)
    found = np.asarray(word_conditionals(grammar, padded, lengths))
    for row, conditionals in zip(possible, found):
        for place in range(length):
            column = table[tuple(slice(None) if i == place else w for i, w in enumerate(row))]
            np.testing.assert_allclose(conditionals[place], column / column.sum(), rtol=1e-3, atol=1e-6)
    assert not found[:, length:].any()
    hidden = np.zeros(padded.shape, bool)
    hidden[:, :2] = True
    both = np.asarray(word_conditionals(grammar, padded, lengths, jnp.asarray(hidden)))
    for row, conditionals in zip(possible, both):
        column = table[(slice(None), slice(None), *row[2:])].sum(1)
        np.testing.assert_allclose(conditionals[0], column / column.sum(), rtol=1e-3, atol=1e-6)
    mean = -np.where(found > 0, found * np.log(np.maximum(found, 1e-30)), 0).sum() / (len(possible) * length)
    assert conditional_entropy(jnp.asarray(found), lengths) == pytest.approx(mean, rel=1e-5)


def test_samples_have_the_grammars_frequencies():
    words, lengths = sample_sentences(GRAMMAR, 40_000, seed=0, max_length=3)
    assert words.shape == (40_000, 3)
    np.testing.assert_array_equal((words >= 0).sum(1), lengths)
    expected = {}
    for length in (1, 2, 3):
        rows = all_sentences(GRAMMAR, length)
        expected |= {tuple(map(int, row)): p for row, p in zip(rows, exact(GRAMMAR, rows))}
    total = sum(expected.values())
    for row, probability in expected.items():
        padded = list(row) + [-1] * (3 - len(row))
        share, wanted = (words == padded).all(1).mean(), probability / total
        assert abs(share - wanted) < 5 * (wanted / 40_000) ** 0.5 + 1e-9, row
    again, _ = sample_sentences(GRAMMAR, 40_000, seed=0, max_length=3)
    np.testing.assert_array_equal(again, words)


def test_layers_bound_the_length():
    grammar = layered_grammar(1, levels=4, symbols=10, words=200, roots=9, rules=20, leaf_words=80)
    words, lengths = sample_sentences(grammar, 200, seed=1, max_length=16, min_length=12)
    assert words.max() < 200
    assert lengths.min() >= 12
    _, lengths = sample_sentences(grammar, 2000, seed=1, max_length=100)
    assert lengths.max() == 16


def test_tiny_probabilities_do_not_vanish():
    chain = parse_grammar("S -> S S [0.4] | 'a' [1e-6] | 'b' [0.599999]")
    found = sentence_log_prob(chain, jnp.zeros((1, 10), jnp.int32), jnp.array([10]))
    # Catalan(9) binary trees, each with 9 rules and 10 words: 1e-61 in all.
    assert float(found[0]) == pytest.approx(np.log(4862) + 9 * np.log(0.4) + 10 * np.log(1e-6), rel=1e-5)


def test_labels_are_the_most_probable_symbols():
    words, lengths = sample_sentences(LAYERED, 50, seed=2, max_length=4, min_length=2)
    roots = np.asarray(root_labels(LAYERED, jnp.asarray(words), jnp.asarray(lengths)))
    labels, known = span_labels(LAYERED, jnp.asarray(words), 0, 2)
    for row, n, root, label, can in zip(words, lengths, roots, labels, known):
        sentence = tuple(row[:n])
        assert root == np.argmax([p * derivations(LAYERED, s, sentence) for s, p in enumerate(LAYERED.start)])
        spans = [derivations(LAYERED, s, sentence[:2]) for s in range(len(LAYERED.symbols))]
        assert bool(can) == (max(spans) > 0)
        if can:
            assert label == np.argmax(spans)


def test_rules_are_read_and_added_up():
    assert GRAMMAR.symbols == ("S", "X")
    assert GRAMMAR.words == ("a", "b", "c")
    np.testing.assert_allclose(GRAMMAR.lexical, [[0.2, 0.2, 0.0], [0.25, 0.0, 0.5]])
    assert GRAMMAR.start.tolist() == [1.0, 0.0]
    starts = parse_grammar("S -> A [0.3] | B [0.7]\nA -> 'a' [1]\nB -> A A [1]")
    assert starts.start.tolist() == [0.3, 0.7]
    assert starts.symbols == ("A", "B")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("S -> A B C [1]", "line 1: 'S -> A B C \\[1\\]', expected such as"),
        ("S 'a' [1]", "line 1"),
        ("S -> A A [1]", "line 1: 'A' has no rules"),
        ("S -> A A [1]\nA -> B [1]\nB -> 'b' [1]", "line 2: 'A -> B' is not in Chomsky normal form"),
        ("S -> 'a' [0.5] | 'b' [0.2.5]", "line 1: the probability '0.2.5' is no number"),
        ("", "no rules"),
    ],
)
def test_what_is_no_grammar_is_refused(text, said):
    with pytest.raises(DataError, match=said):
        parse_grammar(text)


def test_bad_numbers_are_refused():
    with pytest.raises(ConfigError, match="rules of 'S' add up to 0.9"):
        parse_grammar("S -> 'a' [0.9]")
    with pytest.raises(ConfigError, match="levels is 0"):
        layered_grammar(0, levels=0)
    with pytest.raises(ConfigError, match="3 symbols make 9 pairs"):
        layered_grammar(0, symbols=3, rules=10)
    with pytest.raises(ConfigError, match="lengths 3 to 2"):
        sample_sentences(GRAMMAR, 1, 0, min_length=3, max_length=2)
    with pytest.raises(DataError, match="have 9 to 9 words"):
        sample_sentences(LAYERED, 1, 0, min_length=9, max_length=9)


def test_against_nltk():
    nltk = pytest.importorskip("nltk", reason="optional: an independent chart parser")
    text = TEXT.replace("S -> 'b' [0.1] | 'b' [0.1]", "S -> 'b' [0.2]").replace("'a' [0.2]\nS ->", "'a' [0.2] |")
    parser = nltk.parse.pchart.InsideChartParser(nltk.PCFG.fromstring(text.strip()))
    for sentence in ("a", "a a c", "c a b a", "a a a a"):
        ids = jnp.asarray([[GRAMMAR.words.index(w) for w in sentence.split()]])
        total = sum(tree.prob() for tree in parser.parse(sentence.split()))
        found = np.exp(sentence_log_prob(GRAMMAR, ids, jnp.array([ids.shape[1]])))[0]
        assert found == pytest.approx(total, rel=1e-4)


def test_emissions_of_hidden_words_are_the_whole_lexicon():
    chart = inside(GRAMMAR, emissions(GRAMMAR, jnp.array([[0, -1]])))
    np.testing.assert_allclose(np.exp(chart.span(1, 1)[0]), GRAMMAR.lexical.sum(1), rtol=1e-5)
