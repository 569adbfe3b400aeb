"""What a target of fuzzing is, and where its valid files lie."""

import atexit
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


@dataclasses.dataclass(frozen=True)
class Target:
    """`read(input, folder)`: `folder` is the target's own, kept from input to input. `cost`: milliseconds an input."""

    inputs: Callable[[], st.SearchStrategy[Any]]
    read: Callable[[Any, Path], Any]
    cost: int = 1


def put(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@functools.cache
def home() -> Path:
    """A folder with valid files of every kind, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="jaxlm-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
