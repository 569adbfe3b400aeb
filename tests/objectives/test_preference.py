import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.objectives import CPO, DPO, KTO, ORPO, SimPO, StepContext, model_log_probs
from jaxlm.objectives.preference import dpo_losses, kto_losses, odds_ratio_losses
from jaxlm.testing import tiny_decoder
from jaxlm.training.state import TrainState
from jaxlm.training.step import accumulate

LENGTH = 11


def rows(shape, seed=0, prefix=""):
    """Random rows with a prompt of 4 tokens, completions of different lengths, and padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 64, (*shape, LENGTH + 1))
    ends = rng.integers(6, LENGTH + 1, shape)[..., None]
    at = np.arange(LENGTH)
    arrays = {
        "inputs": ids[..., :-1].astype(np.int32),
        "targets": ids[..., 1:].astype(np.int32),
        "loss_weights": ((at >= 3) & (at < ends)).astype(np.float32),
        "segment_ids": (at < ends).astype(np.int32),
        "positions": np.broadcast_to(at, ids[..., 1:].shape).astype(np.int32),
    }
    return {prefix + name: jnp.asarray(x) for name, x in arrays.items()}


def kto_batch(seed=0, n=4):
    labels = jnp.asarray([1.0, 0.0] * (n // 2))
    return {**rows((n,), seed), **rows((n,), seed + 100, "kl_"), "labels": labels}


@pytest.fixture(scope="module")
def decoder():
    model, params = tiny_decoder("llama", num_layers=1)
    return model, params, tiny_decoder("llama", seed=7, num_layers=1)[1]


def value_and_gradient(objective, params, frozen, batch):
    ctx = StepContext(frozen)

    def loss(params):
        totals = jax.lax.stop_gradient(objective.totals(params, batch, ctx))
        return objective.loss(params, batch, ctx, totals)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def sums_by_hand(model, params, batch, average=False):
    """Per-row log-probabilities from whole logits, a row at a time."""
    flat = {name: x.reshape(-1, LENGTH) for name, x in batch.items() if name != "labels"}
    logits = model.apply({"params": params}, flat["inputs"], flat["positions"], flat["segment_ids"])
    found = jax.nn.log_softmax(logits)[np.arange(len(logits))[:, None], np.arange(LENGTH), flat["targets"]]
    total = (found * flat["loss_weights"]).sum(-1)
    total = total / flat["loss_weights"].sum(-1) if average else total
    return np.asarray(total).reshape(batch["inputs"].shape[:-1])


# Golden numbers: computed from the formulas as TRL writes them.


@pytest.mark.parametrize(
    ("kind", "smoothing", "expected"),
    [
        ("sigmoid", 0.0, [0.598139, 0.854355]),
        ("hinge", 0.0, [0.8, 1.3]),
        ("sigmoid", 0.1, [0.9 * 0.598139 + 0.1 * 0.798139, 0.9 * 0.854355 + 0.1 * 0.554355]),
        ("robust", 0.1, [(0.9 * 0.598139 - 0.1 * 0.798139) / 0.8, (0.9 * 0.854355 - 0.1 * 0.554355) / 0.8]),
    ],
)
def test_dpo_golden(kind, smoothing, expected):
    chosen, rejected = np.array([-10.0, -20]), np.array([-12.0, -19])
    difference = jnp.asarray((chosen - [-11, -18]) - (rejected - [-11, -20]), jnp.float32)
    np.testing.assert_allclose(dpo_losses(difference, kind, 0.1, smoothing), expected, rtol=1e-5)


def test_ipo_golden():
    ratios = np.array([[1.0, -2], [-1, 1]]) / np.array([[5, 8], [4, 10]])
    np.testing.assert_allclose(dpo_losses(jnp.asarray(ratios[0] - ratios[1]), "ipo", 0.1), [20.7025, 28.6225])


def test_odds_ratio_golden():
    found = 0.1 * odds_ratio_losses(jnp.array([-0.5, -1.0]), jnp.array([-0.9, -0.8]))
    np.testing.assert_allclose(found, [0.036773, 0.087633], rtol=2e-5)


def test_odds_ratio_is_finite_where_a_sequence_is_certain():
    value, slope = jax.value_and_grad(lambda x: odds_ratio_losses(x, jnp.float32(-1.0)))(jnp.float32(0.0))
    assert np.isfinite(value)
    assert np.isfinite(slope)


def test_kto_golden():
    ratios, ones = jnp.array([1.0, -2.0]), jnp.ones(2)
    np.testing.assert_allclose(kto_losses(ratios, ones, 0.3, 0.1), [0.482507, 0.557248], rtol=2e-6)
    np.testing.assert_allclose(kto_losses(jnp.array([-1.0, 1.0]), 0 * ones, 0.3, 0.1), [0.467546, 0.517493], rtol=2e-6)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (DPO(None), np.log(2)),
        (DPO(None, loss_kind="ipo", beta=0.25), 4.0),
        (DPO(None, loss_kind="hinge"), 1.0),
        (DPO(None, loss_kind="robust", label_smoothing=0.2), np.log(2)),
        (KTO(None), 0.5),
    ],
)
def test_a_policy_that_is_the_reference(decoder, objective, expected):
    model, params, _ = decoder
    batch = kto_batch() if isinstance(objective, KTO) else rows((3, 2))
    (loss, _), grads = value_and_gradient(dataclasses.replace(objective, model=model), params, params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "sigmoid_norm"])
def test_dpo_is_the_formula_on_whole_logits(decoder, kind):
    model, params, frozen = decoder
    batch = rows((3, 2))
    average = kind != "sigmoid"
    ratios = sums_by_hand(model, params, batch, average) - sums_by_hand(model, frozen, batch, average)
    expected = dpo_losses(jnp.asarray(ratios[:, 0] - ratios[:, 1]), kind, 0.3).mean()
    (loss, aux), _ = value_and_gradient(DPO(model, kind, 0.3, chunk_length=4), params, frozen, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    reward, pairs = aux.metrics["reward_chosen"]
    np.testing.assert_allclose(reward / pairs, 0.3 * ratios[:, 0].mean(), rtol=1e-4)


def test_length_desensitization_discounts_what_is_beyond_the_shorter(decoder):
    model, params, frozen = decoder
    batch = rows((1, 2))
    shorter = int(batch["loss_weights"].sum(-1).min())
    assert batch["loss_weights"][0, 0].sum() != batch["loss_weights"][0, 1].sum()
    kept = np.asarray(batch["loss_weights"]) * (np.cumsum(batch["loss_weights"], -1) <= shorter)
    cut = {**batch, "loss_weights": jnp.asarray(kept)}
    (without, _), _ = value_and_gradient(DPO(model), params, frozen, cut)
    (zero, _), _ = value_and_gradient(DPO(model, length_alpha=0.0), params, frozen, batch)
    np.testing.assert_allclose(zero, without, rtol=1e-6)


def test_reference_log_probs_in_the_batch_stand_in_for_the_reference(decoder):
    model, params, frozen = decoder
    batch = rows((3, 2))
    stored = {**batch, "reference_log_probs": model_log_probs(model, frozen, batch)}
    given = value_and_gradient(DPO(model), params, None, stored)
    run = value_and_gradient(DPO(model), params, frozen, batch)
    np.testing.assert_allclose(given[0][0], run[0][0], rtol=1e-6)
    with pytest.raises(ConfigError, match="no reference policy"):
        value_and_gradient(DPO(model), params, None, batch)


def test_the_reference_can_be_the_parameters_without_what_was_added(decoder):
    model, params, frozen = decoder
    objective = DPO(model, reference=lambda params, frozen: {**params, "head": frozen["head"]})
    batch = rows((2, 2))
    changed = {**params, "head": jax.tree.map(lambda x: 1.5 * x, params["head"])}
    (loss, _), grads = value_and_gradient(objective, changed, {"head": params["head"]}, batch)
    (expected, _), expected_grads = value_and_gradient(DPO(model), changed, params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected_grads)


def test_reference_free_losses_are_their_formulas(decoder):
    model, params, _ = decoder
    batch = rows((3, 2))
    sums, means = sums_by_hand(model, params, batch), sums_by_hand(model, params, batch, average=True)
    sigmoid = lambda x: -np.log(1 / (1 + np.exp(-x)))  # noqa: E731
    counts = np.asarray(batch["loss_weights"][:, 0].sum())
    nll = -sums[:, 0].sum() / counts
    (cpo, _), _ = value_and_gradient(CPO(model, beta=0.2, sft_weight=0.5), params, None, batch)
    np.testing.assert_allclose(cpo, sigmoid(0.2 * (sums[:, 0] - sums[:, 1])).mean() + 0.5 * nll, rtol=1e-4)
    (simpo, _), _ = value_and_gradient(SimPO(model, beta=2.0, margin=0.4), params, None, batch)
    np.testing.assert_allclose(simpo, sigmoid(2 * (means[:, 0] - means[:, 1]) - 0.4).mean(), rtol=1e-4)
    (orpo, aux), _ = value_and_gradient(ORPO(model), params, None, batch)
    whole = {**batch, "loss_weights": batch["segment_ids"].astype(jnp.float32)}
    everything = -sums_by_hand(model, params, whole)[:, 0].sum() / np.asarray(batch["segment_ids"][:, 0].sum())
    odds = 0.1 * odds_ratio_losses(jnp.asarray(means[:, 0]), jnp.asarray(means[:, 1])).mean()
    np.testing.assert_allclose(orpo, everything + odds, rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["loss"][0] / aux.metrics["loss"][1], orpo, rtol=1e-5)


def test_orpo_adds_beta_log_2_where_both_sides_are_equal(decoder):
    model, params, _ = decoder
    same = jax.tree.map(lambda x: jnp.stack([x[:, 0]] * 2, axis=1), rows((3, 2)))
    (loss, aux), _ = value_and_gradient(ORPO(model, beta=0.5), params, None, same)
    np.testing.assert_allclose(loss - aux.metrics["nll"][0] / aux.metrics["nll"][1], 0.5 * np.log(2), rtol=1e-5)


def test_kto_is_the_formula_on_whole_logits(decoder):
    model, frozen, params = decoder
    batch = kto_batch()
    mismatched = {name.removeprefix("kl_"): x for name, x in batch.items() if name.startswith("kl_")}
    plain = {name: x for name, x in batch.items() if not name.startswith("kl_")}
    ratio = lambda b: sums_by_hand(model, params, b) - sums_by_hand(model, frozen, b)  # noqa: E731
    point = ratio(mismatched).mean()
    assert point > 0.1
    expected = kto_losses(jnp.asarray(ratio(plain)), batch["labels"], point, 0.1, 1.0, 1.5).mean()
    (loss, aux), _ = value_and_gradient(KTO(model, undesirable_weight=1.5), params, frozen, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["kl"][0] / aux.metrics["kl"][1], point, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dpo", "orpo", "kto"])
def test_micro_batches_change_nothing(decoder, name):
    model, params, frozen = decoder
    objective = {"dpo": DPO(model, sft_weight=0.3), "orpo": ORPO(model), "kto": KTO(model)}[name]
    batch = kto_batch() if name == "kto" else rows((4, 2))
    state = TrainState(jnp.zeros((), jnp.int32), params, None, None, jax.random.key(0), {})
    build = lambda trainable, frozen, step: trainable  # noqa: E731
    run = jax.jit(accumulate, static_argnums=(0, 1), static_argnames="micro_batches")
    one = run(objective, build, state, frozen, batch)
    two = run(objective, build, state, frozen, batch, micro_batches=2)
    np.testing.assert_allclose(one.loss, two.loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.grads, two.grads)
    for metric, (total, weight) in one.metrics.items():
        np.testing.assert_allclose(total, two.metrics[metric][0], rtol=1e-4, atol=1e-5, err_msg=metric)
        np.testing.assert_allclose(weight, two.metrics[metric][1], err_msg=metric)


def test_padding_pairs_count_for_nothing(decoder):
    model, params, frozen = decoder
    batch = rows((3, 2))
    padded = jax.tree.map(lambda x: jnp.concatenate([x, jnp.zeros_like(x[:1])]), batch)
    for objective in (DPO(model), ORPO(model)):
        (loss, _), grads = value_and_gradient(objective, params, frozen, batch)
        (with_padding, _), more = value_and_gradient(objective, params, frozen, padded)
        np.testing.assert_allclose(with_padding, loss, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, more)


def test_bad_settings_and_batches_are_refused(decoder):
    model, params, _ = decoder
    with pytest.raises(ConfigError, match="did you mean 'sigmoid'"):
        DPO(model, "sigmod")
    with pytest.raises(ConfigError, match="beta is 0"):
        ORPO(model, beta=0)
    with pytest.raises(ConfigError, match="label_smoothing is 0.5"):
        DPO(model, label_smoothing=0.5)
    with pytest.raises(ConfigError, match="takes averages"):
        DPO(model, "ipo", length_alpha=0.5)
    with pytest.raises(DataError, match=r"shape \(3, 11\), expected 3 axes"):
        DPO(model).totals(params, rows((3,)), StepContext())
    with pytest.raises(DataError, match="no array labels, kl_inputs"):
        KTO(model).totals(params, rows((3,)), StepContext())
