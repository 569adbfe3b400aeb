"""8-bit moments: the code book, errors of blocks, real uint8 in the state, and how near it stays to Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.optim import (
    Projection,
    adamw_8bit,
    dequantize_blocks,
    dynamic_code_book,
    quantize_blocks,
    scale_by_adam_8bit,
    scale_by_galore,
)


@pytest.mark.parametrize("signed", [True, False])
def test_the_code_book_has_256_different_values_that_get_finer_towards_zero(signed):
    book = dynamic_code_book(signed)
    assert len(set(book.tolist())) == 256
    assert book[-1] == 1.0
    assert (np.diff(book) > 0).all()
    assert 0.0 in book
    positive = book[book > 0]
    if signed:
        np.testing.assert_array_equal(-book[book < 0][::-1], positive[:-1])
    # Within a decade cells are equal; from one decade to the next there are twice as many.
    counts = [np.sum((positive >= 10.0**-k) & (positive < 10.0 ** (1 - k))) for k in range(1, 7)]
    assert counts == [(64 if signed else 128) >> k for k in range(6)]


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_in_the_code_book_comes_back_as_it_was(signed):
    x = 3.0 * dynamic_code_book(signed).reshape(2, 128)
    x[:, 0] = 3.0
    back = dequantize_blocks(quantize_blocks(jnp.asarray(x), 128, signed=signed), 128, signed=signed)
    np.testing.assert_allclose(back, x, rtol=1e-6)


def test_blocks_have_their_own_scales_and_the_last_one_may_be_shorter():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 10)) * 10.0 ** rng.integers(-3, 3, size=(2, 3, 1)), jnp.float32)
    x = x.at[0, 0, 4:8].set(0.0)
    blocks = quantize_blocks(x, 4)
    assert blocks.codes.shape == x.shape
    assert blocks.codes.dtype == jnp.uint8
    largest = [np.abs(x[..., a:b]).max(-1) for a, b in ((0, 4), (4, 8), (8, 10))]
    np.testing.assert_array_equal(blocks.scales, np.stack(largest, -1))
    back = dequantize_blocks(blocks, 4)
    assert not np.any(back[0, 0, 4:8])
    per_entry = np.repeat(blocks.scales, 4, axis=-1)[..., :10]
    assert (np.abs(back - x) <= 0.5 * (0.9 / 64) * per_entry + 1e-7).all()


def test_the_state_is_uint8_and_small_matrices_are_left_alone():
    params = {"big": jnp.zeros((2, 64, 64), jnp.bfloat16), "small": jnp.zeros((2, 8, 8), jnp.bfloat16)}
    state = scale_by_adam_8bit(block=32).init(params)
    assert state.mu_codes["big"].dtype == state.nu_codes["big"].dtype == jnp.uint8
    assert state.mu_scales["big"].shape == (2, 64, 2)
    assert state.mu_codes["small"].dtype == jnp.bfloat16
    assert state.mu_scales["small"] is None


def test_it_stays_near_adam():
    rng = np.random.default_rng(1)
    params = {"w": jnp.zeros((64, 96))}
    scales = jnp.asarray(10.0 ** rng.uniform(-2, 0, size=(64, 96)), jnp.float32)
    tx, adam = scale_by_adam_8bit(min_size=1), optax.scale_by_adam()
    state, adam_state = tx.init(params), adam.init(params)
    update = jax.jit(tx.update)
    for step in range(30):
        g = {"w": scales * jnp.asarray(1.0 + rng.normal(size=(64, 96)), jnp.float32)}
        updates, state = update(g, state)
        expected, adam_state = adam.update(g, adam_state)
        if step == 0:
            np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-4)
    cosine = jnp.sum(updates["w"] * expected["w"]) / (
        jnp.linalg.norm(updates["w"]) * jnp.linalg.norm(expected["w"])
    )
    assert cosine > 0.99


def test_embeddings_keep_full_moments():
    axes = {"embed": ("vocab", "embed"), "w": ("layers", "embed", "mlp"), "head": ("embed", "vocab")}
    params = {"embed": jnp.zeros((128, 64)), "w": jnp.zeros((2, 64, 64)), "head": jnp.zeros((64, 128))}
    state = adamw_8bit(0.1, axes=axes).init(params)
    dtypes = {leaf.shape: leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.shape[-1] >= 64}
    assert dtypes == {(128, 64): jnp.float32, (2, 64, 64): jnp.uint8, (64, 128): jnp.uint8}


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"block": 0}, "block is 0"), ({"min_size": 0}, "min_size is 0"), ({"b2": 1.0}, "b2 is 1.0")],
)
def test_bad_values_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        adamw_8bit(0.1, axes={"w": ("embed", "mlp")}, **settings)


def test_it_is_a_link_like_any_other_so_8_bit_galore_is_a_composition():
    g = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 32)), jnp.float32)}
    projection = Projection(4)
    tx = scale_by_galore(projection, scale_by_adam_8bit(block=16, min_size=1), 0.25)
    plain = scale_by_galore(projection, optax.scale_by_adam(), 0.25)
    updates, state = tx.update(g, tx.init(g), step=0)
    assert state.inner.mu_codes["w"].shape == (2, 4, 32)
    assert state.inner.mu_codes["w"].dtype == jnp.uint8
    np.testing.assert_allclose(updates["w"], plain.update(g, plain.init(g), step=0)[0]["w"], rtol=1e-3, atol=1e-5)
