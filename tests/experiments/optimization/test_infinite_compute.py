import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import runner
from experiments.optimization import infinite_compute
from experiments.optimization.infinite_compute_report import Laws, best_by, report
from experiments.optimization.infinite_compute_runs import OPTIMIZER, SWEPT, Lab, Results, Tuned
from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.core.keys import fold
from jaxlm.evals.scaling import PowerLaw
from jaxlm.models import Decoder
from jaxlm.optim.roles import label
from jaxlm.testing import tiny_config

CONFIG = infinite_compute.PRESETS["small"]
SMOKE = infinite_compute.PRESETS["smoke"]


def test_smoke(tmp_path, capsys):
    out = tmp_path / "run"
    assert runner.execute(infinite_compute, ["--preset", "smoke", "--out", str(out)]) == 0
    found = json.loads((out / "report.json").read_text())
    assert len(found["claims"]) == 12
    assert len(found["figures"]) == 5
    assert [len(t["rows"]) for t in found["tables"]][:2] == [6, 3]
    assert "student ensemble" in capsys.readouterr().out
    assert runner.execute(infinite_compute, ["--preset", "smoke", "--out", str(out)]) == 0
    assert "seed 1: tuning" not in capsys.readouterr().out  # what is finished is not repeated


def test_one_epoch_without_decay_is_the_plain_trainer(tmp_path):
    lab = Lab(dataclasses.replace(SMOKE, seeds=(5, 6, 7)), tmp_path)
    point = {"epochs": 1, "learning_rate": 1e-2, "weight_decay": 0.0}
    (outcome,) = lab.members(0, point, [5])
    model, corpus = lab.model(0), lab.corpus(1.0)
    params = model.init(jax.random.key(5))["params"]
    steps = corpus.count // SMOKE.batch_size
    adam = optax.adam(optax.cosine_decay_schedule(1e-2, steps), b1=0.9, b2=0.95)
    tx = optax.chain(optax.clip_by_global_norm(1.0), adam)
    state, seen = tx.init(params), []
    order = jax.random.permutation(fold(fold(jax.random.key(5), "data"), "epoch", 0), corpus.count)

    @jax.jit
    @jax.value_and_grad
    def differentiate(params, batch):
        logits = model.apply({"params": params}, batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    for rows in order.reshape(steps, SMOKE.batch_size):
        value, grads = differentiate(params, corpus.take(rows))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(float(value))
    np.testing.assert_allclose(outcome.history["loss"], seen, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), outcome.params, params)


def test_decay_is_multiplied_by_the_scheduled_rate_and_spares_vectors():
    model = Decoder(tiny_config("llama", num_layers=1))
    params = jax.tree.map(jnp.ones_like, model.init(jax.random.key(0))["params"])
    tx = OPTIMIZER.make(10, model.axes(), sweep=SWEPT)
    zeros, state, shrunk = jax.tree.map(jnp.zeros_like, params), tx.init(params), params
    hparams = {"learning_rate": jnp.float32(1e-2), "weight_decay": jnp.float32(25.6)}
    for step in range(10):
        updates, state = tx.update(zeros, state, shrunk, step=jnp.int32(step), hparams=hparams)
        shrunk = optax.apply_updates(shrunk, updates)
    left = np.prod([1 - 25.6 * 1e-2 * float(OPTIMIZER.schedule(10, 1.0)(step)) for step in range(10)])
    roles = dict(trees.named_leaves(label(params, model.axes())))
    for path, leaf in trees.named_leaves(shrunk):
        np.testing.assert_allclose(leaf, 1.0 if roles[path] == "vector" else left, rtol=1e-4)


def test_budgets_are_nested_and_mixtures_have_their_share(tmp_path):
    lab = Lab(SMOKE, tmp_path)
    small, whole = (np.asarray(lab.corpus(share).arrays["inputs"]) for share in (0.5, 1.0))
    assert (len(small), len(whole)) == (4, 8)
    np.testing.assert_array_equal(small, whole[:4])
    assert (whole[:, 0] == 256).all()
    assert lab.tokens(2.0) == 256
    assert (CONFIG.real_rows, SMOKE.real_rows) == (2, 1)


def tuned(decay, points=()):
    point = {"epochs": 16, "learning_rate": 3e-3, "weight_decay": decay}
    return Tuned(point, [(point, 2.0, 2.0), *points], [], True, [(point, 0.01)])


