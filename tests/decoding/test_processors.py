"""Processors against numpy versions, their neutral settings, per-row settings, and what a chain lets through."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.decoding import Appended, Bias, CountPenalty, Forbid, Generator, History, MinP, RepetitionPenalty, TopK, TopP
from jaxlm.decoding.processors import apply_chain, init_chain
from jaxlm.decoding.reference import truncate
from tests.decoding.steppers import HashStepper, hash_logits_of

VOCAB = 50
LOGITS = (3 * np.random.default_rng(0).standard_normal((4, VOCAB))).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (4, 9)).astype(np.int32)
HISTORY = History(jnp.asarray(TOKENS), jnp.array([9, 4, 1, 6]), jnp.array([5, 4, 1, 2]))


def run(processors, temperature=1.0, logits=LOGITS, history=HISTORY):
    chain = init_chain(processors, history, VOCAB)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (len(logits),))
    return np.asarray(apply_chain(chain, temperature, jnp.asarray(logits), history)[1])


@pytest.mark.parametrize("most", ["sorted", "sliced"])
@pytest.mark.parametrize(("k", "p", "min_p"), itertools.product((0, 1, 7), (1.0, 0.7, 0.05), (0.0, 0.2)))
def test_truncation_equals_going_through_the_tokens(k, p, min_p, most):
    chain = [TopK(k, 8), TopP(p, 8 if most == "sliced" and k else None), MinP(min_p)]
    found = run(chain, temperature=1.7)
    expected = np.stack([truncate(row / np.float32(1.7), k, p, min_p) for row in LOGITS])
    np.testing.assert_array_equal(found == -np.inf, expected == -np.inf)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "processor",
    [
        RepetitionPenalty(1.0),
        CountPenalty(0.0, 0.0),
        Bias(np.zeros(VOCAB, np.float32)),
        Forbid(np.zeros(VOCAB, bool)),
        TopK(0, 8),
        TopK(VOCAB, VOCAB),
        TopK(VOCAB + 3, 64),
        TopP(1.0),
        TopP(1.0, 8),
        MinP(0.0),
    ],
    ids=repr,
)
def test_neutral_settings_change_no_bit(processor):
    np.testing.assert_array_equal(run([processor]), LOGITS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neutral_temperatures_change_no_bit(temperature):
    np.testing.assert_array_equal(run([], temperature), LOGITS)


def test_top_p_always_keeps_the_first_and_ties_are_kept_together():
    assert (run([TopP(0.0)]) > -np.inf).sum(axis=1).tolist() == [1, 1, 1, 1]
    tied = np.zeros((4, VOCAB), np.float32)
    tied[:, :3] = 2.0
    for chain in ([TopK(2, 2)], [TopP(1e-3)], [TopK(2, 2), TopP(1e-3, 2)], [MinP(1.0)]):
        assert (run(chain, logits=tied) > -np.inf).sum(axis=1).tolist() == [3, 3, 3, 3]


def test_penalties_in_closed_form():
    lengths, prompts = [np.asarray(x) for x in HISTORY[1:]]
    found = run([RepetitionPenalty(1.5), CountPenalty(0.25, 0.5)])
    for row in range(4):
        expected = LOGITS[row].copy()
        for token in set(TOKENS[row, : lengths[row]].tolist()):
            expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
        output = TOKENS[row, prompts[row] : lengths[row]].tolist()
        for token in set(output):
            expected[token] -= 0.25 * output.count(token) + 0.5
        np.testing.assert_allclose(found[row], expected, rtol=1e-6)


@pytest.mark.parametrize("processor", [RepetitionPenalty(1.3), CountPenalty(0.3, 0.2)], ids=repr)
def test_updates_equal_starting_from_the_longer_history(processor):
    prompts = jnp.array([2, 3, 1, 2])
    state = processor.init(History(HISTORY.tokens, prompts, prompts), VOCAB)
    lengths = np.array([6, 3, 9, 2])
    for place in range(1, 9):
        active = (place >= np.asarray(prompts)) & (place < lengths)
        state = state.update(Appended(jnp.asarray(TOKENS[:, place]), jnp.zeros(4), jnp.asarray(active)))
    longer = processor.init(History(HISTORY.tokens, jnp.asarray(lengths), prompts), VOCAB)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(longer), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_bias_and_mask_for_all_rows_or_each():
    bias = np.random.default_rng(2).standard_normal((4, VOCAB)).astype(np.float32)
    np.testing.assert_array_equal(run([Bias(bias)]), LOGITS + bias)
    np.testing.assert_array_equal(run([Bias(bias[0])]), LOGITS + bias[:1])
    np.testing.assert_array_equal(run([Forbid(bias > 0)]), np.where(bias > 0, -np.inf, LOGITS))
    with pytest.raises(ConfigError, match=r"bias has shape \(3,\), expected \(50,\) or \(4, 50\)"):
        run([Bias(np.zeros(3))])


def test_every_row_has_its_own_numbers_and_none_compiles_again():
    @jax.jit
    def apply(processors, temperature):
        chain = init_chain(processors, HISTORY, VOCAB)
        return apply_chain(chain, temperature, jnp.asarray(LOGITS), HISTORY)[1]

    settings = [(1.0, 0, 1.0, 0.0, 1.0), (0.5, 3, 1.0, 0.0, 1.2), (2.0, 0, 0.6, 0.0, 1.0), (0.7, 5, 0.9, 0.3, 0.8)]
    for rows in (settings, settings[::-1]):
        temperature, k, p, min_p, penalty = (jnp.array(column, jnp.float32) for column in zip(*rows))
        found = apply((RepetitionPenalty(penalty), TopK(k, 8), TopP(p), MinP(min_p)), temperature)
        for row, (t, k1, p1, m1, r1) in enumerate(rows):
            alone = run([RepetitionPenalty(r1), TopK(k1, 8), TopP(p1), MinP(m1)], t)
            np.testing.assert_array_equal(np.asarray(found[row]), alone[row])
    assert apply._cache_size() == 1


def test_a_chain_out_of_order_is_refused():
    with pytest.raises(ConfigError, match="TopP comes before Forbid"):
        run([TopP(0.5), Forbid(np.zeros(VOCAB, bool))])


def test_draws_follow_the_processed_distribution():
    """Pearson's chi-square of 100,000 one-step samples, each row with its own key."""
    stepper, draws, prompt = HashStepper(), 100_000, [3, 5, 3]
    temperature, k, p, min_p, penalty = 1.6, 12, 0.95, 0.02, 1.3
    generator = Generator(stepper)
    state = generator.prefill(
        jnp.uint32(7),
        np.tile(np.array(prompt, np.int32), (draws, 1)),
        np.full((draws,), 3),
        capacity=4,
        max_new=1,
        keys=jax.random.split(jax.random.key(0), draws),
        temperature=temperature,
        processors=[RepetitionPenalty(penalty), TopK(k, 16), TopP(p), MinP(min_p)],
    )
    state = generator.advance(jnp.uint32(7), state, 1)
    logits = hash_logits_of(7, stepper.vocab_size)(prompt)[-1]
    for token in set(prompt):
        logits[token] *= 1 / penalty if logits[token] > 0 else penalty
    kept = truncate(logits / np.float32(temperature), k, p, min_p)
    expected = draws * np.exp(kept) / np.exp(kept).sum()
    counts = np.bincount(np.asarray(state.tokens)[:, 3], minlength=stepper.vocab_size)
    allowed = expected > 0
    assert 4 <= allowed.sum() < 12  # the truncations bite, and leave something to draw
    assert counts[~allowed].sum() == 0
    chi_square = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
    freedom = allowed.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)
