"""Run folders: `load_run` opens one as a model to use, `exclusive` keeps a second run out of one that is in use."""

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.core import sharding
from jaxlm.core.configs import from_dict
from jaxlm.core.distributed import from_main, main_first
from jaxlm.core.errors import CheckpointError, ConfigError, DataError
from jaxlm.core.policies import PrecisionConfig
from jaxlm.core.temporary import beside
from jaxlm.data.cache import atomic_folder
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.models import Decoder, DecoderConfig
from jaxlm.training.checkpoints import load_meta, load_params
from jaxlm.training.low_precision import kernels_under_policy
from jaxlm.weights import under_policy


@dataclasses.dataclass(frozen=True)
class Run:
    """What `load_run` finds. `meta` is what the run saved beside its state, its full configuration among it.

    Of a model that was trained for low-precision inference the kernels in `params` follow that policy.
    """

    folder: Path
    step: int
    model: Decoder
    params: Any
    tokenizer: Tokenizer
    meta: dict[str, Any]


def load_run(folder: str | Path, *, step: int | None = None, mesh: Mesh | None = None) -> Run:
    """Loads the newest good checkpoint (or that of `step`) of a run folder, onto one device or a mesh.

    Raises `CheckpointError` when the folder is not a run, or holds no usable checkpoint.
    """
    folder = Path(folder)
    if folder.name == "checkpoints":
        folder = folder.parent
    model, meta = model_of_run(folder, step)
    abstract = model.abstract_params()
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: device, abstract)
    else:
        places = sharding.shardings(mesh, model.axes(), abstract, model.config.sharding_rules(mesh))
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
    step, params = load_params(folder / "checkpoints", abstract, step)
    policy = from_dict(PrecisionConfig, meta.get("precision", {}), "checkpoint precision").policy()
    if policy.is_for_inference:
        params = under_policy(params, kernels_under_policy(model.axes()), policy.for_evaluation())
    return Run(folder, step, model, params, load_tokenizer(folder / "tokenizer"), meta)


def model_of_run(folder: Path, step: int | None = None) -> tuple[Decoder, dict[str, Any]]:
    """The model of a run folder, without its parameters, and its `meta`; errors as `load_run`."""
    if not folder.is_dir():
        raise CheckpointError(f"no run folder {folder}")
    if not (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{folder} has no checkpoints: expected a run folder of experiments.pretrain")
    _, meta = load_meta(folder / "checkpoints", step)
    if "model" not in meta:
        raise CheckpointError(f"{folder} is a fine-tuning run without its result: give its command again to finish it")
    return Decoder(from_dict(DecoderConfig, meta["model"], "checkpoint model")), meta


@contextlib.contextmanager
def exclusive(folder: str | Path) -> Iterator[None]:
    """Holds a run folder for this run (all its processes: the main one holds it). The end of the process frees it.

    File systems without locks are not held.

    Raises `CheckpointError` when another run is writing to the folder, `ConfigError` when nobody can.
    """
    held: list[int] = []

    def hold() -> None:
        held.append(_open_lock(Path(folder)))
        _lock(held[0], Path(folder))

    try:
        from_main(hold)
        yield
    finally:
        for file in held:
            os.close(file)


def _open_lock(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "checkpoints"):
            if place.is_dir():
                with beside(place / "probe"):
                    pass
        return os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"cannot write to run folder {folder}: {error.strerror} (or choose another --out)") from None


def _lock(file: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise CheckpointError(f"{folder} is in use: another run is writing to it (choose another --out)") from None


def keep_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Saves the tokenizer with a run, or checks that the run was started with the same one.

    Raises `DataError` if it was not.
    """

    def keep() -> None:
        if not folder.exists():
            with atomic_folder(folder) as temporary:
                tokenizer.save(temporary)
        elif load_tokenizer(folder).fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"{folder} is not the tokenizer that the data gives now: the text has changed since the run began; "
                "train on it in another folder, with --out"
            )

    main_first(keep)
