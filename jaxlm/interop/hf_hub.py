"""Where a Hugging Face model lies: a folder, or a name in the local cache, downloaded into it where that is possible.

The cache's layout (`models--org--name/refs/main`, `snapshots/<commit>/`) and variables (`HF_HUB_CACHE`, `HF_HOME`,
`HF_HUB_OFFLINE`) are those of the `huggingface_hub` documentation; the package is not needed to read it.
"""

import os
import re
from pathlib import Path

from jaxlm.core.errors import CheckpointError
from jaxlm.core.json_files import read_text

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(path: str | Path, revision: str = "main") -> Path:
    """The folder of a model.

    Raises `CheckpointError` when there is no such folder, and no model of that name in the cache or to be downloaded.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file, expected a folder with config.json and safetensors")
    name = str(path)
    if not is_hub_name(name):
        raise CheckpointError(f"no folder {folder}")
    cached = _cached(name, revision)
    return cached if cached is not None else _download(name, revision)


def is_hub_name(name: str) -> bool:
    """Whether a name is of the form `org/model`, which no path with `..` or a root is."""
    return _NAME.fullmatch(name) is not None and not name.startswith(".") and "/." not in name


def cache_folder() -> Path:
    """Where `huggingface_hub` keeps models."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(base, "huggingface")).expanduser() / "hub"


def _cached(name: str, revision: str) -> Path | None:
    """The snapshot of a revision, if it has a configuration and weights."""
    model = cache_folder() / f"models--{name.replace('/', '--')}"
    ref = model / "refs" / revision
    if ".." in Path(revision).parts or Path(revision).is_absolute() or "\0" in revision:
        raise CheckpointError(f"revision is '{revision}', expected a branch, tag or commit")
    commit = read_text(ref).strip() if ref.is_file() else revision
    snapshot = model / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not (snapshot / "config.json").exists():
        return None
    return snapshot if any(snapshot.glob("*.safetensors")) else None


def _download(name: str, revision: str) -> Path:
    asked = f"no folder '{name}', and revision '{revision}' of a model of that name is not in {cache_folder()}"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise CheckpointError(f"{asked} (HF_HUB_OFFLINE is set, so it was not looked for elsewhere)")
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(f"{asked}; with the package huggingface_hub it could be downloaded") from error
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(_WANTED)))
    except Exception as error:  # many kinds: no such model, no network, no permission
        raise CheckpointError(f"{asked}, and could not be downloaded: {error}") from error
