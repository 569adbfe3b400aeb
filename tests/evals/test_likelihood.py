import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import DataError
from jaxlm.data.packing import shift
from jaxlm.data.resident import ResidentRows, resident_examples
from jaxlm.decoding import DecoderStepper, GenerationConfig, generate
from jaxlm.evals import likelihood, make_sums, resident_loss, resident_matches
from jaxlm.objectives import CausalLM
from jaxlm.testing import tiny_decoder


def test_equals_the_definition():
    model, params = tiny_decoder("llama")
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 5, 64).astype(np.int32)
    batches = []
    for _ in range(3):
        ids = rng.integers(0, 64, (2, 9)).astype(np.int32)
        weights = (rng.random((2, 8)) > 0.3).astype(np.float32)
        batches.append({"inputs": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": weights})
    result = likelihood(jax.jit(make_sums(CausalLM(model), lengths)), params, batches)
    nll = tokens = count = 0
    for batch in batches:
        logits = model.apply({"params": params}, jnp.asarray(batch["inputs"]))
        logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), batch["targets"][..., None], -1)[..., 0]
        nll -= float((logp * batch["loss_weights"]).sum())
        tokens += int(batch["loss_weights"].sum())
        count += int((lengths[batch["targets"]] * (batch["loss_weights"] > 0)).sum())
    assert result.tokens == tokens
    assert result.bytes == count
    assert result.loss == pytest.approx(nll / tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(np.exp(nll / tokens), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nll / np.log(2) / count, rel=1e-5)
    assert result.loss_per_byte == pytest.approx(nll / count, rel=1e-5)


def test_rows_on_the_device_give_the_same():
    model, params = tiny_decoder("llama")
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 64, (7, 9)).astype(np.int32)
    weights = (rng.random((7, 8)) > 0.3).astype(np.float32)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": weights}
    expected = likelihood(jax.jit(make_sums(CausalLM(model), np.ones(64))), params, [batch]).loss
    rows = ResidentRows({name: jnp.asarray(x) for name, x in batch.items()})
    for batch_size in (3, 7):
        found = jax.jit(resident_loss(CausalLM(model), rows, batch_size))(params)
        assert float(found) == pytest.approx(expected, rel=1e-5)


def test_nothing_to_predict_is_an_error():
    model, params = tiny_decoder("llama")
    with pytest.raises(DataError, match="no tokens to evaluate"):
        likelihood(make_sums(CausalLM(model), np.ones(64)), params, [])


def test_exact_matches_are_those_of_greedy_decoding():
    model, params = tiny_decoder("llama")
    prompts = [[5, 9, 2], [7], [1, 30, 4, 8], [3, 3]]
    greedy = generate(DecoderStepper(model), params, prompts, GenerationConfig(max_new_tokens=4, temperature=0))
    examples = []
    for i, (prompt, answer) in enumerate(zip(prompts, greedy.tokens[:, 0])):
        answer = answer.copy()
        if i in (1, 2):  # one wrong token: the first, or the last
            answer[0 if i == 1 else 3] = (answer[0 if i == 1 else 3] + 1) % 64
        weights = np.array([0.0] * len(prompt) + [1.0] * 4)
        examples.append(shift(np.array([*prompt, *answer]), weights))
    examples.append(shift(np.arange(4), np.zeros(4)))  # nothing to answer
    rows = resident_examples(examples, 10)
    for batch_size in (2, 5, 8):
        found = jax.jit(resident_matches(model, rows, batch_size))(params)
        np.testing.assert_array_equal(found, [1, 0, 0, 1, np.nan])
