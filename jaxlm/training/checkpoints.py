"""Checkpoints: saved in the background, whole or not at all, restored onto any mesh, checked before they are trusted.

A checkpoint is an Orbax folder with two items: `state` (arrays) and `meta` (JSON: configuration, data iterator). Orbax
writes to a temporary folder and renames it, so a killed save leaves nothing that looks like a checkpoint. It does not
notice a flipped bit inside array data, so after each save the CRC-32 of every file is recorded beside it (a process
that is killed in between leaves a whole checkpoint that Orbax alone checks).
"""

import contextlib
import json
import logging
import os
import shutil
import threading
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.core import distributed
from jaxlm.core.errors import CheckpointError, DataError
from jaxlm.core.json_files import read_object, write_text

PyTree = Any


class Restored(NamedTuple):
    """A checkpoint's content."""

    step: int
    state: PyTree
    meta: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run, in `folder`.

    `keep` newest are kept. Saving returns as soon as the arrays are copied; writing goes on in the background. An
    error while saving (a full disk) is a warning: training goes on and the last good checkpoint stays; `failures`
    counts them and `problem` is the last. `sums=False` leaves out the check sums, for states of many gigabytes on slow
    disks.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 3, sums: bool = True):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sums = sums
        self._pending: threading.Thread | None = None
        self._options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=self._options)
        self._broken = False
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self.failures, self.problem = 0, ""

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, ascending."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    def tidy(self, step: int | str = "*") -> None:
        """Removes what saves (of `step`) that were killed or failed left half written. None may be in progress."""
        for partial in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(partial, ignore_errors=True)
        for partial in self.folder.glob(f"sums/.{step}.json.*"):
            partial.unlink(missing_ok=True)

    def save(self, step: int, state: PyTree, meta: Mapping[str, Any]) -> bool:
        """Starts to save; returns whether it could. `meta` must be JSON."""
        args = self._ocp.args
        self.wait()
        if self._broken:
            # Orbax's manager raises the error of a failed save again at every later one.
            self._close_manager()
            self._manager, self._broken = self._ocp.CheckpointManager(self.folder, options=self._options), False
        if step in self._manager.all_steps():
            return True
        try:
            self._sums_file(step).unlink(missing_ok=True)
            items = args.Composite(state=args.StandardSave(state), meta=args.JsonSave(dict(meta)))
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            self._failed(step, error)
            return False
        self._pending = threading.Thread(target=self._finish, args=(step,), daemon=True)
        self._pending.start()
        return True

    def wait(self) -> None:
        """Waits until what is being saved is on disk."""
        if self._pending is not None:
            self._pending.join()
            self._pending = None

    def close(self) -> None:
        self.wait()
        self._close_manager()

    def restore(self, abstract: PyTree, step: int | None = None) -> Restored | None:
        """The newest good checkpoint (or that of `step`), or `None` if there is none.

        `abstract` is a tree of `jax.ShapeDtypeStruct` whose shardings say where the arrays go, whatever mesh they
        were saved from. A damaged checkpoint is left where it is, reported by a warning, and the next older one is
        taken; if all are damaged, `CheckpointError`.
        """
        candidates = distributed.from_main(self.steps)[::-1] if step is None else [step]
        problems = []
        for candidate in candidates:
            problem = None
            try:
                self._agree_that_good(candidate)
                args = self._ocp.args
                items = args.Composite(state=args.StandardRestore(abstract), meta=args.JsonRestore())
                restored = self._manager.restore(candidate, args=items)
            except Exception as error:
                problem = _first_line(error)
            # All processes take the same checkpoint: one that any of them cannot read is no good.
            problem = next(filter(None, distributed.on_every_process(problem)), None)
            if problem is None:
                return Restored(candidate, restored.state, restored.meta)
            problems.append(f"step {candidate}: {problem}")
            if step is None:
                warnings.warn(
                    f"checkpoint {self.folder / str(candidate)} cannot be used ({problem}); trying an older one",
                    stacklevel=2,
                )
        if problems:
            raise CheckpointError(f"no usable checkpoint in {self.folder}: {'; '.join(problems)}")
        return None

    def discard_after(self, step: int) -> None:
        """Moves checkpoints newer than `step` aside (to `damaged-<step>`), so that the run can write them again."""
        distributed.from_main(lambda: self._move_after(step))
        self._manager.reload()

    def _move_after(self, step: int) -> None:
        for newer in [s for s in self.steps() if s > step]:
            source, target = self.folder / str(newer), self.folder / f"damaged-{newer}"
            serial = 0
            while target.exists():
                serial += 1
                target = self.folder / f"damaged-{newer}-{serial}"
            source.rename(target)
            self._sums_file(newer).unlink(missing_ok=True)

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(step, error)
            return
        try:
            if self._sums and distributed.is_main_process():
                self._write_sums(step)
        except OSError as error:
            warnings.warn(f"no check sums for the checkpoint of step {step}: {error}", stacklevel=2)

    def _close_manager(self) -> None:
        with contextlib.suppress(Exception) if self._broken else contextlib.nullcontext():
            self._manager.close()

    def _failed(self, step: int, error: Exception) -> None:
        self.failures, self.problem, self._broken = self.failures + 1, _first_line(error), True
        self.tidy(step)  # where the disk is full, what was half written is in the way
        good = [s for s in self._manager.all_steps() if (self.folder / str(s)).exists()]
        warnings.warn(
            f"checkpoint of step {step} could not be saved: {_first_line(error)}; training goes on, the last good "
            f"checkpoint is that of step {max(good) if good else 'none'}",
            stacklevel=3,
        )

    def _sums_file(self, step: int) -> Path:
        return self.folder / "sums" / f"{step}.json"

    def _write_sums(self, step: int) -> None:
        path = self._sums_file(step)
        # Without white space, in which a flipped bit would mean nothing.
        write_text(path, json.dumps(_file_sums(self.folder / str(step)), separators=(",", ":")))
        for old in path.parent.glob("*.json"):
            if not (self.folder / old.stem).exists():
                old.unlink(missing_ok=True)

    def _agree_that_good(self, step: int) -> None:
        """`_verify` by the main process for all: they read the same files, and must take the same checkpoint."""

        def problem() -> str | None:
            try:
                self._verify(step)
            except CheckpointError as error:
                return str(error)

        if found := distributed.from_main(problem):
            raise CheckpointError(found)

    def _verify(self, step: int) -> None:
        if not (self.folder / str(step)).is_dir():
            raise CheckpointError(f"there is no checkpoint of step {step} in {self.folder}: found {self.steps()}")
        if self._sums:
            _check_sums(self.folder, step)


