"""Probabilistic context-free grammars: sentences, and the exact probabilities of their words and phrases.

    grammar = layered_grammar(seed=0)
    words, lengths = sample_sentences(grammar, 10_000, seed=1, max_length=8)
    exact = word_conditionals(grammar, words, lengths)       # [batch, length, words]: p(word here | all other words)
    loss = conditional_entropy(exact, lengths)               # the least loss that a masked language model can have

A grammar is in Chomsky normal form: a symbol becomes two symbols or one word. Arrays hold the rules, so the inside
algorithm (Baker, 1979; the probabilistic form of CYK) is a few products over all phrases of one width at a time, in
JAX, and conditionals of words are its derivative.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core.errors import ConfigError, DataError

_IMPOSSIBLE = -1e30


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """Probabilities: of `start` symbols, of `binary` rules (parent, left, right), of `lexical` rules (parent, word).

    Each symbol's rules add up to 1. Raises `ConfigError` otherwise.
    """

    start: Float[np.ndarray, "symbols"]
    binary: Float[np.ndarray, "symbols symbols symbols"]
    lexical: Float[np.ndarray, "symbols words"]
    symbols: tuple[str, ...]
    words: tuple[str, ...]

    def __post_init__(self):
        n, w = len(self.symbols), len(self.words)
        if (self.start.shape, self.binary.shape, self.lexical.shape) != ((n,), (n, n, n), (n, w)):
            shapes = (self.start.shape, self.binary.shape, self.lexical.shape)
            raise ConfigError(f"rules of shapes {shapes} for {n} symbols and {w} words")
        if min(x.min() for x in (self.start, self.binary, self.lexical)) < 0 or abs(self.start.sum() - 1) > 1e-6:
            raise ConfigError(f"start probabilities add up to {self.start.sum():g}, expected 1, none below 0")
        for name, total in zip(self.symbols, self.binary.sum((1, 2)) + self.lexical.sum(1)):
            if abs(total - 1) > 1e-6:
                raise ConfigError(f"rules of '{name}' add up to {total:g}, expected 1")


def parse_grammar(text: str) -> Grammar:
    """A grammar from lines such as `A -> B C [0.3] | 'word' [0.7]` (NLTK's notation); repeated rules add up.

    The first line's symbol is the root. Rules from it to one symbol, `S -> A [0.5]`, are start probabilities, and then
    all of its rules must be; elsewhere they are refused. Raises `DataError`, with the line, for what is no rule.
    """
    rules: list[tuple[str, tuple[str, ...], float, int]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        head, arrow, rest = line.partition("->")
        for option in rest.split("|"):
            found = re.fullmatch(r"\s*(?:'([^']+)'|([^\s'\[]+)(?:\s+([^\s'\[]+))?)\s*\[([0-9.eE+-]+)\]\s*", option)
            if not arrow or not head.strip() or not found:
                raise DataError(f"grammar line {number}: '{line.strip()}', expected such as A -> B C [0.3] | 'w' [0.7]")
            word, left, right, probability = found.groups()
            body = (f"'{word}'",) if word else (left, right) if right else (left,)
            try:
                rules.append((head.strip(), body, float(probability), number))
            except ValueError:
                raise DataError(f"grammar line {number}: the probability '{probability}' is no number") from None
    if not rules:
        raise DataError("the grammar has no rules")
    root = rules[0][0]
    has_starts = any(head == root and len(body) == 1 and body[0][0] != "'" for head, body, _, _ in rules)
    symbols = list(dict.fromkeys(head for head, *_ in rules if not (has_starts and head == root)))
    words = list(dict.fromkeys(body[0][1:-1] for _, body, _, _ in rules if body[0][0] == "'"))
    start, binary = np.zeros(len(symbols)), np.zeros((len(symbols),) * 3)
    lexical = np.zeros((len(symbols), len(words)))
    if not has_starts:
        start[symbols.index(root)] = 1.0
    for head, body, probability, number in rules:
        missing = [part for part in body if part[0] != "'" and part not in symbols]
        if missing:
            raise DataError(f"grammar line {number}: '{missing[0]}' has no rules of its own")
        is_start = has_starts and head == root
        if (len(body) == 1 and body[0][0] != "'") != is_start:
            raise DataError(f"grammar line {number}: '{head} -> {' '.join(body)}' is not in Chomsky normal form")
        if is_start:
            start[symbols.index(body[0])] += probability
        elif len(body) == 2:
            binary[symbols.index(head), symbols.index(body[0]), symbols.index(body[1])] += probability
        else:
            lexical[symbols.index(head), words.index(body[0][1:-1])] += probability
    return Grammar(start, binary, lexical, tuple(symbols), tuple(words))


def layered_grammar(
    seed: int,
    *,
    levels: int = 3,
    symbols: int = 5,
    words: int = 40,
    roots: int = 5,
    rules: int = 6,
    leaf_words: int = 16,
    word_rules: float = 0.1,
) -> Grammar:
    """A random grammar in levels, as that of Liu et al. (2023, arXiv 2210.14199).

    A root becomes a pair of symbols of the first level, a symbol one of `rules` pairs of the next level or (with
    probability `word_rules`) its one word, and a symbol of the last level one of `leaf_words` words. Sentences have
    `2^levels` words at most.

    Theirs: 4 levels of 10 symbols, 200 words, 9 roots, about 20 rules, 77 to 86 leaf words.
    """
    sizes = {"levels": levels, "symbols": symbols, "words": words, "roots": roots, "rules": rules}
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")
    if not 1 <= leaf_words <= words or not 0 <= word_rules < 1:
        raise ConfigError(f"leaf_words is {leaf_words} of {words}, word_rules {word_rules} (from 0 to below 1)")
    if max(rules, roots) > symbols**2:
        raise ConfigError(f"{rules} rules and {roots} roots: {symbols} symbols make {symbols**2} pairs")
    rng = np.random.default_rng(seed)
    names = [f"S{i + 1}" for i in range(roots)]
    names += [f"A{level + 1}_{i + 1}" for level in range(levels) for i in range(symbols)]
    start, binary = np.zeros(len(names)), np.zeros((len(names),) * 3)
    lexical = np.zeros((len(names), words))
    start[:roots] = rng.dirichlet(np.full(roots, 5.0))

    def pairs(level: int, count: int) -> list[tuple[int, int]]:
        first = roots + level * symbols
        drawn = [divmod(int(c), symbols) for c in rng.choice(symbols**2, count, replace=False)]
        return [(first + left, first + right) for left, right in drawn]

    for root, pair in enumerate(pairs(0, roots)):
        binary[(root, *pair)] = 1.0
    for level in range(levels):
        for parent in range(roots + level * symbols, roots + (level + 1) * symbols):
            if level == levels - 1:
                chosen = rng.choice(words, leaf_words, replace=False)
                lexical[parent, chosen] = rng.dirichlet(np.ones(leaf_words))
                continue
            for pair, probability in zip(pairs(level + 1, rules), rng.dirichlet(np.ones(rules))):
                binary[(parent, *pair)] = (1 - word_rules) * probability
            lexical[parent, rng.integers(words)] = word_rules
    return Grammar(start, binary, lexical, tuple(names), tuple(f"w{i}" for i in range(words)))


def sample_sentences(
    grammar: Grammar, count: int, seed: int, *, max_length: int, min_length: int = 1
) -> tuple[Int[np.ndarray, "count max_length"], Int[np.ndarray, "count"]]:
    """Sentences from the grammar, of the lengths wanted (others are drawn again), and their lengths.

    Rows are padded with -1. Raises `DataError` if almost no sentence has such a length.
    """
    if not 1 <= min_length <= max_length or count < 1:
        raise ConfigError(f"count {count}, lengths {min_length} to {max_length}: expected at least 1, in order")
    rng, n = np.random.default_rng(seed), len(grammar.symbols)
    rows, lengths, tried = [], [], 0
    choices = np.cumsum(np.concatenate([grammar.binary.reshape(n, -1), grammar.lexical], axis=1), axis=1)
    choices[:, -1] = 1.0 + 1e-9
    while sum(map(len, lengths)) < count:
        batch = max(count - sum(map(len, lengths)), 1000)
        tried += batch
        if tried > 1000 * count + 100_000:
            raise DataError(f"of {tried} sentences, {sum(map(len, lengths))} have {min_length} to {max_length} words")
        found, sizes = _derive(grammar, choices, rng, batch, max_length)
        kept = (sizes >= min_length) & (sizes <= max_length)
        rows.append(found[kept])
        lengths.append(sizes[kept])
    return np.concatenate(rows)[:count], np.concatenate(lengths)[:count]


def _derive(grammar: Grammar, choices: np.ndarray, rng: np.random.Generator, batch: int, max_length: int):
    """Expands all sentences at once: items are symbols, or words as negative numbers, in order of their sentences."""
    n = len(grammar.symbols)
    items, owner = rng.choice(n, batch, p=grammar.start), np.arange(batch)
    while (items >= 0).any():
        open_ = items >= 0
        drawn = np.zeros(len(items), np.int64)
        uniform = rng.random(len(items))
        for symbol in np.unique(items[open_]):
            here = items == symbol
            drawn[here] = np.searchsorted(choices[symbol], uniform[here], side="right")
        splits = open_ & (drawn < n * n)
        becomes_word = open_ & ~splits
        items = np.where(becomes_word, -1 - (drawn - n * n), items)
        counts = np.where(splits, 2, 1)
        place = np.cumsum(counts) - counts
        out, out_owner = np.repeat(items, counts), np.repeat(owner, counts)
        out[place[splits]], out[place[splits] + 1] = np.divmod(drawn[splits], n)
        # A sentence that is too long already is given up: symbols never vanish.
        fits = np.bincount(out_owner, minlength=batch)[out_owner] <= max_length
        items, owner = out[fits], out_owner[fits]
    sizes = np.bincount(owner, minlength=batch)
    rows = np.full((batch, max_length), -1, np.int32)
    rows[owner, np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner]] = -1 - items
    return rows, np.where(sizes == 0, max_length + 1, sizes).astype(np.int32)


class Chart(NamedTuple):
    """Inside probabilities by width: `scaled[w - 1]` `[batch, starts, symbols]` times `exp(log_scale[w - 1])`."""

    scaled: Sequence[Float[Array, "batch starts symbols"]]
    log_scale: Sequence[Float[Array, "batch starts"]]

    def span(self, start: int, width: int) -> Float[Array, "batch symbols"]:
        """Log-probability that a symbol becomes the `width` words from `start`; about -1e30 where it cannot."""
        scaled, log_scale = self.scaled[width - 1][:, start], self.log_scale[width - 1][:, start]
        return jnp.where(scaled > 0, jnp.log(jnp.maximum(scaled, 1e-37)) + log_scale[:, None], _IMPOSSIBLE)


def inside(grammar: Grammar, emissions: Float[Array, "batch length symbols"]) -> Chart:
    """The chart of rows for which `emissions` says how probable each symbol makes the word at each place.

    Phrases of one width are computed together, each rescaled, so that long sentences do not vanish. Traceable and
    differentiable; work grows with the cube of the length and of the symbols.
    """
    binary = jnp.asarray(grammar.binary, jnp.float32)
    rules = grammar.binary[grammar.binary > 0]
    typical = float(rules.mean()) if rules.size else 1.0
    length = emissions.shape[1]
    scaled, log_scale = [], []
    for width in range(1, length + 1):
        if width == 1:
            cell, top = emissions, jnp.zeros(emissions.shape[:2])
        else:
            starts = length - width + 1
            left = jnp.stack([scaled[k - 1][:, :starts] for k in range(1, width)])
            right = jnp.stack([scaled[width - k - 1][:, k : k + starts] for k in range(1, width)])
            sizes = jnp.stack(
                [log_scale[k - 1][:, :starts] + log_scale[width - k - 1][:, k : k + starts] for k in range(1, width)]
            )
            top = jnp.max(sizes, axis=0)
            pairs = jnp.einsum("kbs,kbsi,kbsj->bsij", jnp.exp(sizes - top[None]), left, right)
            cell = jnp.einsum("bsij,aij->bsa", pairs, binary)
        # Constants to the derivative: what is divided by is multiplied again through `log_scale`. Cells of zeros are
        # scaled too, by a typical rule: their derivatives count (of other words the phrase may well be possible).
        largest = jax.lax.stop_gradient(jnp.max(cell, axis=-1))
        divisor = jnp.where(largest > 0, largest, 1.0 if width == 1 else typical)
        scaled.append(cell / divisor[..., None])
        log_scale.append(top + jnp.log(divisor))
    return Chart(scaled, log_scale)


def emissions(
    grammar: Grammar, words: Int[Array, "batch length"], hidden: Bool[Array, "batch length"] | None = None
) -> Float[Array, "batch length symbols"]:
    """How probable each symbol makes each word; of `hidden` words, any word at all. Padding (-1) counts as hidden."""
    lexical = jnp.asarray(grammar.lexical.T, jnp.float32)
    unknown = words < 0 if hidden is None else hidden | (words < 0)
    return jnp.where(unknown[..., None], jnp.sum(lexical, axis=0)[None, None], lexical[jnp.maximum(words, 0)])


@functools.partial(jax.jit, static_argnums=0)
def sentence_log_prob(
    grammar: Grammar, words: Int[Array, "batch length"], lengths: Int[Array, "batch"]
) -> Float[Array, "batch"]:
    """Log-probability of each sentence (about -1e30 for one that is not of the grammar)."""
    return _log_prob(grammar, emissions(grammar, words), lengths)


@functools.partial(jax.jit, static_argnums=0)
def word_conditionals(
    grammar: Grammar,
    words: Int[Array, "batch length"],
    lengths: Int[Array, "batch"],
    hidden: Bool[Array, "batch length"] | None = None,
) -> Float[Array, "batch length words"]:
    """The probability of each word at each place given all other words of the sentence and its length, exactly.

    A sentence's probability is linear in the emissions of any one place, so its derivative by them, which does not
    depend on the word there, weighs the symbols of that place, and one backward pass serves all places. With `hidden`
    places only the words that are not hidden are given. Zeros beyond the length.
    """
    emitted = emissions(grammar, words, hidden)
    outside = jax.grad(lambda e: jnp.sum(_log_prob(grammar, e, lengths)))(emitted)
    weights = outside @ jnp.asarray(grammar.lexical, jnp.float32)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    inside_sentence = (jnp.arange(words.shape[1])[None, :] < lengths[:, None])[..., None]
    return jnp.where(inside_sentence & (total > 0), weights / jnp.where(total > 0, total, 1.0), 0.0)


def conditional_entropy(
    conditionals: Float[Array, "batch length words"], lengths: Int[Array, "batch"]
) -> Float[Array, ""]:
    """Mean entropy of exact conditionals, nats a word: the least masked-language-model loss, one mask at a time."""
    entropy = -jnp.sum(jax.scipy.special.xlogy(conditionals, conditionals), axis=-1)
    return jnp.sum(entropy) / jnp.sum(lengths)


@functools.partial(jax.jit, static_argnums=0)
def root_labels(
    grammar: Grammar, words: Int[Array, "batch length"], lengths: Int[Array, "batch"]
) -> Int[Array, "batch"]:
    """The most probable start symbol of each sentence."""
    chart = inside(grammar, emissions(grammar, words))
    spans = jnp.stack([chart.span(0, width) for width in range(1, words.shape[1] + 1)], axis=1)
    whole = jnp.take_along_axis(spans, (lengths - 1)[:, None, None], axis=1)[:, 0]
    start = jnp.asarray(grammar.start, jnp.float32)
    prior = jnp.where(start > 0, jnp.log(jnp.maximum(start, 1e-37)), 2 * _IMPOSSIBLE)
    return jnp.argmax(whole + prior[None], axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def span_labels(
    grammar: Grammar, words: Int[Array, "batch length"], start: int, width: int
) -> tuple[Int[Array, "batch"], Bool[Array, "batch"]]:
    """The symbol that most probably becomes the `width` words from `start`, and whether any can (ties: the first)."""
    scores = inside(grammar, emissions(grammar, words[:, : start + width])).span(start, width)
    return jnp.argmax(scores, axis=-1), jnp.max(scores, axis=-1) > _IMPOSSIBLE / 2


def _log_prob(
    grammar: Grammar, emitted: Float[Array, "batch length symbols"], lengths: Int[Array, "batch"]
) -> Float[Array, "batch"]:
    chart = inside(grammar, emitted)
    start = jnp.asarray(grammar.start, jnp.float32)
    whole = jnp.stack([x[:, 0] @ start for x in chart.scaled], axis=1)
    sizes = jnp.stack([x[:, 0] for x in chart.log_scale], axis=1)
    at = (lengths - 1)[:, None]
    whole, size = (jnp.take_along_axis(x, at, axis=1)[:, 0] for x in (whole, sizes))
    return jnp.where(whole > 0, jnp.log(jnp.where(whole > 0, whole, 1.0)) + size, _IMPOSSIBLE)
