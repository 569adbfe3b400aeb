"""Snapshots of a run: those of an unbroken one, also when it was stopped."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.core.keys import fold
from jaxlm.objectives import Classification
from jaxlm.training import init_state, make_step, train_snapshots

OBJECTIVE = Classification(lambda params, batch: batch["inputs"] @ params["w"])
TX = optax.adam(0.1)


def sample(key, step):
    x = jax.random.normal(fold(key, step), (8, 3))
    return {"inputs": x, "targets": (x[:, 0] > 0).astype(jnp.int32)}


def start():
    return init_state({"w": jnp.zeros((3, 2))}, TX, jax.random.key(0))


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    whole = train_snapshots(start(), make_step(OBJECTIVE, TX), sample, (3, 5, 9), folder=tmp_path / "whole")
    assert [s.step for s in whole] == [3, 5, 9]
    assert [len(s.losses) for s in whole] == [3, 2, 4]
    told = []
    first = train_snapshots(start(), make_step(OBJECTIVE, TX), sample, (3, 5), folder=tmp_path / "cut")
    rest = train_snapshots(
        start(), make_step(OBJECTIVE, TX), sample, (3, 5, 9), folder=tmp_path / "cut", report=told.append
    )
    assert [s.step for s in told] == [9]
    for a, b in zip(whole, rest):
        chex.assert_trees_all_equal(a.params, b.params)
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-6)
    chex.assert_trees_all_equal(first[1].params, whole[1].params)

    step, state = jax.jit(make_step(OBJECTIVE, TX)), start()
    for i in range(9):
        state, _ = step(state, None, sample(fold(state.key, "data"), jnp.array(i)))
    chex.assert_trees_all_close(whole[2].params, state.trainable, rtol=1e-5)


def test_steps_must_ascend(tmp_path):
    for at in ((), (0, 1), (3, 3)):
        with pytest.raises(ConfigError, match="expected steps that ascend"):
            train_snapshots(start(), make_step(OBJECTIVE, TX), sample, at, folder=tmp_path)
