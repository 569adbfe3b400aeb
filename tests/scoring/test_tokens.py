import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.sharding import MeshConfig, make_mesh, use_mesh
from jaxlm.scoring import score_rolling, score_tokens, tokens
from jaxlm.testing import tiny_decoder


@pytest.fixture(scope="module")
def llama():
    return tiny_decoder("llama")


def sequences(count=9, longest=100, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 64, n).tolist() for n in rng.integers(2, longest, count)]


def naive(model, params, ids, count, max_length=128):
    """Of the whole sequence, alone and without padding."""
    kept = np.array(ids[-(max_length + 1) :])
    logits = np.asarray(model.apply({"params": params}, jnp.asarray(kept[None, :-1])))[0, -count:]
    logp = np.asarray(jax.nn.log_softmax(logits))
    target = kept[-count:]
    return logp[np.arange(count), target], logits.argmax(-1) == target


def check(model, params, items, counts, results, **options):
    assert len(results) == len(items)
    for ids, count, result in zip(items, counts, results):
        values, greedy = naive(model, params, ids, count, **options)
        np.testing.assert_allclose(result.log_likelihoods, values, atol=2e-5)
        np.testing.assert_array_equal(result.greedy, greedy)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_equals_full_forward_of_each_sequence_alone(family):
    model, params = tiny_decoder(family)
    items = sequences(count=5)
    counts = [len(ids) - 1 for ids in items]
    check(model, params, items, counts, score_tokens(model, params, items, batch_size=2))


def test_counts_are_of_the_last_tokens(llama):
    items = sequences()
    counts = [min(i + 1, len(ids) - 1) for i, ids in enumerate(items)]
    check(*llama, items, counts, score_tokens(*llama, items, counts=counts, batch_size=4))


def test_long_rows_go_fewer_at_a_time(llama, monkeypatch):
    items = [list(range(i, 60)) * 2 for i in range(4)]
    whole, shapes = score_tokens(*llama, items), []
    scored = tokens._score
    monkeypatch.setattr(tokens, "_MOST_TOKENS", 256)
    monkeypatch.setattr(tokens, "_score", lambda *args: shapes.append(args[2].shape) or scored(*args))
    for a, b in zip(score_tokens(*llama, items), whole):
        np.testing.assert_allclose(a.log_likelihoods, b.log_likelihoods, atol=2e-5)
    assert shapes == [(2, 128)] * 2


def test_truncates_on_the_left(llama):
    items = [list(range(60)), list(range(20))]
    results = score_tokens(*llama, items, counts=[3, 3], max_length=9)
    check(*llama, items, [3, 3], results, max_length=9)


def test_greedy_tokens_are_greedy(llama):
    model, params = llama
    ids = [5, 9]
    for _ in range(4):
        ids.append(int(model.apply({"params": params}, jnp.asarray([ids]))[0, -1].argmax()))
    worse = [*ids[:-1], (ids[-1] + 1) % 64]
    right, wrong = score_tokens(*llama, [ids, worse], counts=[4, 4])
    assert right.all_greedy
    assert wrong.greedy.tolist() == [True, True, True, False]


def test_order_and_batch_size_change_nothing(llama):
    items = sequences(count=12)
    one = score_tokens(*llama, items, batch_size=3)
    other = score_tokens(*llama, items[::-1], batch_size=5)[::-1]
    for a, b in zip(one, other):
        np.testing.assert_allclose(a.log_likelihoods, b.log_likelihoods, atol=1e-5)


def test_choices_of_one_token_share_a_row(llama):
    context = [3, 1, 4, 1, 5]
    items = [[*context, choice] for choice in range(40)]
    assert len(tokens._rows(items, [1] * 40, 128)) == 3
    results = score_tokens(*llama, items, counts=[1] * 40)
    check(*llama, items, [1] * 40, results)
    everything = [[*context, choice] for choice in range(64)]
    total = sum(np.exp(r.total) for r in score_tokens(*llama, everything, counts=[1] * 64))
    assert total == pytest.approx(1, abs=1e-4)


