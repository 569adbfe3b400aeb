"""Masked language modeling: what is hidden, the loss, conditionals one mask at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.models import Decoder
from jaxlm.objectives import MaskedLM, StepContext
from jaxlm.testing import tiny_config, tiny_decoder

MODEL, PARAMS = tiny_decoder("gpt2", num_layers=2, causal=False)
KEY = jax.random.key(0)


def rows(batch=4, length=6, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 60, (batch, length)).astype(np.int32))


def test_tokens_see_both_sides():
    changed = rows().at[:, 5].set(1)
    before, after = (MODEL.apply({"params": PARAMS}, ids) for ids in (rows(), changed))
    assert np.abs(before[:, 0] - after[:, 0]).max() > 1e-3
    causal = Decoder(tiny_config("gpt2", num_layers=2))
    before, after = (causal.apply({"params": PARAMS}, ids) for ids in (rows(), changed))
    np.testing.assert_array_equal(before[:, 0], after[:, 0])


def test_long_rows_on_the_blocked_path_agree_with_the_reference():
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 60, (2, 96)).astype(np.int32))
    found = [
        Decoder(tiny_config("gpt2", num_layers=2, causal=False, attention=how)).apply({"params": PARAMS}, ids)
        for how in ("blocked", "reference")
    ]
    np.testing.assert_allclose(found[0], found[1], atol=2e-4)


def test_shares_of_what_is_hidden_are_berts():
    objective = MaskedLM(MODEL, mask_id=62, num_words=60)
    tokens = rows(2000, 20)
    segments = jnp.ones(tokens.shape, jnp.int32).at[:, 15:].set(0)
    inputs, weights = objective.hide(KEY, {"inputs": tokens, "segment_ids": segments})
    assert not np.any(weights[:, 15:])
    chosen = np.asarray(weights) > 0
    assert chosen[:, :15].mean() == pytest.approx(0.15, abs=0.005)
    np.testing.assert_array_equal(np.asarray(inputs)[~chosen], np.asarray(tokens)[~chosen])
    masked = np.asarray(inputs)[chosen] == 62
    kept = np.asarray(inputs)[chosen] == np.asarray(tokens)[chosen]
    assert masked.mean() == pytest.approx(0.8, abs=0.02)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 60, abs=0.015)


def test_special_tokens_are_never_hidden():
    tokens = rows().at[:, 0].set(61)
    inputs, weights = MaskedLM(MODEL, 62, 60, rate=1.0, masked=1.0, random=0.0).hide(KEY, {"inputs": tokens})
    np.testing.assert_array_equal(inputs[:, 0], tokens[:, 0])
    assert (inputs[:, 1:] == 62).all()
    np.testing.assert_array_equal(weights, (tokens < 60).astype(np.float32))


def test_loss_is_the_mean_over_hidden_tokens_and_padding_is_not_seen():
    objective = MaskedLM(MODEL, mask_id=62, num_words=60, rate=0.5)
    batch = {"inputs": rows(), "segment_ids": jnp.ones((4, 6), jnp.int32).at[0, 4:].set(0)}
    ctx = StepContext(key=KEY)
    loss, aux = objective.loss(PARAMS, batch, ctx, objective.totals(PARAMS, batch, ctx))
    inputs, weights = objective.hide(KEY, batch)
    logp = jax.nn.log_softmax(MODEL.apply({"params": PARAMS}, inputs, segment_ids=batch["segment_ids"]))
    nll = -jnp.take_along_axis(logp, batch["inputs"][..., None], -1)[..., 0]
    assert loss == pytest.approx(float(jnp.sum(nll * weights) / jnp.sum(weights)), rel=1e-5)
    assert aux.metrics["loss"][1] == jnp.sum(weights)
    padded = {**batch, "inputs": batch["inputs"].at[0, 4:].set(3)}
    again, _ = objective.loss(PARAMS, padded, ctx, objective.totals(PARAMS, padded, ctx))
    assert again == pytest.approx(float(loss), rel=1e-6)


def test_conditionals_mask_one_place_at_a_time():
    objective = MaskedLM(MODEL, mask_id=62, num_words=60)
    found = objective.conditionals(PARAMS, {"inputs": rows()})
    assert found.shape == (4, 6, 64)
    for place in (0, 3):
        logits = MODEL.apply({"params": PARAMS}, rows().at[:, place].set(62))
        np.testing.assert_allclose(found[:, place], jax.nn.log_softmax(logits[:, place]), atol=1e-5)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ConfigError, match="model.causal is True"):
        MaskedLM(Decoder(tiny_config("gpt2")), 62, 60)
    for changes, said in (
        ({"mask_id": 5}, "mask_id is 5"),
        ({"mask_id": 64}, "mask_id is 64"),
        ({"rate": 0.0}, "rate is 0"),
        ({"masked": 0.8, "random": 0.3}, "masked 0.8 and random 0.3"),
    ):
        with pytest.raises(ConfigError, match=said):
            MaskedLM(**{"model": MODEL, "mask_id": 62, "num_words": 60} | changes)
    with pytest.raises(ConfigError, match="causal is False"):
        MODEL.init_cache(1, 8)
    with pytest.raises(ConfigError, match="windows are of causal models"):
        tiny_config("gpt2", causal=False, window=4)