def load_meta(folder: str | os.PathLike, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """Step and `meta` of the newest (or given) checkpoint in `folder` whose `meta` is good, without reading arrays."""
    folder = Path(folder)
    found = _steps_in(folder)
    if not found or (step is not None and step not in found):
        raise _no_checkpoint(folder, step, found)
    problems = []
    for candidate in found[::-1] if step is None else [step]:
        try:
            _check_sums(folder, candidate, "meta/")
            return candidate, read_object(folder / str(candidate) / "meta" / "metadata")
        except (CheckpointError, DataError, OSError) as error:
            problems.append(f"step {candidate}: {_first_line(error)}")
            warnings.warn(
                f"checkpoint of step {candidate} in {folder} cannot be used: {_first_line(error)}", stacklevel=2
            )
    raise CheckpointError(f"no usable checkpoint in {folder}: {'; '.join(problems)}")


def load_params(folder: str | os.PathLike, abstract: PyTree, step: int | None = None) -> tuple[int, PyTree]:
    """Step and parameters (`state.trainable`) of the newest good checkpoint, without the optimizer's state.

    `abstract`: a tree of `jax.ShapeDtypeStruct` with shardings, as for `Checkpoints.restore`.
    """
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_not_from_orbax)
    folder = Path(folder).absolute()
    found = _steps_in(folder)
    if not found or (step is not None and step not in found):
        raise _no_checkpoint(folder, step, found)
    problems = []
    for candidate in found[::-1] if step is None else [step]:
        try:
            _check_sums(folder, candidate)
            handler = ocp.PyTreeCheckpointHandler()
            item = {"trainable": abstract}
            restore_args = ocp.checkpoint_utils.construct_restore_args(item)
            args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
            with ocp.Checkpointer(handler) as reader:
                restored = reader.restore(folder / str(candidate) / "state", args=args)
            return candidate, restored["trainable"]
        except Exception as error:
            problems.append(f"step {candidate}: {_first_line(error)}")
            warnings.warn(
                f"checkpoint of step {candidate} in {folder} cannot be used: {_first_line(error)}", stacklevel=2
            )
    raise CheckpointError(f"no usable checkpoint in {folder}: {'; '.join(problems)}")


def _steps_in(folder: Path) -> list[int]:
    """The steps of which there is a checkpoint, ascending; the folder is not made."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.is_dir() else []


def _no_checkpoint(folder: Path, step: int | None, found: list[int]) -> CheckpointError:
    return CheckpointError(f"no checkpoint{'' if step is None else f' of step {step}'} in {folder}: found {found}")


def _check_sums(folder: Path, step: int, below: str = "") -> None:
    """Raises `CheckpointError` unless the files of a checkpoint (under `below`) are those that were saved."""
    path, checkpoint = folder / "sums" / f"{step}.json", folder / str(step)
    if not path.exists():
        return
    try:
        expected = read_object(path)
    except DataError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    expected = {name: sums for name, sums in expected.items() if name.startswith(below)}
    found = _file_sums(checkpoint, below)
    for name in sorted(expected):
        if name not in found:
            raise CheckpointError(f"{checkpoint / name} is missing")
        if expected[name] != found[name]:
            raise CheckpointError(
                f"{checkpoint / name} is damaged: size and CRC-32 {found[name]}, saved {expected[name]}"
            )


def _file_sums(folder: Path, below: str = "") -> dict[str, list[int]]:
    sums = {}
    for path in sorted(p for p in (folder / below).rglob("*") if p.is_file()):
        value, size = 0, 0
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                value, size = zlib.crc32(chunk, value), size + len(chunk)
        sums[str(path.relative_to(folder))] = [size, value]
    return sums


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """A filter: of a failed save Orbax logs the same traceback many times; the warning of `Checkpoints` is enough."""
    return "orbax" not in record.pathname


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line if len(line) <= 300 else f"{line[:120]} ... {line[-170:]}"  # the cause comes last
