"""The state machine: a host that drives it and the compiled loop, forced tokens, copies, going back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.decoding import DecoderStepper, Generator, MinP, RepetitionPenalty, TopK, TopP
from jaxlm.decoding import generator as machine
from jaxlm.decoding.generate import pad
from jaxlm.decoding.reference import reference_generate
from jaxlm.testing import tiny_decoder
from tests.decoding.steppers import hash_logits_of, make

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7], [1]]
CHAIN = [RepetitionPenalty(1.2), TopK(11, 16), TopP(0.95, 16), MinP(0.01)]
KEYS = jax.random.split(jax.random.key(5), 4)
FEW = ("hash", "llama", "gpt2-shared")


def begin(name="hash", prompts=PROMPTS, keys=KEYS, generator=None, **options):
    stepper, params = make(name)
    generator = generator or Generator(stepper)
    tokens, lengths = pad(prompts, 8, len(prompts))
    given = {"capacity": 24, "max_new": 10, "temperature": 0.9, "stop_ids": (0, 7), "processors": CHAIN, **options}
    return generator, params, generator.prefill(params, tokens, lengths, keys=keys, **given)


def visible(state):
    """What a state says, without what lies beyond the rows' ends."""
    lengths = np.asarray(state.lengths)
    real = np.arange(state.tokens.shape[1])[None, :] < lengths[:, None]
    out = {name: np.asarray(getattr(state, name)) for name in ("lengths", "stopped", "logits", "done")}
    out |= {name: np.where(real, np.asarray(getattr(state, name)), 0) for name in ("tokens", "logprobs")}
    return out | {f"processor {i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state.processors))}


def same(a, b, rows=slice(None), atol=2e-5):
    a, b = visible(a), visible(b)
    for name in a:
        np.testing.assert_allclose(a[name][rows], b[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("name", FEW)
def test_a_host_that_advances_one_by_one_equals_the_compiled_loop(name):
    generator, params, state = begin(name)
    whole = generator.advance(params, state, 10)
    _, _, state = begin(name)
    steps = 0
    while not bool(state.done.all()):
        state = generator.advance(params, state, 1)
        steps += 1
    assert steps == int(whole.num_new.max())
    same(state, whole)


def test_a_row_ends_at_a_stop_id_or_its_limit_and_prompts_do_not_end_it():
    limits = np.array([1, 4, 10, 10])
    generator, params, state = begin(prompts=[[7, 1], [0], [7], [1, 7]], max_new=limits, processors=[])
    state = generator.advance(params, state, 20)
    tokens, begins, ends = (np.asarray(x) for x in (state.tokens, state.prompt_lengths, state.lengths))
    stopped = np.asarray(state.stopped)
    for row in range(4):
        new = tokens[row, begins[row] : ends[row]].tolist()
        assert 1 <= len(new) <= limits[row]
        assert not {0, 7} & set(new[:-1])
        assert stopped[row] == (new[-1] in (0, 7))
        assert stopped[row] or len(new) == limits[row]
        assert not tokens[row, ends[row] :].any()  # nothing is written beyond
    assert stopped.any()
    assert not stopped.all()


@pytest.mark.parametrize("name", FEW)
def test_each_row_equals_the_same_row_alone(name):
    generator, params, state = begin(name)
    together = generator.advance(params, state, 10)
    for row in (0, 3) if name == "hash" else (1,):
        _, _, alone = begin(name, PROMPTS[row : row + 1], KEYS[row : row + 1])
        same(together, generator.advance(params, alone, 10), slice(row, row + 1))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_loop_equals_the_reference(temperature):
    _, params, state = begin(temperature=temperature)
    generator = Generator(make("hash")[0])
    state = generator.advance(params, state, 10)
    for row, prompt in enumerate(PROMPTS):
        expected = reference_generate(
            hash_logits_of(7, 16),
            prompt,
            max_new_tokens=10,
            key=KEYS[row],
            stop_ids=(0, 7),
            temperature=temperature,
            top_k=11,
            top_p=0.95,
            min_p=0.01,
            repetition_penalty=1.2,
        )
        new = slice(len(prompt), int(state.lengths[row]))
        assert np.asarray(state.tokens)[row, new].tolist() == expected.tokens
        np.testing.assert_allclose(np.asarray(state.logprobs)[row, new], expected.logprobs, atol=1e-5)
        assert bool(state.stopped[row]) == expected.stopped


def test_log_probs_are_those_that_the_next_step_records():
    generator = Generator(make("hash")[0], processed_logprobs=True)
    _, params, state = begin(generator=generator)
    for _ in range(3):
        before = np.asarray(state.lengths)
        model, processed = np.array(generator.log_probs(state)), np.array(generator.log_probs(state, processed=True))
        np.testing.assert_allclose(np.exp(model).sum(axis=1), 1.0, atol=1e-5)
        assert (model > -np.inf).all()
        assert (processed == -np.inf).any(axis=1).all()
        state = generator.advance(params, state, 1)
        for row in np.flatnonzero(np.asarray(state.lengths) > before):
            token = int(state.tokens[row, before[row]])
            assert float(state.logprobs[row, before[row]]) == pytest.approx(model[row, token], abs=1e-5)
            assert float(state.processed_logprobs[row, before[row]]) == pytest.approx(processed[row, token], abs=1e-5)


@pytest.mark.parametrize("name", ["hash", "llama"])
def test_forced_tokens_are_those_of_a_longer_prompt(name):
    """Their log-probabilities too: summed, they score a text as a forward pass does."""
    generator, params, state = begin(name, stop_ids=())
    queue = np.array([[2, 8, 8], [4, 0, 0], [0, 0, 0], [5, 6, 0]])
    counts = np.array([3, 1, 0, 2])
    state = generator.force(state, queue, counts)
    forced = generator.advance(params, state, 3)
    tokens, begins = np.asarray(forced.tokens), np.asarray(forced.prompt_lengths)
    assert np.asarray(forced.num_new).tolist() == [3, 3, 3, 3]
    for row, count in enumerate(counts):
        assert tokens[row, begins[row] : begins[row] + count].tolist() == queue[row, :count].tolist()

    longer = [prompt + queue[i, : counts[i]].tolist() for i, prompt in enumerate(PROMPTS)]
    stepper = generator.stepper
    padded, lengths = pad(longer, 10, 4)
    logits, _ = jax.jit(stepper.step)(params, stepper.init(params, 4, 24), padded, lengths)
    scores = np.asarray(jax.nn.log_softmax(logits / 0.9))
    for row, count in enumerate(counts):
        places = begins[row] + np.arange(count)
        expected = scores[row, places - 1, tokens[row, places]]
        np.testing.assert_allclose(np.asarray(forced.logprobs)[row, places], expected, atol=2e-5)
    assert not bool((forced.queue_from < forced.queue_to).any())


def test_forced_tokens_outside_of_the_vocabulary_are_refused():
    generator, _, state = begin()
    with pytest.raises(ConfigError, match="forced tokens from 3 to 16; the vocabulary has 16"):
        generator.force(state, np.array([[3], [16], [4], [4]]), np.ones(4))


def test_a_forced_stop_id_ends_its_row():
    generator, params, state = begin()
    state = generator.force(state, np.full((4, 2), 7), np.array([2, 0, 0, 0]))
    state = generator.advance(params, state, 2)
    assert bool(state.stopped[0])
    assert int(state.num_new[0]) == 1


@pytest.mark.parametrize("name", FEW)
def test_gathered_rows_go_on_as_the_originals(name):
    generator, params, state = begin(name)
    state = generator.advance(params, state, 3)
    rows = [2, 0, 0, 3]
    copies = generator.gather(state, rows)
    same(generator.advance(params, state, 7), generator.advance(params, copies, 7), rows)


@pytest.mark.parametrize("name", ["hash", "gemma3"])
def test_rollback_then_again_equals_never_having_gone_ahead(name):
    generator, params, state = begin(name)
    early = generator.advance(params, state, 3)
    kept = generator.gather(early, np.arange(4))
    ahead = generator.advance(params, early, 5)
    back = generator.rollback(params, ahead, np.asarray(kept.lengths))
    same(back, kept)
    same(generator.advance(params, back, 10), generator.advance(params, kept, 10))


def test_rollback_reopens_rows_empties_queues_and_spares_prompts():
    generator, params, state = begin(max_new=3, stop_ids=())
    state = generator.advance(params, state, 3)
    assert bool(state.done.all())
    state = generator.force(state, np.full((4, 1), 2), np.ones(4))
    back = generator.rollback(params, state, np.array([6, 0, 10, 4]))
    assert np.asarray(back.num_new).tolist() == [1, 0, 3, 3]
    assert np.asarray(back.done).tolist() == [False, False, True, True]
    same(generator.advance(params, back, 3), generator.advance(params, begin(max_new=3, stop_ids=())[2], 3))


def test_repeated_rows_are_samples_of_their_own():
    generator, params, state = begin(stop_ids=(), processors=[])
    many = generator.advance(params, generator.repeat(state, 3), 8)
    new = [tuple(np.asarray(many.tokens)[row, int(many.prompt_lengths[row]) :].tolist()) for row in range(12)]
    assert len(set(new)) == 12
    _, _, state = begin(stop_ids=(), processors=[])
    later = generator.advance(params, generator.repeat(state, 2, first=1), 8)
    same(many, later, [1, 2, 4, 5, 7, 8, 10, 11])
    _, _, state = begin(prompts=PROMPTS[1:2], keys=jax.random.fold_in(KEYS[1], 2)[None], stop_ids=(), processors=[])
    same(many, generator.advance(params, state, 8), slice(5, 6))


def test_inserted_rows_go_on_as_where_they_came_from():
    generator, params, state = begin()
    _, _, other = begin(prompts=[[8, 8, 1], [2]], keys=KEYS[:2])
    there = generator.advance(params, generator.gather(other, np.arange(2)), 10)
    state = generator.advance(params, state, 2)
    state = generator.advance(params, generator.insert(state, [3, 4], other), 10)
    _, _, alone = begin()
    rest = generator.advance(params, alone, 10)
    same(state, generator.gather(there, [0]), slice(3, 4))
    same(state, generator.gather(rest, [0, 1, 2]), slice(0, 3))


def test_a_stopped_row_stays_as_it_is():
    generator, params, state = begin()
    state = generator.stop(state, np.array([True, False, False, True]))
    state = generator.advance(params, state, 10)
    assert np.asarray(state.num_new)[[0, 3]].tolist() == [0, 0]
    assert (np.asarray(state.num_new)[[1, 2]] > 0).all()


def test_a_done_row_keeps_what_would_come_next():
    generator, params, state = begin("llama", max_new=np.array([2, 10, 10, 10]), stop_ids=(), processors=[])
    state = generator.advance(params, state, 2)
    expected = np.array(generator.log_probs(state))[0]
    state = generator.advance(params, state, 5)
    np.testing.assert_array_equal(np.array(generator.log_probs(state))[0], expected)


def test_one_compilation_for_other_parameters_prompts_settings_and_steps():
    stepper, _ = make("hash")
    generator = Generator(stepper)
    machine._prefill.clear_cache()
    machine._advance.clear_cache()
    for salt, steps, temperature in ((1, 2, 0.0), (2, 9, 1.5)):
        prompts = [[salt, *p[:-1]] for p in PROMPTS]
        tokens, lengths = pad(prompts, 8, 4)
        chain = [RepetitionPenalty(1 + salt / 10), TopK(salt, 4)]
        state = generator.prefill(
            jnp.uint32(salt),
            tokens,
            lengths,
            capacity=24,
            max_new=steps,
            keys=KEYS,
            temperature=temperature,
            stop_ids=(salt,),
            processors=chain,
        )
        generator.advance(jnp.uint32(salt), state, steps)
    assert machine._prefill._cache_size() == 1
    assert machine._advance._cache_size() == 1


def test_callers_keep_what_they_passed():
    """Advancing takes over the state's memory, never that of arrays it was made from."""
    keys, temperature, penalty = jnp.copy(KEYS), jnp.full((4,), 0.9), jnp.full((4,), 1.2)
    generator, params, state = begin(keys=keys, temperature=temperature, processors=[RepetitionPenalty(penalty)])
    state = generator.insert(state, [0], generator.gather(state, [1]))
    generator.advance(params, state, 2)
    assert not any(x.is_deleted() for x in (keys, temperature, penalty))


def test_prompts_that_do_not_fit_are_refused_by_row():
    with pytest.raises(ConfigError, match=r"prompts of 8 tokens .* capacity of 6"):
        begin(capacity=6)
    with pytest.raises(ConfigError, match="prompt 2 has 7 tokens and there is room for 7"):
        begin(generator=Generator(dataclasses.replace(make("hash")[0], max_length=7)))
    with pytest.raises(ConfigError, match="temperature is -1.0, expected >= 0"):
        begin(temperature=-1.0)


def test_a_row_that_fills_the_cache_or_the_context_ends():
    generator, params, state = begin(capacity=9, stop_ids=())
    state = generator.advance(params, state, 10)
    assert np.asarray(state.lengths).tolist() == [9, 9, 9, 9]
    model, params = tiny_decoder("gpt2", num_layers=2, max_length=10)
    generator = Generator(DecoderStepper(model))
    tokens, lengths = pad(PROMPTS, 8, 4)
    state = generator.prefill(params, tokens, lengths, capacity=24, max_new=10, keys=KEYS)
    assert np.asarray(generator.advance(params, state, 10).lengths).tolist() == [10, 10, 10, 10]
