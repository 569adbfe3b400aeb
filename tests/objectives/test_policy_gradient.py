import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.objectives import StepContext, model_log_probs
from jaxlm.objectives.policy_gradient import (
    GRPO,
    group_advantages,
    informative_groups,
    kl_estimates,
    overlong_penalty,
    sampler_weights,
)
from jaxlm.testing import tiny_decoder

LP = jnp.array([[-1, -2, -0.5], [-0.7, -1.1, -2], [-0.3, -0.4, -1], [-1.5, -0.2, -0.9]])
OLD = jnp.array([[-1.2, -1.8, -0.5], [-0.7, -1.5, -1.6], [-0.3, -0.9, -1], [-1, -0.2, -1.2]])
REF = jnp.array([[-1.1, -1.9, -0.6], [-0.8, -1.3, -1.8], [-0.5, -0.6, -1.1], [-1.2, -0.4, -1]])
MASK = jnp.array([[1.0, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
REWARDS = jnp.array([[1.0, 0, 0, 1]])
TOTALS = {"rows": jnp.float32(4), "tokens": jnp.float32(9)}


# Golden numbers: computed from TRL's formulas.


@pytest.mark.parametrize(
    ("settings", "scale", "expected"),
    [
        ({"aggregation": "grpo"}, "group", 0.0658409),
        ({"aggregation": "grpo", "kl_weight": 0.04}, "group", 0.0664402),
        ({"aggregation": "dapo", "clip_high": 0.28}, "group", -0.2342520),
        ({"aggregation": "dr_grpo", "max_length": 3}, "none", -0.0972265),
        (
            {"aggregation": "grpo", "ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
            "group",
            0.0618875,
        ),
    ],
)
def test_golden(settings, scale, expected):
    advantages = group_advantages(REWARDS, scale=scale)[0]
    loss, _ = GRPO(None, **settings).from_log_probs(
        LP, MASK, advantages, TOTALS, old_log_probs=OLD, reference_log_probs=REF
    )
    np.testing.assert_allclose(loss, expected, atol=2e-6)


def test_advantages_golden():
    np.testing.assert_allclose(group_advantages(REWARDS)[0], 0.865875 * np.array([1, -1, -1, 1]), rtol=1e-6)


def test_advantages_do_not_depend_on_the_rewards_origin_and_unit():
    rewards = jax.random.normal(jax.random.key(0), (5, 8))
    np.testing.assert_allclose(group_advantages(3 * rewards - 7), group_advantages(rewards), atol=2e-3)
    centered = group_advantages(rewards, scale="none")
    np.testing.assert_allclose(centered, rewards - rewards.mean(1, keepdims=True), atol=1e-6)
    batch = np.asarray(centered) / (np.std(np.asarray(rewards), ddof=1) + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, scale="batch"), batch, rtol=1e-4, atol=1e-6)


def test_leave_one_out_compares_with_the_others():
    rewards = np.array([[3.0, 1, 8, 0]])
    others = [(rewards[0].sum() - r) / 3 for r in rewards[0]]
    found = group_advantages(jnp.asarray(rewards), scale="none", leave_one_out=True)
    np.testing.assert_allclose(found[0], rewards[0] - others, rtol=1e-6)


def test_rewards_that_are_not_known_are_left_out():
    found = group_advantages(jnp.array([[1.0, jnp.nan, 0, 0, 1], [jnp.nan] * 5]))
    np.testing.assert_allclose(found[0, [0, 2, 3, 4]], group_advantages(REWARDS)[0], rtol=1e-6)
    assert not np.any(found[:, 1])
    assert not np.any(found[1])


def test_equal_rewards_have_no_gradient_and_no_information():
    equal = jnp.array([[2.0] * 4, [0, 1, 0, 0], [jnp.nan, 1, 1, 1]])
    assert informative_groups(equal).tolist() == [False, True, False]
    advantages = group_advantages(equal)[0]
    grad = jax.grad(lambda lp: GRPO(None).from_log_probs(lp, MASK, advantages, TOTALS, old_log_probs=OLD)[0])(LP)
    assert not np.any(grad)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_the_gradient_is_that_of_the_advantage(level):
    advantages = jnp.array([1.0, -2, 0.5, 3])
    objective = GRPO(None, ratio_level=level)
    grad = jax.grad(lambda lp: objective.from_log_probs(lp, MASK, advantages, TOTALS)[0])(LP)
    np.testing.assert_allclose(grad, -advantages[:, None] * MASK / 9, rtol=1e-5)


def test_ways_to_average_agree_where_all_lengths_are_equal():
    advantages, ones = jnp.array([1.0, -2, 0.5, 3]), jnp.ones((4, 3))
    totals = {"rows": 4.0, "tokens": 12.0}
    found = [
        GRPO(None, aggregation=name, max_length=3).from_log_probs(LP, ones, advantages, totals, old_log_probs=OLD)[0]
        for name in ("grpo", "dapo", "dr_grpo")
    ]
    np.testing.assert_allclose(found, found[0], rtol=1e-6)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    objective, advantages = GRPO(None, cispo=True, clip_high=1.1), jnp.ones(4)
    grad = jax.grad(lambda lp: objective.from_log_probs(lp, MASK, advantages, TOTALS, old_log_probs=OLD)[0])(LP)
    np.testing.assert_allclose(grad, -jnp.minimum(jnp.exp(LP - OLD), 1.1) * MASK / 9, rtol=1e-5)


def test_a_ratio_limit_bounds_the_loss_of_bad_samples():
    advantages = jnp.array([-1.0, -1, -1, -1])
    far = OLD.at[0, 0].set(-20.0)
    loss, _ = GRPO(None, ratio_limit=2.0).from_log_probs(LP, MASK, advantages, TOTALS, old_log_probs=far)
    assert float(loss) < 2.0


def test_kl_estimates_have_the_divergence_as_their_mean():
    p, q = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.2, 0.5, 0.3]))
    divergence = jnp.sum(jnp.exp(p) * (p - q))
    for estimator in ("k1", "k3"):
        np.testing.assert_allclose(jnp.sum(jnp.exp(p) * kl_estimates(p, q, estimator)), divergence, rtol=1e-5)
    assert (kl_estimates(LP, REF) >= 0).all()
    np.testing.assert_allclose(kl_estimates(LP, REF, "k2"), np.square(LP - REF) / 2, rtol=1e-6)