def test_short_items_compile_few_programs(llama):
    rng = np.random.default_rng(1)
    items = [rng.integers(0, 64, n).tolist() for n in rng.integers(8, 129, 200)]
    counts = [min(len(ids) - 1, int(c)) for ids, c in zip(items, rng.integers(1, 40, 200))]
    before = tokens._score._cache_size()
    score_tokens(*llama, items, counts=counts, batch_size=6)
    compiled = tokens._score._cache_size() - before
    assert 1 <= compiled <= 6
    other = jax.tree.map(lambda x: x * 1.1, llama[1])
    score_tokens(llama[0], other, items[::-1], counts=counts[::-1], batch_size=6)
    assert tokens._score._cache_size() - before == compiled


def test_vocabulary_is_projected_in_chunks(llama, monkeypatch):
    items = sequences()
    whole = score_tokens(*llama, items, batch_size=7)
    monkeypatch.setattr("jaxlm.objectives.causal_lm._CHUNK_BYTES", 4 * 64 * 7 * 5)
    largest = []
    head = type(llama[0]).head

    def watched(self, params, hidden):
        largest.append(hidden.shape[1])
        return head(self, params, hidden)

    monkeypatch.setattr(type(llama[0]), "head", watched)
    tokens._score.clear_cache()
    chunked = score_tokens(*llama, items, batch_size=7)
    tokens._score.clear_cache()
    assert max(largest) <= 5
    for a, b in zip(whole, chunked):
        np.testing.assert_allclose(a.log_likelihoods, b.log_likelihoods, atol=1e-5)


def test_on_a_mesh(llama):
    items = sequences()
    expected = score_tokens(*llama, items, batch_size=3)
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        results = score_tokens(*llama, items, batch_size=3)
    for a, b in zip(expected, results):
        np.testing.assert_allclose(a.log_likelihoods, b.log_likelihoods, atol=2e-5)


def test_progress_ends_at_all(llama):
    calls = []
    score_tokens(*llama, sequences(), batch_size=4, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (9, 9)
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)


def test_rolling_of_a_short_text_is_one_pass(llama):
    text = sequences(count=1)[0]
    (rolled,) = score_rolling(*llama, [text], prefix=0)
    (plain,) = score_tokens(*llama, [[0, *text]])
    np.testing.assert_allclose(rolled.log_likelihoods, plain.log_likelihoods, atol=1e-6)


def test_rolling_predicts_every_token_once_from_its_window(llama):
    text = np.random.default_rng(2).integers(0, 64, 27).tolist()
    (rolled, nothing) = score_rolling(*llama, [text, []], prefix=7, max_length=8)
    # Windows begin at 0, 8, 16; the last one reaches back so that its inputs are full.
    pieces = [([7, *text[:8]], 8), (text[7:16], 8), (text[15:24], 8), (text[18:27], 3)]
    expected = np.concatenate([naive(*llama, ids, count)[0] for ids, count in pieces])
    np.testing.assert_allclose(rolled.log_likelihoods, expected, atol=2e-5)
    assert len(nothing.log_likelihoods) == 0
    assert nothing.total == 0


@pytest.mark.parametrize(
    ("items", "options", "error", "message"),
    [
        ([[1, 2], [3]], {}, DataError, "sequence 1 has 1 tokens and 0 to be scored"),
        ([[1, 2]], {"counts": [2]}, DataError, "sequence 0 has 2 tokens and 2 to be scored"),
        ([[1, 64]], {}, DataError, "sequence 0 holds token 64; the vocabulary has ids 0 to 63"),
        ([[1] * 12], {"max_length": 10}, DataError, "11 tokens to be scored, more than the context of 10"),
        ([[1, 2]], {"counts": [1, 1]}, ConfigError, "2 counts for 1 sequences"),
        ([[1, 2]], {"batch_size": 0}, ConfigError, "batch_size is 0"),
    ],
)
def test_bad_input_is_named(llama, items, options, error, message):
    with pytest.raises(error, match=message):
        score_tokens(*llama, items, **options)


def test_learned_positions_bound_the_length():
    model, params = tiny_decoder("gpt2")
    with pytest.raises(ConfigError, match="max_length is 129; the model has 128 learned positions"):
        score_tokens(model, params, [[1, 2]], max_length=129)
