"""Steps that went wrong, written down so that they can be looked at again: skipped ones, and spikes of the loss."""

import statistics
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxlm.core.distributed import is_main_process
from jaxlm.core.json_files import write_json
from jaxlm.training.callbacks import Nothing
from jaxlm.training.progress import Progress

WINDOW, WARMUP = 64, 16
LIMIT = 200
_MAD = 1.4826  # standard deviations in a median absolute deviation, of a normal distribution


class Incidents(Nothing):
    """Writes `folder/<step>.json` for each step that was skipped, and for each whose loss is a spike.

    A file says what happened (`kind`), the step's metrics, the bound, and the `batch`: what `provenance(index)` tells
    of the batch with that index (the first step's is 0). At most 200 files are written.

    A spike is a loss above the median of the last 64 by more than `threshold` robust standard deviations (1.4826 times
    the median absolute deviation, but at least a hundredth of the median), once 16 are known. It is only recorded;
    `OptimizerConfig.skip_spikes` leaves such updates out. 0 looks for none.
    """

    def __init__(
        self,
        folder: Path,
        provenance: Callable[[int], Mapping[str, Any]],
        *,
        threshold: float = 6.0,
        progress: Progress | None = None,
    ):
        self.folder, self.provenance, self.threshold, self.progress = folder, provenance, threshold, progress
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def on_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        loss, bound = metrics.get("loss", 0.0), self.bound()
        if metrics.get("skipped"):
            self._record(step, "not finite, skipped", metrics, bound)
            return
        if metrics.get("spike_skipped"):
            self._record(step, "spike of the gradient, skipped", metrics, bound)
        elif bound is not None and loss > bound:
            self._record(step, "spike of the loss", metrics, bound)
        self.losses.append(loss)

    def bound(self) -> float | None:
        """Above which the next loss is a spike; `None` as long as too few are known."""
        if not self.threshold or len(self.losses) < WARMUP:
            return None
        middle = statistics.median(self.losses)
        deviation = _MAD * statistics.median(abs(loss - middle) for loss in self.losses)
        return middle + self.threshold * max(deviation, 0.01 * abs(middle))

    def get_state(self) -> list[float]:
        """JSON for a checkpoint: a resumed run finds the same spikes."""
        return list(self.losses)

    def set_state(self, state: list[float]) -> None:
        self.losses = deque(state, maxlen=WINDOW)

    def _record(self, step: int, kind: str, metrics: Mapping[str, float], bound: float | None) -> None:
        if not is_main_process():
            return
        path = self.folder / f"{step:08d}.json"
        if not path.exists() and self.folder.is_dir() and sum(1 for _ in self.folder.glob("*.json")) >= LIMIT:
            return
        entry = {"step": step, "kind": kind, "bound": bound, "metrics": metrics, "batch": self.provenance(step - 1)}
        try:
            write_json(path, entry)
        except OSError as error:
            warnings.warn(f"cannot write {path}: {error}; training goes on", RuntimeWarning, stacklevel=2)
        if self.progress is not None:
            self.progress.note(f"step {step}: {kind} (loss {metrics.get('loss', 0.0):.4f}); its batch is in {path}")
