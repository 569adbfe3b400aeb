import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives import token_log_probs
from jaxlm.testing import tiny_decoder


@pytest.mark.parametrize("chunk", [None, 4, 13])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_values_and_gradients_are_those_of_whole_logits(family, chunk):
    model, params = tiny_decoder(family, num_layers=1)
    hidden = jax.random.normal(jax.random.key(0), (3, 13, 32))
    targets = jax.random.randint(jax.random.key(1), (3, 13), 0, 64)
    cotangent = jax.random.normal(jax.random.key(2), (3, 13))

    def plain(head, hidden):
        found = jax.nn.log_softmax(model.head(head, hidden) / 0.7)
        return jnp.sum(cotangent * jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0])

    def chunked(head, hidden):
        found = token_log_probs(
            model.head, head, hidden, targets, vocab_size=64, temperature=0.7, chunk_length=chunk
        )
        return jnp.sum(cotangent * found)

    head = model.head_params(params)
    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(head, hidden)
    got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(head, hidden)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(got[1], expected[1], atol=2e-5, rtol=1e-4)


def test_no_array_of_all_logits_exists_forward_or_backward():
    model, params = tiny_decoder("llama", vocab_size=3001, num_layers=1)
    hidden, targets = jnp.ones((3, 16, 32)), jnp.ones((3, 16), jnp.int32)

    def loss(head, hidden):
        return jnp.sum(token_log_probs(model.head, head, hidden, targets, vocab_size=3001, chunk_length=4) ** 2)

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(model.head_params(params), hidden).as_text()
    assert "3x4x3001xf32" in text
    assert "3x16x3001xf32" not in text
    assert "4x3x4x3001xf32" not in text
