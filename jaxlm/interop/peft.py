"""LoRA adapters in the format of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Format (PEFT 0.17): tensors `base_model.model.<module>.lora_A.weight` `(rank, in)` and `.lora_B.weight` `(out, rank)`,
modules named as the base model's checkpoint names them; the update is `lora_alpha / r * B @ A`.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm.core import sharding
from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.core.json_files import read_object, write_text
from jaxlm.interop import hf_config, hf_tensors
from jaxlm.interop.hf_hub import is_hub_name
from jaxlm.interop.hf_tensors import Layout
from jaxlm.interop.pretrained import Pretrained
from jaxlm.interop.tensor_files import DTYPES, MappedFile, Planned, write_tensors
from jaxlm.models import DecoderConfig, blocks
from jaxlm.peft.lora import adapted_axes
from jaxlm.weights import LowRank

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_MOST_RANK = 1 << 16
_PREFIX = "base_model.model."
# What would change the computation, and the values that do not.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    "use_qalora": (False,),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "modules_to_save": ([],),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layers_to_transform": ([],),
    "layer_replication": ([],),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
}


def save_adapter(folder: str | Path, config: DecoderConfig, params: Any, base: str) -> None:
    """Writes the `LowRank` weights of a model as an adapter that PEFT opens; `base` names the model below it.

    Raises `ConfigError` for a model without adapters, with several ranks or scales, or of a family whose checkpoints
    fuse queries, keys and values (GPT-2, GPT-NeoX): one adapter there is not three of ours.
    """
    modules = _modules(config)
    found: dict[str, LowRank] = {}
    for i in range(config.num_layers):
        for path, module in modules.items():
            w = _at(blocks.layer(params, i), path)
            if isinstance(w, LowRank):
                found[module.format(i=i)] = w
    if not found:
        raise ConfigError("the parameters hold no adapter to save")
    kinds = {(w.a.shape[-1], float(w.scale)) for w in found.values()}
    if len(kinds) > 1:
        raise ConfigError(f"adapters of several (rank, scale) {sorted(kinds)} do not go into one file")
    rank, scale = kinds.pop()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for module, w in found.items():
        arrays[f"{_PREFIX}{module}.lora_A.weight"] = w.a.T
        arrays[f"{_PREFIX}{module}.lora_B.weight"] = w.b.T
    names = sorted(arrays)
    codes = {dtype: code for code, dtype in DTYPES.items()}
    planned = [Planned(n, tuple(arrays[n].shape), codes[np.dtype(arrays[n].dtype)]) for n in names]
    values = (np.ascontiguousarray(jax.device_get(arrays[n])) for n in names)
    write_tensors(folder, planned, values, sys.maxsize, single=TENSORS)
    described = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in found}),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    write_text(folder / CONFIG, json.dumps(described, indent=2) + "\n")


def load_adapter(
    folder: str | Path,
    base: Pretrained | None = None,
    *,
    dtype: str = "float32",
    packed: bool = False,
    mesh: Mesh | None = None,
    trusted_base: str | None = None,
) -> Pretrained:
    """A model with an adapter over it. `base`: by default what the adapter names, found by `interop.load`.

    An adapter may name a model of the Hugging Face cache, `package:NAME`, or a path beside it, in the folder that
    holds it; `trusted_base` is a path that it may name too (a run knows which one it began with). Any other path is
    refused: load that model, and pass it. `mesh`: where the parameters go, those of a given base too.

    Raises `ConfigError` for adapters other than plain LoRA (the key is named), `CheckpointError` for tensors that are
    missing, unknown or of the wrong shape.
    """
    folder = Path(folder)
    described = read_object(folder / CONFIG)
    for key, plain in _PLAIN.items():
        value = described.get(key)
        if value is not None and value not in plain:
            raise ConfigError(f"{folder / CONFIG}: {key} is {value!r}, supported: {plain[0]!r}")
    rank, alpha = described.get("r"), described.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= _MOST_RANK:
        raise ConfigError(f"{folder / CONFIG}: r is {rank!r}, expected a rank of 1 to {_MOST_RANK}")
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise ConfigError(f"{folder / CONFIG}: lora_alpha is {alpha!r}, expected a number")
    scale = alpha / (rank**0.5 if described.get("use_rslora") else rank)
    if base is None:
        from jaxlm.interop.load import load

        base = load(_base(folder, described, trusted_base), dtype=dtype, packed=packed, mesh=mesh)
    modules = {module: path for path, module in _modules(base.config).items()}
    factors = _read_factors(folder / TENSORS, modules, base.config, rank)

    def adapt(stack: Any, first: int, count: int) -> Any:
        for path in modules.values():
            rows = [factors.get((path, i)) for i in range(first, first + count)]
            if all(row is None for row in rows):
                continue
            kernel = _at(stack, path)
            *_, inputs, outputs = kernel.shape
            none = (np.zeros((inputs, rank), np.float32), np.zeros((rank, outputs), np.float32))
            a, b = (np.stack(x) for x in zip(*(none if row is None else row for row in rows)))
            for given, wanted, letter in ((a, (count, inputs, rank), "A"), (b, (count, rank, outputs), "B")):
                if given.shape != wanted:
                    raise CheckpointError(
                        f"{folder / TENSORS}: lora_{letter} of {path} is {given.shape[:0:-1]}, expected {wanted[:0:-1]}"
                    )
            stack = _with(stack, path, LowRank(kernel, jnp.asarray(a), jnp.asarray(b), scale))
        return stack

    runs, first = [], 0
    for stack in base.params["blocks"]:
        count = blocks.run_length(stack)
        runs.append(adapt(stack, first, count))
        first += count
    params = {**base.params, "blocks": runs}
    if mesh is not None:
        axes = adapted_axes(params, base.model.axes())
        params = jax.device_put(
            params, sharding.shardings(mesh, axes, params, base.config.sharding_rules(mesh))
        )
    return dataclasses.replace(base, params=params)


def _base(folder: Path, described: Mapping[str, Any], trusted: str | None) -> str:
    """What an adapter names as its base model, if that may be opened on its word alone."""
    name = described.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{folder / CONFIG} does not name its base model: load that, and pass it")
    if not name.isprintable():
        raise ConfigError(f"{folder / CONFIG} names the base model {name!r}")
    if trusted is not None:  # It may be relative to where the run was started.
        tail = [part for part in Path(trusted).parts if part != ".."]
        if tail and list(Path(name).parts[-len(tail) :]) == tail:
            return name
    if name.startswith("package:") or (is_hub_name(name) and not os.path.exists(name)):
        return name
    beside, path = os.path.realpath(folder.absolute().parent), os.path.realpath(name)
    own = os.path.realpath(folder)
    if not path.startswith(beside + os.sep) or path == own or path.startswith(own + os.sep):
        raise ConfigError(
            f"{folder / CONFIG} names the base model {name!r}, which is not in the folder that holds the adapter: "
            "if you trust it, load it, and pass it as base="
        )
    if os.path.exists(os.path.join(path, CONFIG)):
        raise ConfigError(f"{folder / CONFIG} names the base model {name!r}, which is an adapter itself")
    return name


def check_adaptable(config: DecoderConfig) -> None:
    """Raises `ConfigError` for a model whose adapters this format cannot hold."""
    _modules(config)


def _read_factors(file: Path, modules: dict[str, str], config: DecoderConfig, rank: int) -> dict:
    """`(path, layer) -> (a, b)` of an adapter's file, each factor in float32."""
    names = {module.format(i=i): (path, i) for module, path in modules.items() for i in range(config.num_layers)}
    halves: dict[tuple, dict[str, np.ndarray]] = {}
    unknown = []
    mapped = MappedFile(file)
    for name, entry in mapped.entries.items():
        module, _, letter = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".lora_")
        if module not in names or letter not in ("A", "B") or entry.dtype not in DTYPES:
            unknown.append(f"{name} ({entry.dtype})")
            continue
        halves.setdefault(names[module], {})[letter] = np.array(mapped.view(entry), dtype=np.float32).T
    if unknown:
        raise CheckpointError(f"{file}: tensors that have no place in the model: {', '.join(sorted(unknown))}")
    single = [f"{path} of layer {i}" for (path, i), found in halves.items() if len(found) != 2]
    if single:
        raise CheckpointError(f"{file}: only one of lora_A and lora_B of {', '.join(single)}")
    for (path, i), found in halves.items():
        if found["A"].ndim != 2 or found["B"].ndim != 2 or (found["A"].shape[-1], found["B"].shape[0]) != (rank, rank):
            raise CheckpointError(f"{file}: {path} of layer {i} has a rank other than r = {rank} of {CONFIG}")
    return {at: (found["A"], found["B"]) for at, found in halves.items()}


def _modules(config: DecoderConfig) -> dict[str, str]:
    """Our path within a block -> the module's name in checkpoints, `{i}` standing for the layer."""
    family, _ = hf_config.write(config)
    found = {}
    for tensor in hf_tensors.TABLES[family.name].tensors:
        if not tensor.per_layer or not tensor.ours[0].endswith("/kernel"):
            continue
        if tensor.layout is not Layout.TRANSPOSED or len(tensor.ours) > 1:
            raise ConfigError(f"adapters of family {family.name}: its checkpoints fuse kernels ({tensor.theirs})")
        found[tensor.ours[0].removeprefix("blocks/")] = tensor.theirs.removesuffix(".weight")
    return found


def _at(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        if part not in tree:
            return None
        tree = tree[part]
    return tree


def _with(tree: Any, path: str, value: Any) -> Any:
    part, _, rest = path.partition("/")
    return {**tree, part: _with(tree[part], rest, value) if rest else value}
