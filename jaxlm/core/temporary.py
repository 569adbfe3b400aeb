"""Temporary files and folders beside what they will become, which killed processes do not leave behind for good."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".partial"


@contextlib.contextmanager
def beside(target: Path | str, *, folder: bool = False) -> Iterator[Path]:
    """An empty file (or folder) next to `target`, on its file system; removed at the end unless it was renamed.

    It is locked while it is in use. What killed processes left of the same target is not locked any more, and goes
    when the next one is made, so leftovers never add up. File systems without locks keep them.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}."
    with _lock(target.parent, wait=True) as alone:  # so that nobody takes a new one for a leftover before it is locked
        if alone:
            _sweep(target.parent, prefix)
        if folder:
            path = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=target.parent))
        else:
            handle, name = tempfile.mkstemp(prefix=prefix, suffix=_SUFFIX, dir=target.parent)
            os.close(handle)
            path = Path(name)
        held = contextlib.ExitStack()
        held.enter_context(_lock(path))
    with held:
        try:
            yield path
        finally:
            _remove(path)


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds the lock of a file or folder; whether it could be had."""
    try:
        import fcntl

        handle = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):  # Windows; gone meanwhile, or not readable
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            got = True
        except OSError:  # in use; or a file system without locks
            got = False
        yield got
    finally:
        os.close(handle)


def _sweep(parent: Path, prefix: str) -> None:
    for path in list(parent.iterdir()):
        if path.name.startswith(prefix) and path.name.endswith(_SUFFIX):
            with _lock(path) as unused:
                if unused:
                    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
