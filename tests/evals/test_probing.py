"""Probes on data whose answer is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import DataError
from jaxlm.data.resident import ResidentRows
from jaxlm.evals import ProbeConfig, fine_tune, linear_probe

RNG = np.random.default_rng(0)
X = RNG.normal(size=(600, 4)).astype(np.float32)
QUICK = ProbeConfig(learning_rate=3e-2, batch_size=100, epochs=30)


def split(x, labels):
    x, labels = jnp.asarray(x), jnp.asarray(labels)
    return x[:400], labels[:400], x[400:], labels[400:]


def test_linear_labels_are_found_and_random_ones_are_not():
    linear = (X @ RNG.normal(size=(4, 3)) + np.array([0.5, 0, -0.5])).argmax(1)
    found = linear_probe(*split(X, linear), 3, QUICK)
    assert found.accuracy > 0.93
    assert found.train_accuracy > 0.93
    nothing = linear_probe(*split(X, RNG.integers(0, 3, 600)), 3, QUICK)
    assert nothing.accuracy < 0.5
    assert found == linear_probe(*split(X, linear), 3, QUICK)


def test_fine_tuning_learns_what_no_linear_layer_can():
    labels = (X[:, 0] * X[:, 1] > 0).astype(np.int32)
    train, test = (ResidentRows({"x": a, "targets": b}) for a, b in zip(split(X, labels)[::2], split(X, labels)[1::2]))
    params = {"w": jnp.asarray(RNG.normal(size=(4, 32)).astype(np.float32))}

    def features(p, batch):
        return jnp.maximum(batch["x"] @ p["w"], 0)

    frozen = linear_probe(*split(X, labels), 2, QUICK).accuracy
    tuned = fine_tune(features, params, train, test, 2, ProbeConfig(1e-2, 0.0, 100, 60)).accuracy
    assert frozen < 0.65
    assert tuned > 0.85


def test_bad_labels_are_refused():
    with pytest.raises(DataError, match="train labels from 0 to 2, expected 0 to 1"):
        linear_probe(*split(X, np.arange(600) % 3), 2, QUICK)
    with pytest.raises(DataError, match="400 rows to train on"):
        linear_probe(*split(X, np.zeros(600, np.int32)), 2, ProbeConfig(batch_size=401))
