"""Distillation against its closed form: the gradient by the logits, its ends, its pieces."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.models import Decoder
from jaxlm.models.config import DecoderConfig
from jaxlm.objectives import CausalLM, Distillation, StepContext

CONFIG = DecoderConfig(vocab_size=11, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16, max_length=16)
MODEL = Decoder(CONFIG)


@pytest.fixture(scope="module")
def setting():
    student, teacher = (MODEL.init(jax.random.key(i))["params"] for i in (0, 1))
    tokens = jax.random.randint(jax.random.key(2), (3, 8), 0, 11)
    weights = (jax.random.uniform(jax.random.key(3), (3, 7)) > 0.3).astype(jnp.float32)
    return student, teacher, {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": weights}


def value(objective, params, teacher, batch):
    ctx = StepContext(frozen=teacher)
    return objective.loss(params, batch, ctx, objective.totals(params, batch, ctx))[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_length", [None, 3])
def test_value_and_gradient_are_those_of_the_whole_logits(setting, temperature, chunk_length):
    student, teacher, batch = setting

    def plain(params):
        mine, theirs = (MODEL.apply({"params": p}, batch["inputs"]) for p in (params, teacher))
        nll = -jnp.take_along_axis(jax.nn.log_softmax(mine), batch["targets"][..., None], -1)[..., 0]
        p = jax.nn.softmax(theirs / temperature)
        log_ratio = jnp.log(p) - jax.nn.log_softmax(mine / temperature)
        each = 0.3 * temperature**2 * jnp.sum(p * log_ratio, -1) + 0.7 * nll
        return jnp.sum(batch["loss_weights"] * each) / jnp.sum(batch["loss_weights"])

    objective = Distillation(MODEL, weight=0.3, temperature=temperature, chunk_length=chunk_length)
    expected, grads = jax.value_and_grad(plain)(student)
    found, found_grads = jax.value_and_grad(lambda p: value(objective, p, teacher, batch))(student)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found_grads, grads)


def test_weight_0_is_cross_entropy_and_a_perfect_student_has_no_divergence(setting):
    student, teacher, batch = setting
    plain = value(CausalLM(MODEL), student, None, batch)
    np.testing.assert_allclose(value(Distillation(MODEL, weight=0.0), student, teacher, batch), plain, rtol=1e-6)
    np.testing.assert_allclose(value(Distillation(MODEL, weight=1.0), teacher, teacher, batch), 0, atol=1e-6)


def test_the_gradient_by_the_logits_is_the_mix_of_the_two_differences():
    from jaxlm.objectives.distill import _chunk

    logits, theirs = (jax.random.normal(jax.random.key(i), (1, 1, 5)) for i in (0, 1))
    target, one = jnp.array([[2]]), jnp.ones((1, 1))

    def loss(logits):
        nll, kl = _chunk(lambda p, h: h, lambda p, h: h, 1.0, (None, None), logits, theirs, target, one)
        return (1 - 1 / 3) * nll + kl / 3

    s, t = jax.nn.softmax(logits), jax.nn.softmax(theirs)
    expected = 2 / 3 * (s - jax.nn.one_hot(target, 5)) + 1 / 3 * (s - t)
    np.testing.assert_allclose(jax.grad(loss)(logits), expected, atol=1e-6)


def test_bad_settings_are_refused(setting):
    student, _, batch = setting
    with pytest.raises(ConfigError, match="weight is 1.5"):
        Distillation(MODEL, weight=1.5)
    with pytest.raises(ConfigError, match="temperature is 0"):
        Distillation(MODEL, temperature=0)
    with pytest.raises(ConfigError, match="needs a teacher"):
        value(Distillation(MODEL), student, None, batch)
    other = Decoder(dataclasses.replace(CONFIG, vocab_size=12))
    with pytest.raises(ConfigError, match="vocabulary has 12 entries, the student's 11"):
        Distillation(MODEL, teacher_model=other)
