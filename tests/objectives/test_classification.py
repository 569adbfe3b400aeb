"""Cross-entropy of labels: values, gradients, cutting into micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.objectives import Classification, StepContext
from jaxlm.training import accumulate, init_state

OBJECTIVE = Classification(lambda params, batch: batch["inputs"] @ params["w"])


def test_loss_is_optaxs_and_exact_under_accumulation():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3)).astype(np.float32))}
    batch = {
        "inputs": jnp.asarray(rng.normal(size=(6, 5, 4)).astype(np.float32)),
        "targets": jnp.asarray(rng.integers(0, 3, (6, 5))),
        "loss_weights": jnp.asarray(rng.integers(0, 2, (6, 5)).astype(np.float32)),
    }

    def direct(p):
        nll = optax.softmax_cross_entropy_with_integer_labels(batch["inputs"] @ p["w"], batch["targets"])
        return jnp.sum(nll * batch["loss_weights"]) / jnp.sum(batch["loss_weights"])

    state = init_state(params, optax.sgd(1.0), jax.random.key(0))
    for pieces in (1, 3):
        found = accumulate(OBJECTIVE, lambda t, f, s: t, state, None, batch, micro_batches=pieces)
        assert found.loss == pytest.approx(float(direct(params)), rel=1e-5)
        np.testing.assert_allclose(found.grads["w"], jax.grad(direct)(params)["w"], rtol=1e-4, atol=1e-6)
        right, weight = found.metrics["accuracy"]
        hits = (np.asarray(batch["inputs"] @ params["w"]).argmax(-1) == batch["targets"]) * batch["loss_weights"]
        assert float(right) == hits.sum()
        assert float(weight) == batch["loss_weights"].sum()


def test_logits_of_another_shape_are_refused():
    batch = {"inputs": jnp.ones((2, 4)), "targets": jnp.zeros((3,), jnp.int32)}
    with pytest.raises(ConfigError, match="logits have shape \\(2, 3\\) for targets of shape \\(3,\\)"):
        OBJECTIVE.loss({"w": jnp.ones((4, 3))}, batch, StepContext(), {"targets": 1.0})
