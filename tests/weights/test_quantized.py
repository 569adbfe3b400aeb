"""What `Quantized` does beyond the contract of all weights (`test_weights.py`)."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import weights
from jaxlm.core.errors import ConfigError
from jaxlm.weights import Quantized, pack, quantized
from pallas_kernels.quantized_matmul.reference import PIECE


def random(bits, shape, axis, block=32):
    """A `Quantized` of random codes, and its dense matrix from the definition."""
    rng = np.random.default_rng(bits)
    low, high = (-128, 128) if bits == 8 else (0, 1 << bits)
    codes = rng.integers(low, high, shape)
    few = list(shape)
    few[axis] //= block
    scale, minimum = (rng.normal(size=few).astype(np.float16) for _ in range(2))
    packed, rest = pack(codes, bits, block, axis)
    w = Quantized(packed, scale, rest, minimum, bits=bits, offset=3, axis=axis)
    spread = [np.repeat(x.astype(np.float32), block, axis) for x in (scale, minimum)]
    return jax.tree.map(jnp.asarray, w), spread[0] * (codes - 3) + spread[1]


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("bits", quantized.BITS)
def test_unpacks_what_was_packed(bits, axis):
    w, expected = random(bits, (2, 64, 96), axis)
    assert w.shape == (2, 64, 96)
    chex.assert_trees_all_close(w.dense(), expected, rtol=1e-6, atol=1e-4)
    # Codes, and two float16 numbers a block of 32.
    assert weights.nbytes(w) == expected.size * (bits + 1) // 8


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(64, 608), (608, 64)])
def test_large_matrices_are_multiplied_in_pieces(axis, transposed, shape, monkeypatch):
    w, _ = random(4, shape, axis)
    multiply = weights.matmul_transposed if transposed else weights.matmul
    x = jax.random.normal(jax.random.key(0), (2, 3, shape[1 if transposed else 0]))
    expected = multiply(x, w.dense())
    monkeypatch.setitem(PIECE, "cpu", 128 * 64)
    got, pull = jax.vjp(lambda x: multiply(x, w), x)
    chex.assert_trees_all_close(got, expected, atol=1e-3, rtol=1e-5)
    dy = jax.random.normal(jax.random.key(1), got.shape)
    reference = jax.vjp(lambda x: multiply(x, w.dense()), x)[1](dy)
    chex.assert_trees_all_close(pull(dy), reference, atol=1e-3, rtol=1e-5)


def test_backward_keeps_only_what_is_packed():
    w, _ = random(4, (64, 64), -2)
    x = jnp.ones((2, 64))
    kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: weights.matmul(x, w), x)[1], x))
    assert not any(leaf.shape == (64, 64) for leaf in kept)


def test_products_round_to_the_matmul_dtype_as_those_of_the_dense_matrix():
    w, _ = random(6, (64, 32), -2)
    x = jax.random.normal(jax.random.key(0), (3, 64))
    got, expected = (weights.matmul(x, v, dtype=jnp.bfloat16) for v in (w, w.dense()))
    chex.assert_trees_all_close(got, expected, rtol=1e-6)


@pytest.mark.parametrize(("bits", "block"), [(3, 32), (4, 48), (5, 4)])
def test_refuses_what_it_cannot_pack(bits, block):
    with pytest.raises(ConfigError, match=f"{bits} bits"):
        pack(np.zeros((64, 2), np.uint8), bits, block)
