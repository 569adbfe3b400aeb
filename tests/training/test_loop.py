import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import ConfigError, NonFiniteError
from jaxlm.objectives import Aux
from jaxlm.training import Interrupted, fit, init_state, make_step


class Mean:
    """The mean of the batch, drawn towards the parameter."""

    def totals(self, params, batch, ctx):
        return {"rows": jnp.asarray(batch["x"].shape[0], jnp.float32)}

    def loss(self, params, batch, ctx, totals):
        error = jnp.sum(jnp.square(batch["x"] - params["m"]))
        rows = jnp.asarray(batch["x"].shape[0], jnp.float32)
        return error / totals["rows"], Aux({"loss": (error, rows)})


class Recorder:
    def __init__(self, every):
        self.every, self.metrics, self.states = every, [], []

    def on_metrics(self, step, metrics):
        self.metrics.append((step, metrics))

    def at_step(self, step, state):
        self.states.append((step, int(jax.device_get(state.step))))


def run(num_steps, batches, **options):
    tx = optax.sgd(0.1)
    state = init_state({"m": jnp.zeros(())}, tx, jax.random.key(0))
    step = jax.jit(make_step(Mean(), tx), donate_argnums=0)
    return fit(step, state, None, iter(batches), num_steps=num_steps, **options)


def batches(count, bad=None):
    rng = np.random.default_rng(0)
    out = [{"x": rng.normal(size=(4,)).astype(np.float32)} for _ in range(count)]
    if bad is not None:
        out[bad]["x"][0] = np.nan
    return out


def test_every_step_is_reported_once_in_order_and_callbacks_see_their_steps():
    recorder = Recorder(every=3)
    state = run(8, batches(8), callbacks=[recorder])
    assert [step for step, _ in recorder.metrics] == list(range(1, 9))
    assert recorder.states == [(3, 3), (6, 6), (8, 8)]
    assert int(state.step) == 8
    m = 0.0
    for (_, metrics), batch in zip(recorder.metrics, batches(8), strict=True):
        assert metrics["loss"] == pytest.approx(float(np.mean((batch["x"] - m) ** 2)), rel=1e-5)
        m -= 0.1 * float(np.mean(2 * (m - batch["x"])))


def test_a_non_finite_step_stops_the_run_by_its_number():
    with pytest.raises(NonFiniteError, match="step 3 is not finite.*still those of step 2"):
        run(8, batches(8, bad=2))


def test_or_is_skipped_and_counted():
    recorder = Recorder(every=0)
    state = run(8, batches(8, bad=2), callbacks=[recorder], non_finite="skip")
    assert [m["skipped"] for _, m in recorder.metrics] == [0, 0, 1, 0, 0, 0, 0, 0]
    assert bool(jnp.isfinite(state.trainable["m"]))


def test_another_policy_is_refused_before_the_first_step():
    with pytest.raises(ConfigError, match="non_finite is 'skp': did you mean 'skip'"):
        run(8, [], non_finite="skp")


def test_many_in_a_row_stop_the_run_all_the_same():
    found = batches(20)
    for i in (2, 3, 5, 6, 7, 9):
        found[i]["x"][0] = np.nan
    recorder = Recorder(every=0)
    with pytest.raises(NonFiniteError, match="steps 6 to 8, 3 in a row.*still those of step 5"):
        run(20, found, callbacks=[recorder], non_finite="skip", max_skipped=3)
    assert [m["skipped"] for _, m in recorder.metrics] == [0, 0, 1, 1, 0, 1, 1, 1]  # the callbacks saw the last one too
    run(20, found, non_finite="skip", max_skipped=4)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_finish_and_saves_first(signum):
    class Killer(Recorder):
        def on_metrics(self, step, metrics):
            super().on_metrics(step, metrics)
            if step == 3:
                os.kill(os.getpid(), signum)

    saver, killer = Recorder(every=100), Killer(every=0)
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as stopped:
        run(50, batches(50), callbacks=[killer], on_interrupt=[saver])
    # The signal came while step 4 was running; its metrics are not lost either.
    assert saver.states == [(4, 4)]
    assert killer.metrics[-1][0] == 4
    assert (stopped.value.signum, stopped.value.step) == (signum, 4)
    assert signal.getsignal(signum) == before


def test_the_loop_refuses_unasked_transfers():
    from jaxlm.training.loop import fit as loop

    def step(state, frozen, batch):
        return state, {"loss": (jnp.sum(batch["x"]) + np.ones(3).sum(), jnp.ones(()))}

    state = init_state({"m": jnp.zeros(())}, optax.sgd(0.1), jax.random.key(0))
    compiled = jax.jit(step)
    with pytest.raises(Exception, match="[Dd]isallowed host-to-device"):
        loop(compiled, state, None, iter(batches(2)), num_steps=1, put=lambda b: b)
