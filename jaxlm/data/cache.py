"""Where derived files are kept, written so that a killed process leaves nothing half done."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxlm.core.temporary import beside


def cache_folder(folder: str | Path | None = None) -> Path:
    """The folder for tokenizers and stores: `folder`, else `$JAXLM_CACHE`, else `~/.cache/jaxlm`."""
    if folder is not None:
        return Path(folder)
    return Path(os.environ.get("JAXLM_CACHE") or Path.home() / ".cache" / "jaxlm")


@contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends without an exception.

    The files are flushed to disk before the rename, so `target` either is absent or is whole. When another
    process made `target` meanwhile, theirs stays and ours is dropped.
    """
    target = Path(target)
    with beside(target, folder=True) as temporary:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
