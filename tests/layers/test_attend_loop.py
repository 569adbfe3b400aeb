"""The loop over blocks against the reference that forms all logits: values and gradients, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.layers.attend import KeyValues, Visible, attend_with_weights
from jaxlm.layers.attend_loop import causal_attention

BATCH, KV_HEADS, HEAD_DIM = 2, 2, 8


def draw(length, group, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((length, KV_HEADS * group), (length, KV_HEADS), (length, KV_HEADS), (length, KV_HEADS * group))
    arrays = [jnp.asarray(rng.normal(size=(BATCH, n, h, HEAD_DIM)), jnp.float32) for n, h in shapes]
    segments = jnp.asarray(np.cumsum(rng.random((BATCH, length)) < 0.1, axis=1), jnp.int32)
    return arrays, segments


def looped(q, k, v, segments, window, softcap, block):
    length, group = q.shape[1], q.shape[2] // KV_HEADS
    grouped = jnp.moveaxis(q.reshape(BATCH, length, KV_HEADS, group, HEAD_DIM), 1, 3)
    keys, values = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    out = causal_attention(grouped, keys, values, segments, window, softcap, block)
    return jnp.moveaxis(out, 3, 1).reshape(q.shape)


@pytest.mark.parametrize(
    ("length", "group", "window", "softcap", "block", "segmented"),
    [
        (40, 3, None, None, 16, True),
        (64, 1, 10, 5.0, 16, True),
        (33, 2, 7, None, 8, False),
        (48, 1, 17, None, 16, True),  # a window one longer than a block
        (24, 2, 1, None, 8, False),  # every token sees itself alone
        (30, 1, None, None, 512, False),  # one block
    ],
)
def test_values_and_gradients_are_those_of_the_reference(length, group, window, softcap, block, segmented):
    (q, k, v, probe), segments = draw(length, group)
    segments = segments if segmented else None

    def reference(q, k, v):
        source = KeyValues(k, v, Visible(segment_ids=segments, window=window))
        return attend_with_weights(q, (source,), scale=1.0, softcap=softcap)[0]

    def ours(q, k, v):
        return looped(q, k, v, segments, window, softcap, block)

    def both(function):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(probe)

    got, expected = (jax.jit(both, static_argnums=0)(f) for f in (ours, reference))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_memory_does_not_grow_with_the_square_of_the_length():
    def temporaries(length):
        q = jax.ShapeDtypeStruct((1, 1, 1, length, 16), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, 1, length, 16), jnp.float32)
        grad = jax.grad(lambda q, k, v: jnp.sum(causal_attention(q, k, v, None, None, None, 128)), (0, 1, 2))
        return jax.jit(grad).lower(q, kv, kv).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4096) < 2.5 * temporaries(2048)
