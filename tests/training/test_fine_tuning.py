"""What a fine-tuning step must not depend on: packing, the cut into micro-batches, the prompt's own tokens."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.data.chat import Plain
from jaxlm.data.chat_batches import ChatBatches, SampleBatches
from jaxlm.data.chat_examples import chat_examples
from jaxlm.data.synthetic.skills import as_record, draw_examples
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.objectives import CausalLM, StepContext
from jaxlm.testing import tiny_decoder
from jaxlm.training import accumulate, init_state, make_step

LENGTH = 96


@pytest.fixture(scope="module")
def subject():
    return tiny_decoder("llama", vocab_size=259)


@pytest.fixture(scope="module")
def examples():
    """Six examples, whose answers have from 2 to more than twice as many tokens."""
    drawn = [e for kind in ("format", "skills") for e in draw_examples(kind, 3, seed=5)]
    found, _ = chat_examples(map(as_record, drawn), ByteTokenizer(), Plain(), length=LENGTH)
    counts = [int(e["loss_weights"].sum()) for e in found]
    assert max(counts) > 2 * min(counts)
    return found


def value_and_gradient(model, params, batch):
    objective = CausalLM(model)

    def loss(params):
        totals = objective.totals(params, batch, StepContext())
        return objective.loss(params, batch, StepContext(), totals)[0]

    return jax.jit(jax.value_and_grad(loss))(params)


def test_packed_is_unpacked(subject, examples):
    packed, alone = (ChatBatches(examples, pack=p, batch_size=6, length=LENGTH, seed=0) for p in (True, False))
    assert packed.count < alone.count
    (a, a_grads), (b, b_grads) = (value_and_gradient(*subject, next(batches.one_pass())) for batches in (packed, alone))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    chex.assert_trees_all_close(a_grads, b_grads, atol=2e-6, rtol=1e-4)


def test_a_batch_in_samples_has_the_gradient_of_these_samples(subject, examples):
    batches = SampleBatches(examples, samples=4, steps=3, length=LENGTH, seed=0, row_multiple=2)
    chosen = [piece.example for row in batches.plan(1) for piece in row]
    alone = ChatBatches([examples[i] for i in chosen], pack=False, batch_size=4, length=LENGTH, seed=0)
    (a, a_grads), (b, b_grads) = (value_and_gradient(*subject, batch) for batch in (batches[1], next(alone.one_pass())))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    chex.assert_trees_all_close(a_grads, b_grads, atol=2e-6, rtol=1e-4)


def test_micro_batches_with_unequal_tokens_are_one_batch(subject, examples):
    model, params = subject
    batch = next(ChatBatches(examples, pack=False, batch_size=6, length=LENGTH, seed=0).one_pass())
    pieces = [{name: x[i::3] for name, x in batch.items()} for i in range(3)]
    assert len({float(piece["loss_weights"].sum()) for piece in pieces}) > 1
    tx = optax.sgd(1.0)

    def moved(micro_batches):
        gradients = functools.partial(accumulate, micro_batches=micro_batches)
        step = jax.jit(make_step(CausalLM(model), tx, gradients=gradients))
        state, metrics = step(init_state(params, tx, jax.random.key(0)), None, batch)
        return jax.tree.map(jnp.subtract, params, state.trainable), metrics

    (whole, metrics), (cut, cut_metrics) = moved(1), moved(3)
    chex.assert_trees_all_close(cut, whole, atol=2e-6, rtol=1e-4)
    chex.assert_trees_all_close(cut_metrics, metrics, rtol=1e-4)
    # A mean of the micro-batches' means (optax.MultiSteps) is another gradient.
    means = jax.tree.map(lambda *g: sum(g) / 3, *(value_and_gradient(model, params, piece)[1] for piece in pieces))
    norm = optax.global_norm
    assert float(norm(jax.tree.map(jnp.subtract, means, whole)) / norm(whole)) > 1e-2


def test_prompts_have_no_loss(subject, examples):
    model, params = subject
    batch = next(ChatBatches(examples, batch_size=3, length=LENGTH, seed=0).one_pass())
    answers = batch["loss_weights"] > 0
    assert (batch["targets"][answers] != 0).all()
    other = {**batch, "targets": np.where(answers, batch["targets"], 7)}
    (a, a_grads), (b, b_grads) = (value_and_gradient(model, params, data) for data in (batch, other))
    assert float(a) == float(b)
    chex.assert_trees_all_equal(a_grads, b_grads)
    wrong = {**batch, "targets": np.where(answers, 7, batch["targets"])}
    assert float(value_and_gradient(model, params, wrong)[0]) != float(a)


def test_the_mean_is_over_tokens_not_over_samples():
    """Tokens of probability 1/2 and 1/4: one sample of one, one of three. (1 + 6) / 4 bits, not (1 + 2) / 2."""
    log_probs = jnp.log(jnp.array([0.5, 0.25, 0.25]))

    def same(params):
        return params

    model = types.SimpleNamespace(
        config=types.SimpleNamespace(vocab_size=3),
        embed=lambda params, inputs, positions: jnp.zeros((*inputs.shape, 1)),
        trunk=lambda params, hidden, **_: types.SimpleNamespace(hidden=hidden),
        head=lambda params, hidden: jnp.broadcast_to(params, (*hidden.shape[:2], 3)),
        head_params=same,
        gather_head=same,
    )
    batch = {
        "inputs": jnp.zeros((2, 4), jnp.int32),
        "targets": jnp.array([[2, 0, 0, 0], [1, 1, 1, 0]]),
        "loss_weights": jnp.array([[0.0, 1, 0, 0], [1, 1, 1, 0]]),
    }
    loss, _ = value_and_gradient(model, log_probs, batch)
    assert float(loss) == pytest.approx(1.75 * np.log(2), rel=1e-6)