def test_sampler_corrections():
    sampler = LP - jnp.log(jnp.array([[1.0, 1, 1], [2, 2, 9], [4, 9, 9], [1, 1, 1]]))
    ones = np.ones((4, 3))
    truncated, masked = (sampler_weights(LP, sampler, MASK, f"token_{m}") for m in ("truncate", "mask"))
    np.testing.assert_allclose(truncated[1:3], [[2, 2, 1], [3, 1, 1]], rtol=1e-5)
    np.testing.assert_allclose(masked[1:3], [[2, 2, 1], [0, 1, 1]], rtol=1e-5)
    whole = sampler_weights(LP, sampler, MASK, "sequence_mask")
    np.testing.assert_allclose(whole, ones * [[1], [0], [0], [1]], rtol=1e-5)
    np.testing.assert_allclose(sampler_weights(LP, sampler, MASK, "none"), ones)


def test_overlong_samples_are_penalized():
    np.testing.assert_allclose(overlong_penalty(jnp.array([5, 8, 9, 10, 12]), 10, 2), [0, 0, -0.5, -1, -1])


def test_the_objective_reads_groups():
    model, params = tiny_decoder("llama", num_layers=1)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(0, 64, (2, 2, 8)), jnp.int32)
    batch = {
        "inputs": ids[..., :-1],
        "targets": ids[..., 1:],
        "loss_weights": jnp.asarray(rng.integers(0, 2, (2, 2, 7)), jnp.float32),
        "advantages": jnp.asarray(rng.normal(size=(2, 2)), jnp.float32),
    }
    batch["old_log_probs"] = model_log_probs(model, params, batch, temperature=0.7)
    objective = GRPO(model, temperature=0.7, kl_weight=0.1)
    totals = objective.totals(params, batch, StepContext())
    loss, aux = jax.jit(lambda p: objective.loss(p, batch, StepContext(frozen=params), totals))(params)
    expected = -(batch["advantages"][..., None] * batch["loss_weights"]).sum() / batch["loss_weights"].sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["kl"][0], 0, atol=1e-6)
    with pytest.raises(ConfigError, match="kl_weight needs a reference"):
        objective.loss(params, batch, StepContext(), totals)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'dr_grpo'"):
        GRPO(None, aggregation="dr_grp")
    with pytest.raises(ConfigError, match="needs max_length"):
        GRPO(None, aggregation="dr_grpo")
    with pytest.raises(ConfigError, match="temperature is 0"):
        GRPO(None, temperature=0.0)
    with pytest.raises(ConfigError, match="scale 'std'"):
        group_advantages(REWARDS, scale="std")
