"""What usually happens along a training run: log, evaluate, checkpoint, profile."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxlm.core.distributed import is_main_process
from jaxlm.training.checkpoints import Checkpoints
from jaxlm.training.hardware import model_flops_utilization
from jaxlm.training.progress import Progress
from jaxlm.training.run_log import RunLog
from jaxlm.training.state import TrainState


class Nothing:
    """A callback that does nothing at the end or along the way; the others override one of the two."""

    every = 0

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def at_step(self, step: int, state: TrainState) -> None:
        pass


@dataclasses.dataclass
class Log(Nothing):
    """Writes each step's metrics to the run log and the progress bar.

    `learning_rate(step)`: the rate that step number `step` used. `flops_per_token`: of training; gives `mfu` on chips
    whose peak is known.
    """

    log: RunLog | None
    """Of the main process; the others have none."""
    progress: Progress | None = None
    learning_rate: Callable[[int], float] | None = None
    flops_per_token: float | None = None

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.log is None or not is_main_process():
            return
        objective = {f"train/{k}": v for k, v in metrics.items() if k not in _SYSTEM}
        system = {k: metrics[k] for k in _SYSTEM if k in metrics}
        if self.learning_rate is not None:
            system["learning_rate"] = float(self.learning_rate(step - 1))
        if self.flops_per_token is not None:
            devices = jax.devices()
            speed = metrics["tokens_per_second"]
            mfu = model_flops_utilization(speed, self.flops_per_token, devices[0].device_kind, len(devices))
            system |= {} if mfu is None else {"mfu": mfu}
        self.log.log(step, objective | system)
        if self.progress is not None:
            self.progress.update(step, loss=metrics.get("loss"), tokens_per_second=metrics["tokens_per_second"])


_SYSTEM = ("grad_norm", "skipped", "spike_skipped", "tokens", "seconds", "tokens_per_second")


@dataclasses.dataclass
class Evaluate(Nothing):
    """Calls `evaluate(state.trainable) -> {name: value}` and logs what it returns."""

    evaluate: Callable[[Any], Mapping[str, float]]
    log: RunLog | None
    """Of the main process; the others have none."""
    every: int = 0
    progress: Progress | None = None
    latest: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def at_step(self, step: int, state: TrainState) -> None:
        self.latest = dict(self.evaluate(state.trainable))
        if self.log is None or not is_main_process():
            return
        self.log.log(step, self.latest)
        if self.progress is not None:
            shown = [name for name in self.latest if "bits" in name] or [n for n in self.latest if n.endswith("loss")]
            if shown:
                values = "  ".join(f"{name} {self.latest[name]:.4f}" for name in shown)
                self.progress.note(f"step {step}: {values}")


@dataclasses.dataclass
class Save(Nothing):
    """Saves a checkpoint. `meta(step)` is what goes in beside the state: data iterator, configuration."""

    checkpoints: Checkpoints
    meta: Callable[[int], Mapping[str, Any]]
    every: int = 0

    def at_step(self, step: int, state: TrainState) -> None:
        self.checkpoints.save(step, state, self.meta(step))


@dataclasses.dataclass
class Profile(Nothing):
    """Writes a trace of `steps` steps, from after step `first` on, for TensorBoard or Perfetto."""

    folder: Path
    first: int
    steps: int
    running: bool = False

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self.running and step == self.first:
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        elif self.running and step >= self.first + self.steps:
            self._stop()

    def at_step(self, step: int, state: TrainState) -> None:
        if self.running:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self.running = False
