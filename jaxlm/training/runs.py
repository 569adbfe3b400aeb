"""A run folder as a model to use: configuration, parameters and tokenizer of a training run's checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.core import sharding
from jaxlm.core.configs import from_dict
from jaxlm.core.errors import CheckpointError
from jaxlm.data.tokenizers import Tokenizer, load_tokenizer
from jaxlm.models import Decoder, DecoderConfig
from jaxlm.training.checkpoints import load_meta, load_params


@dataclasses.dataclass(frozen=True)
class Run:
    """What `load_run` finds. `meta` is what the run saved beside its state, its full configuration among it."""

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
    if not folder.is_dir():
        raise CheckpointError(f"no run folder {folder}")
    if not (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{folder} has no checkpoints: expected a run folder of experiments.pretrain")
    _, meta = load_meta(folder / "checkpoints", step)
    model = Decoder(from_dict(DecoderConfig, meta["model"], "checkpoint model"))
    abstract = model.abstract_params()
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places = jax.tree.map(lambda _: device, abstract)
    else:
        places = sharding.shardings(mesh, model.axes(), abstract, model.config.sharding_rules(mesh))
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
    step, params = load_params(folder / "checkpoints", abstract, step)
    return Run(folder, step, model, params, load_tokenizer(folder / "tokenizer"), meta)