@pytest.fixture
def results():
    """Results of which every claim holds."""
    params = [7_000, 20_000, 60_000, 220_000]
    single = PowerLaw(100.0, 0.6, 2.0).loss(params)
    limits = PowerLaw(100.0, 0.6, 1.8).loss(params)
    counts = np.arange(1, 5)
    ensembles = [(limit + (loss - limit) / counts).tolist() for limit, loss in zip(limits, single)]
    overfits = [({"epochs": e, "learning_rate": 3e-3, "weight_decay": 0.1}, x, x) for e, x in ((8, 2.7), (32, 3.3))]
    tokens = np.array([4096, 8192, 16384, 32768])
    budgets = list(zip(tokens.tolist(), PowerLaw(20.0, 0.3, 1.5).loss(tokens).tolist()))
    return Results(
        params,
        [tuned(0.1, overfits[:1] + [(overfits[1][0], 2.9 + 0.1 * i, 2.9 - 0.1 * i)]) for i in range(3)]
        + [tuned(0.1, overfits)],
        [tuned(decay) for decay in (0.4, 1.6, 1.6, 6.4)],
        {(name, i): [float(single[i]) + more] * 2 for i in range(4) for name, more in (("regularized", 0.0),
                                                                                     ("standard", 0.2))},
        ensembles,
        ensembles[2][-1] + 0.01,
        [loss - 0.01 for loss in ensembles[2]],
        budgets,
        {"ensemble": [float(single[2]) - 0.02] * 2, "single": [float(single[2])] * 2},
        16384,
    )  # fmt: skip


def test_claims_that_hold(results):
    assert [c.holds for c in infinite_compute.claims(CONFIG, results)] == [True] * 12


def spoiled(results, claim):
    """Results of which this claim does not hold."""
    match claim:
        case 0:
            standard = [*results.standard[:-1], tuned(0.1, [({**tuned(0.1).point, "epochs": 32}, 2.0, 2.01)])]
            return results._replace(standard=standard)
        case 1:
            return results._replace(standard=results.standard[-1:] * 4)
        case 2:
            return results._replace(single={**results.single, ("regularized", 3): results.single["regularized", 2]})
        case 3:
            return results._replace(regularized=[tuned(decay) for decay in (0.1, 1.6, 1.6, 6.4)])
        case 4:
            return results._replace(single={**results.single, ("standard", 1): results.single["regularized", 1]})
        case 5:
            return results._replace(ensembles=[*results.ensembles[:-1], results.ensembles[-1][:2] * 2])
        case 6:
            worse = [2.6, 2.55, 2.545, 2.544]
            return results._replace(ensembles=[*results.ensembles[:2], worse, results.ensembles[3]])
        case 7:
            return results._replace(ensembles=[*results.ensembles[:2], [2.6, 2.5, 2.4, 2.3], results.ensembles[3]])
        case 8:
            return results._replace(overfit=results.ensembles[2])
        case 9:
            return results._replace(students={**results.students, "ensemble": results.single["regularized", 2]})
        case 10:
            return results._replace(students={**results.students, "single": [3.0, 3.0]})
        case _:
            flat = [(tokens, loss - 1.0) for tokens, loss in results.budgets]
            return results._replace(budgets=flat)


@pytest.mark.parametrize("claim", range(12))
def test_claims_that_do_not_hold_are_seen(results, claim):
    assert not infinite_compute.claims(CONFIG, spoiled(results, claim))[claim].holds


def test_laws_that_were_planted_are_reported(results):
    laws = Laws(CONFIG, results)
    assert laws.size.asymptote == pytest.approx(2.0, rel=1e-3)
    assert laws.joint.asymptote == pytest.approx(1.8, rel=1e-3)
    found = {table.title: table for table in report(CONFIG, results, []).tables}
    at_64 = {name: times for name, _, times in found["At width 64"].rows}
    loss = results.ensembles[2][-1]
    assert at_64["ensemble of 4"] == pytest.approx((20.0 / (loss - 1.5)) ** (1 / 0.3) / 16384, rel=0.01)
    assert found["Laws"].rows[0][4] == pytest.approx(2.0, rel=0.01)


def test_the_best_trial_by_tuning_is_shown_by_its_judged_loss():
    trials = [({"epochs": 8}, 2.0, 2.5), ({"epochs": 8}, 1.9, 2.6), ({"epochs": 4}, 3.0, 3.0)]
    assert best_by(tuned(0.1)._replace(trials=trials), "epochs") == {4: 3.0, 8: 2.6}


def test_configurations_that_cannot_work_are_refused():
    for changes, said in (
        ({"rows": 0}, "rows is 0"),
        ({"widths": (16, 32)}, "three or more that increase"),
        ({"widths": (16, 32, 40)}, "width 40: expected a multiple of 16"),
        ({"at": 4}, "at is 4, expected 0 to 3"),
        ({"epochs": (8, 4)}, "epochs are"),
        ({"standard_decay": 0.3}, "standard_decay is 0.3, expected one of the decays"),
        ({"budgets": (0.5,)}, "budgets are"),
        ({"budgets": (0.01, 0.5)}, "is less than a batch of 8"),
        ({"synthetic": 0.99}, "then has 0 rows of the corpus"),
        ({"seeds": (1, 2)}, "three or more"),
        ({"seeds": (0, 1, 2)}, "none of them 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            dataclasses.replace(CONFIG, **changes)
