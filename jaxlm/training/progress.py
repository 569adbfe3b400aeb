"""What a person watching a run sees: a bar with loss, speed and the time left; plain lines in a file."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text


class Progress:
    """Shows how far a run is. Use as a context manager.

    Args:
      total_steps: length of the run.
      start_step: where this process starts.
      name: what is running, left of the bar.
      every_seconds: where there is no terminal, a line is printed this often, and at the end.
      console: where to show it; standard error by default, so that output can be piped.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        name: str = "train",
        every_seconds: float = 10.0,
        console: Console | None = None,
    ):
        self.total_steps = total_steps
        self.start_step = start_step
        self.name = name
        self.every_seconds = every_seconds
        self.console = console or Console(stderr=True)
        self._step = start_step
        self._first: tuple[int, float] | None = None
        self._printed = self._updated = time.monotonic()
        self._bar: Bar | None = None
        self._task: Any = None
        self._details = ""

    def __enter__(self) -> "Progress":
        self._printed = self._updated = time.monotonic()
        if self.console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[details]}"),
                _TimeLeft(self),
                console=self.console,
                expand=True,
            )
            self._task = self._bar.add_task(self.name, total=self.total_steps, completed=self.start_step, details="")
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()
        elif self._step > self.start_step and self._printed < self._updated:
            self._print_line()

    def update(self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Says that `step` steps are done, with the newest loss (nats per token) and speed."""
        self._step = step
        self._updated = time.monotonic()
        self._first = self._first or (step, self._updated)
        details = []
        if loss is not None:
            details.append(f"loss {float(loss):.4f}")
        if tokens_per_second is not None:
            details.append(f"{float(tokens_per_second):,.0f} tokens/s")
        self._details = "  ".join(details)
        if self._bar:
            self._bar.update(self._task, completed=step, details=self._details)
        elif self._updated - self._printed >= self.every_seconds:
            self._print_line()

    def note(self, message: str) -> None:
        """Prints a line of its own above the bar, such as an evaluation."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """The time left at the speed of this process since its first update, which compiled; None before."""
        if self._first is None or self._step <= self._first[0]:
            return None
        step, at = self._first
        return (self._updated - at) / (self._step - step) * max(0, self.total_steps - self._step)

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        left = f"{time_left(self.seconds_left())} left"
        parts = [f"{self.name} {self._step}/{self.total_steps}", self._details, left]
        self.note("  ".join(part for part in parts if part))


def time_left(seconds: float | None) -> str:
    """Seconds as `"1:02:03"` or `"2:03"`; `"-:--"` while nobody knows."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _TimeLeft(ProgressColumn):
    def __init__(self, progress: Progress):
        super().__init__()
        self._progress = progress

    def render(self, task) -> Text:
        return Text(f"{time_left(self._progress.seconds_left())} left")
