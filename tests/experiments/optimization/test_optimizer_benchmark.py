import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import runner
from experiments.bases import ArmResult
from experiments.optimization import optimizer_benchmark as study
from jaxlm.core.errors import ConfigError
from jaxlm.training import init_state


def test_smoke(tmp_path):
    assert runner.execute(study, ["--preset", "smoke", "--out", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {row[0] for row in report["tables"][0]["rows"]} == {"adamw", "lion", "schedule_free"}


@pytest.mark.parametrize("name", [name for name, arm in study.ARMS.items() if isinstance(arm.optimizer, study.Outside)])
def test_optax_optimizers_descend_at_the_swept_rate(name):
    optimizer = study.ARMS[name].optimizer
    tx = optax.with_extra_args_support(optimizer.make(100, None))
    target = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(40, 64)), jnp.float32)}

    def loss(w):
        return 0.5 * jnp.sum((w["w"] - target["w"]) ** 2)

    @jax.jit
    def step(state, rate):
        updates, opt_state = tx.update(
            jax.grad(loss)(state.trainable), state.opt_state, state.trainable, step=state.step,
            loss_fn=loss, hparams={"learning_rate": rate}, key=jax.random.key(0),
        )  # fmt: skip
        trainable = optax.apply_updates(state.trainable, updates)
        return type(state)(state.step + 1, trainable, opt_state, None, state.key, state.hparams)

    def trained(rate):
        state = init_state(jax.tree.map(jnp.zeros_like, target), tx, jax.random.key(0))
        for _ in range(60):
            state = step(state, jnp.float32(rate))
        return state if optimizer.view is None else type(state)(**{**vars(state), "trainable": optimizer.view(state)})

    start = loss(jax.tree.map(jnp.zeros_like, target))
    assert loss(trained(0.05).trainable) < 0.5 * start
    np.testing.assert_array_equal(trained(0.0).trainable["w"], 0)


def test_the_table_is_ordered_and_counts_state():
    results = {name: ArmResult({}, 1.0, (loss,), (loss,) * 20, 0.1, None) for name, loss in
               (("adamw", 3.0), ("scale", 2.5), ("adafactor", 3.5))}  # fmt: skip
    rows = study.report(study.SMALL, results).tables[0].rows
    assert [row[0] for row in rows] == ["scale", "adamw", "adafactor"]
    state = {row[0]: row[4] for row in rows}
    assert state["adamw"] == pytest.approx(8, rel=1e-3)
    assert state["scale"] < 3
    assert state["adafactor"] < 1


def test_unknown_arms_and_too_small_models_are_refused():
    with pytest.raises(ConfigError, match="no arm 'adam'"):
        study.Config(study.SMALL.model, study.SMALL.data, arms=("adam",))
    narrow = dataclasses.replace(study.SMALL.model, embed_dim=16)
    with pytest.raises(ConfigError, match="arm 'galore' has rank 24, model.embed_dim is 16"):
        study.Config(narrow, study.SMALL.data, arms=("adamw", "galore"))
    assert study.Config(narrow, study.SMALL.data, arms=("adamw",)).arms == ("adamw",)
