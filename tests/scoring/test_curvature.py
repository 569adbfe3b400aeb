"""Traces against dense Hessians and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.models import Decoder
from jaxlm.models.lookup_table import LookupTable
from jaxlm.objectives import CausalLM, MaskedLM
from jaxlm.scoring import fisher_trace, hessian_trace, hvp, objective_loss
from jaxlm.testing import tiny_config, tiny_decoder

KEY = jax.random.key(0)


def no_batch(key):
    return {}


def near(trace, truth, errors=4.0):
    return abs(float(trace.value) - truth) <= errors * float(trace.error)


def quadratic(matrix):
    return lambda params, batch: 0.5 * params["x"] @ matrix @ params["x"]


def test_quadratic_loss():
    a = np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32)
    matrix = jnp.asarray(a @ a.T)
    params = {"x": jnp.ones(12)}
    np.testing.assert_allclose(
        hvp(lambda p: quadratic(matrix)(p, {}), params, {"x": jnp.eye(12)[3]})["x"], matrix[3], rtol=1e-5
    )
    errors = {}
    for probe in ("rademacher", "gaussian"):
        found = hessian_trace(quadratic(matrix), params, no_batch, KEY, draws=400, probe=probe)
        assert near(found, float(jnp.trace(matrix)))
        errors[probe] = float(found.error)
    off = np.asarray(matrix) - np.diag(np.diag(matrix))
    # Variances in closed form: 2 |off-diagonal|^2 with signs, 2 |H|^2 with normal directions.
    assert errors["rademacher"] == pytest.approx((2 * (off**2).sum() / 400) ** 0.5, rel=0.2)
    assert errors["gaussian"] == pytest.approx((2 * (np.asarray(matrix) ** 2).sum() / 400) ** 0.5, rel=0.2)


def test_signs_are_exact_on_a_diagonal():
    found = hessian_trace(quadratic(jnp.diag(jnp.arange(5.0))), {"x": jnp.ones(5)}, no_batch, KEY, draws=2)
    assert found.value == pytest.approx(10, rel=1e-6)
    assert found.error == pytest.approx(0, abs=1e-5)


def test_logistic_regression_in_closed_form_over_random_batches():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32))
    params = {"w": jnp.array([1.0, -1.0, 0.5, 0.2]), "unused": jnp.ones(3)}

    def logits(p, batch):
        score = batch["x"] @ p["w"]
        return jnp.stack([jnp.zeros_like(score), score], -1), jnp.ones(score.shape)

    def loss(p, batch):  # labels of the model itself: then Hessian and Fisher agree on average
        return jnp.mean(jnp.logaddexp(0, batch["x"] @ p["w"]) - batch["y"] * (batch["x"] @ p["w"]))

    def draw(key):
        rows = x[jax.random.randint(key, (8,), 0, 50)]
        return {"x": rows, "y": jnp.ones(8)}

    p = jax.nn.sigmoid(x @ params["w"])
    truth = float(jnp.mean(p * (1 - p) * jnp.sum(x * x, -1)))
    found = hessian_trace(loss, params, draw, KEY, draws=600, chosen=lambda path: path == "w")
    assert near(found, truth)
    assert float(found.error) < 0.05 * truth
    fisher = fisher_trace(logits, params, draw, KEY, draws=2000)
    assert near(fisher, truth)
    assert float(fisher.error) < 0.05 * truth


def test_the_fisher_trace_of_a_table_that_is_the_distribution_is_its_hessians():
    table = LookupTable(vocab_size=5)
    rows = np.arange(12).reshape(6, 2)
    logp = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(2).normal(size=(6, 5)).astype(np.float32)))
    params = table.memorize(rows, np.asarray(logp))
    trained, hashes = {"logits": params["logits"]}, params["hashes"]

    def draw(key):
        chosen = jax.random.randint(key, (16,), 0, 6)
        batch = {"rows": jnp.asarray(rows)[chosen]}
        return {**batch, "targets": jax.random.categorical(jax.random.fold_in(key, 1), logp[chosen])}

    def logits(p, batch):
        return table.logits({**p, "hashes": hashes}, batch["rows"]), jnp.ones(16)

    def loss(p, batch):
        found = jax.nn.log_softmax(logits(p, batch)[0])
        return -jnp.mean(jnp.take_along_axis(found, batch["targets"][:, None], 1))

    truth = float(jnp.mean(1 - jnp.sum(jnp.exp(2 * logp), -1)))
    assert near(hessian_trace(loss, trained, draw, KEY, draws=500), truth)
    assert near(fisher_trace(logits, trained, draw, KEY, draws=2000), truth)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trace_of_a_transformers_loss_by_some_of_its_parameters(family):
    model, params = tiny_decoder(family, num_layers=1, embed_dim=8, mlp_dim=12, vocab_size=16)
    ids = jnp.arange(10).reshape(2, 5)
    batch = {"inputs": ids, "targets": ids + 1, "loss_weights": jnp.ones((2, 5))}
    loss = objective_loss(CausalLM(model, implementation="reference"))
    path = "blocks/0/mlp/down/kernel"
    found = hessian_trace(loss, params, lambda key: batch, KEY, draws=300, chosen=lambda name: name == path)

    def one(kernel):
        stack = params["blocks"][0]
        changed = {**stack, "mlp": {**stack["mlp"], "down": {**stack["mlp"]["down"], "kernel": kernel}}}
        logp = jax.nn.log_softmax(model.apply({"params": {**params, "blocks": [changed]}}, ids))
        return -jnp.mean(jnp.take_along_axis(logp, batch["targets"][..., None], -1))

    kernel = params["blocks"][0]["mlp"]["down"]["kernel"]
    dense = jax.hessian(one)(kernel).reshape(kernel.size, kernel.size)
    assert near(found, float(jnp.trace(dense)))


def test_the_fused_loss_has_the_same_curvature():
    """Its derivative is computed in its forward pass, and can be differentiated once more."""
    model = Decoder(tiny_config("gpt2", num_layers=1, causal=False))
    params = model.init(KEY)["params"]
    objective = MaskedLM(model, mask_id=63, num_words=60)
    batch = {"inputs": jnp.arange(12).reshape(2, 6), "key": KEY}
    inputs, weights = objective.hide(KEY, batch)
    direction = jax.tree.map(jnp.ones_like, params)

    def plain(p):
        logp = jax.nn.log_softmax(model.apply({"params": p}, inputs))
        return -jnp.sum(weights * jnp.take_along_axis(logp, batch["inputs"][..., None], -1)[..., 0]) / jnp.sum(weights)

    fused = hvp(lambda p: objective_loss(objective)(p, batch), params, direction)
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(hvp(plain, params, direction))):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="probe is 'gausian': did you mean 'gaussian'"):
        hessian_trace(quadratic(jnp.eye(2)), {"x": jnp.ones(2)}, no_batch, KEY, probe="gausian")
    with pytest.raises(ConfigError, match="draws is 1"):
        hessian_trace(quadratic(jnp.eye(2)), {"x": jnp.ones(2)}, no_batch, KEY, draws=1)
