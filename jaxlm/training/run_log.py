"""The record of a run: `metrics.jsonl`, one line a step, and TensorBoard events beside it.

The file is only ever appended to, a whole line at a time, straight to the operating system: a killed process
loses nothing it logged. `jaxlm.reporting.run_folder.read_metrics` reads it back. Logging never stops
training: when the disk is full it says so once, and goes on when there is room again.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.core.errors import ConfigError
from jaxlm.core.json_files import dumps, number


class RunLog:
    """Appends measurements to a run folder.

    Args:
      folder: the run folder; made if it is not there.
      start_step: the first step that this process will log. On a folder that already has a log, the first
        line carries it as `resumed_at`: what was logged from that step on belongs to an abandoned attempt.
      tensorboard: whether to write TensorBoard events, under `folder/tensorboard`.

    Attributes:
      torn_lines: 1 if the last line of an earlier process was cut off by a kill; it was removed.
      lost_lines: lines that could not be written because the disk was full or failing.
    """

    def __init__(self, folder: Path | str, *, start_step: int = 0, tensorboard: bool = True):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.torn_lines = 0
        self.lost_lines = 0
        self._warned = False
        self._file = os.open(self.folder / "metrics.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._resumed_at = start_step if self._drop_torn_line() else None
        self._events = _Events(self.folder / "tensorboard", self._resumed_at) if tensorboard else None

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records `metrics` (numbers or scalar arrays, by name) at `step`.

        Several calls with one step are one row. Names are paths: `train/loss`, `tokens_per_second`,
        `eval/<source>/bits_per_byte`.

        Raises:
          ConfigError: a value is not a number.
        """
        values = {name: number(value) for name, value in metrics.items()}
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"metric '{name}' at step {step} is {value!r}, expected a number")
        row = {"step": int(step), **values}
        if self._resumed_at is not None:
            row["resumed_at"] = self._resumed_at
        if self._append((dumps(row) + "\n").encode()):
            self._resumed_at = None
        if self._events:
            try:
                self._events.add(int(step), values)
            except OSError as error:  # an event file that broke off cannot be continued
                self._warn(f"no more TensorBoard events: {error}; training goes on")
                self._events.abandon()
                self._events = None

    def close(self) -> None:
        """Writes out buffered TensorBoard events and closes the files; the log itself is never behind."""
        os.close(self._file)
        if self._events:
            try:
                self._events.close()
            except OSError as error:
                self._warn(f"the last TensorBoard events are lost: {error}")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _append(self, line: bytes) -> bool:
        """Appends a whole line or nothing."""
        end = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes fit")
        except OSError as error:
            self.lost_lines += 1
            self._warn(f"cannot write {self.folder / 'metrics.jsonl'}: {error}; training goes on")
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, end)
            return False
        return True

    def _drop_torn_line(self) -> bool:
        """Cuts off a last line without its end. True if there are lines before it."""
        size = os.fstat(self._file).st_size
        end, block = size, 1 << 16
        while end > 0:
            start = max(0, end - block)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            self.torn_lines = 1
            os.ftruncate(self._file, end)
        return end > 0

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, RuntimeWarning, stacklevel=3)


class _Events:
    """A TensorBoard event file, written in this thread.

    `tensorboardX.SummaryWriter` writes in a thread of its own, which dies on the first error, and then
    whoever logs waits forever for its full queue; so its parts are used here.
    """

    FLUSH_SECONDS = 20

    def __init__(self, folder: Path, resumed_at: int | None):
        self._folder = folder
        self._resumed_at = resumed_at
        self._writer = None
        self._flushed = time.monotonic()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if self._writer is None:
            self._open()
        pairs = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        summary = Summary(value=pairs)
        self._write(Event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.flush()
            self._writer.close()

    def abandon(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()

    def _open(self) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in order of their names, and the clock may have been set back.
        prefix = "events.out.tfevents."
        earlier = [path.name.removeprefix(prefix).split(".")[0] for path in self._folder.glob(f"{prefix}*")]
        number = max([time.time_ns() // 1000, *(int(name) + 1 for name in earlier if name.isdigit())])
        self._writer = RecordWriter(str(self._folder / f"{prefix}{number}.{os.getpid()}"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if self._resumed_at is not None:  # TensorBoard then drops later steps of the files before
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=self._resumed_at, session_log=start))

    def _write(self, event) -> None:
        self._writer.write(event.SerializeToString())
