"""The training loop: dispatch a step, then look at the one before; call back; stop cleanly when asked to.

The loop never waits for the step it has just dispatched, so the device always has work. Inside it no array may move
between host and device unasked (`jax.transfer_guard`).
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxlm.core.distributed import SharedStop
from jaxlm.core.errors import ConfigError, NonFiniteError, nearest
from jaxlm.training.state import TrainState
from jaxlm.training.step import Metrics, Step

NON_FINITE = ("stop", "skip")


class Callback(Protocol):
    """What happens along the way: `on_metrics` each step; `at_step` every `every` steps (0: only at the end)."""

    every: int

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of step number `step` (the first is 1), read one step late."""

    def at_step(self, step: int, state: TrainState) -> None:
        """The state after `step` steps. It must not be kept: its buffers are donated to the next step."""


class Interrupted(KeyboardInterrupt):
    """Raised by `fit` after a signal, once the state was handed to the callbacks. `signum` says which signal."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signum, self.step = signum, step


def fit(
    step: Step,
    state: TrainState,
    frozen: Any,
    batches: Iterator[Mapping[str, np.ndarray]],
    *,
    num_steps: int,
    put: Callable[[Mapping[str, np.ndarray]], Mapping[str, jax.Array]] = jax.device_put,
    callbacks: Sequence[Callback] = (),
    on_interrupt: Sequence[Callback] = (),
    non_finite: str = "stop",
    max_skipped: int = 10,
) -> TrainState:
    """Trains until `state.step` is `num_steps` and returns the last state.

    `step` is compiled by the caller (`jax.jit(make_step(...), donate_argnums=0)`), `put` moves a host batch to the
    devices. A step whose loss or gradient is not finite leaves the parameters alone; with `non_finite="stop"` it then
    raises `NonFiniteError` with its number, with `"skip"` it is only counted (metric `skipped`), and the error comes
    after `max_skipped` in a row. The callbacks get the metrics of such steps first. At SIGTERM or SIGINT the callbacks
    in `on_interrupt` get the state after the running step (of several processes, all stop after the same one, soon),
    then `Interrupted` is raised; a second signal acts at once.

    Raises `ConfigError` for another `non_finite`.
    """
    if non_finite not in NON_FINITE:
        raise ConfigError(f"non_finite is '{non_finite}': {nearest(non_finite, NON_FINITE)}")
    number = int(jax.device_get(state.step))
    skipped = 0
    pending: tuple[int, Metrics, float] | None = None
    clock = time.perf_counter()

    def look(item: tuple[int, Metrics, float]) -> None:
        nonlocal clock, skipped
        done, metrics, started = item
        values = {name: float(s) / float(w) if w else 0.0 for name, (s, w) in jax.device_get(dict(metrics)).items()}
        # An objective that counts its loss in something else (pairs) has a metric `tokens`, whose weights add up to 1.
        tokens = values.get("tokens", float(jax.device_get(metrics["loss"][1])) if "loss" in metrics else 0.0)
        now = time.perf_counter()
        # From when the previous step was seen finished, or this one started: whatever lies between is not training.
        seconds = max(now - max(clock, started), 1e-9)
        clock = now
        values |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
        for callback in callbacks:
            callback.on_metrics(done, values)
        skipped = skipped + 1 if values.get("skipped") else 0
        if skipped >= (1 if non_finite == "stop" else max_skipped):
            first = done - skipped + 1
            steps = f"step {done} is" if skipped == 1 else f"steps {first} to {done}, {skipped} in a row, is"
            raise NonFiniteError(
                f"loss or gradient of {steps} not finite (loss {values.get('loss')}, gradient norm "
                f"{values.get('grad_norm')}); parameters are still those of step {first - 1}"
            )

    stop = SharedStop()
    with _Signals() as signals:
        while number < num_steps:
            batch = put(next(batches))
            started = time.perf_counter()
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, frozen, batch)
            number += 1
            if pending is not None:
                look(pending)
            pending = (number, metrics, started)
            due = [c for c in callbacks if (c.every and number % c.every == 0) or number == num_steps]
            signum = stop.poll(number, signals.received)
            if due or signum or number == num_steps:
                look(pending)
                pending = None
            for callback in due:
                callback.at_step(number, state)
            if signum and number < num_steps:
                for callback in on_interrupt:
                    if callback not in due:
                        callback.at_step(number, state)
                raise Interrupted(signum, number)
    return state


class _Signals(contextlib.AbstractContextManager):
    """Notes SIGTERM and SIGINT while it is open (in the main thread); the second one acts as usual."""

    def __init__(self) -> None:
        self.received = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._old[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: Any) -> None:
        self.received = signum
        signal.signal(signum, self._old[signum])

    def __exit__(self, *exc: Any) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)
