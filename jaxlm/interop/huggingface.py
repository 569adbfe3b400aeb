"""Hugging Face checkpoints in and out: `config.json`, safetensors, tokenizer.

    found = huggingface.load("HuggingFaceTB/SmolLM2-135M")       # a folder, or a name in the Hugging Face cache
    logits = found.model.apply({"params": found.params}, tokens)
    huggingface.save("out", found.config, found.params, found.tokenizer)  # a folder that transformers opens

Families: Llama 2 and 3, SmolLM2, Mistral, Qwen 2, 2.5 and 3, GPT-NeoX (Pythia), GPT-2, Gemma 1, 2 and 3 (of a Gemma 3
that sees images, its text model). What our model would not compute as theirs does is refused by name. Nothing is
unpickled, no code of a checkpoint is run.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from jaxlm.core import sharding, trees
from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.core.json_files import read_object, read_text
from jaxlm.core.precision import Precision
from jaxlm.core.temporary import beside
from jaxlm.data.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from jaxlm.interop import hf_config, hf_tensors, tensor_files
from jaxlm.interop.hf_hub import resolve
from jaxlm.interop.hf_tensors import Table, Tensor
from jaxlm.interop.pretrained import Pretrained
from jaxlm.interop.tensor_files import DTYPES, Entry, Planned
from jaxlm.models import Decoder, DecoderConfig
from jaxlm.models.blocks import run_length
from jaxlm.weights import Weight
from jaxlm.weights import dense as to_dense


def load(
    path: str | Path,
    *,
    dtype: str | Precision | None = None,
    mesh: Mesh | None = None,
    revision: str = "main",
    ignore_keys: Sequence[str] = (),
) -> Pretrained:
    """The model in a folder of Hugging Face's format, or of a name like `"org/model"` in its local cache.

    Files are mapped and read tensor by tensor, straight into the parameters' format and place: beside the parameters
    themselves, host memory holds one stacked tensor (on a mesh: one device's part of one) at a time. A name that is not
    in the cache is downloaded if the package `huggingface_hub` is installed (and `HF_HUB_OFFLINE` is not set).

    Args:
      dtype: the format of the parameters (by default float32), or a `Precision` that also says what activations and
        products are in.
      mesh: where the parameters go, laid out by the model's sharding rules; by default the first device.
      revision: of a name: branch, tag or commit.
      ignore_keys: keys of `config.json` to take as not there.

    Raises:
      ConfigError: an architecture or a setting in `config.json` that is not supported, named with its value.
      CheckpointError: files that are missing, damaged, pickled or outside the folder; tensors that are missing,
        unexpected or of the wrong shape, all of them listed.
      DataError: a `.json` file that is not JSON.
    """
    folder = resolve(path, revision)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json: not a checkpoint in Hugging Face's format")
    values = read_object(folder / "config.json")
    family, config = hf_config.read(values, ignore_keys)
    precision = dtype if isinstance(dtype, Precision) else Precision(params=dtype or "float32")
    config = dataclasses.replace(config, precision=precision)
    params = _load_params(folder, hf_tensors.TABLES[family.name], config, mesh)
    tokenizer = _load_tokenizer(folder)
    stop_ids = _stop_ids(folder, values, tokenizer)
    add_bos = _adds_bos(folder, tokenizer)
    return Pretrained(config, params, tokenizer, _load_chat_template(folder), stop_ids, add_bos)


def save(
    folder: str | Path,
    config: DecoderConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    *,
    chat_template: str | None = None,
    stop_ids: Sequence[int] = (),
    max_shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
    dense: bool = False,
) -> None:
    """Writes a model as a folder that `load` and `transformers` open.

    The folder appears when it is whole. It must be new or empty, or hold an earlier such model, which it replaces.
    Equal input gives equal bytes. Weights are taken to the host one stacked tensor at a time.

    Args:
      tokenizer: a `HuggingFaceTokenizer` (there is no such file for the others: `ConfigError`).
      chat_template: Jinja source.
      stop_ids: ids that end a generation; by default the tokenizer's EOS.
      max_shard_bytes: weights beyond it go to several files and an index.
      dtype: the format to store in (`float32`, `bfloat16`, `float16`); by default each weight's own.
      dense: whether weights that are not plain arrays (`LowRank`, quantized) are to be stored as the dense
        arrays that they stand for; without it they are refused.

    Raises:
      ConfigError: a model that no family expresses (the message names what differs), or a folder of other files.
      CheckpointError: parameters that are not those of `config`, all of them listed.
    """
    folder = Path(folder)
    family, values = hf_config.write(config)
    if tokenizer is not None and not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ConfigError(f"a {type(tokenizer).__name__} has no tokenizer.json; pass tokenizer=None and keep it apart")
    if dtype is not None and np.dtype(dtype) not in DTYPES.values():
        raise ConfigError(f"dtype is '{dtype}', expected one of {', '.join(str(d) for d in DTYPES.values())}")
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1")
    leaves = dict(trees.named_leaves(params, is_leaf=lambda x: isinstance(x, Weight)))
    if not dense:
        wrapped = [f"{path} ({type(leaf).__name__})" for path, leaf in leaves.items() if isinstance(leaf, Weight)]
        if wrapped:
            raise ConfigError(
                f"weights that are not arrays: {', '.join(wrapped)}; pass dense=True to store their values"
            )
    _check_replaceable(folder)
    table = hf_tensors.TABLES[family.name]
    planned, tensors = _plan(table, config, params, leaves, dtype)
    stop_ids = list(stop_ids) or ([tokenizer.special_ids["eos"]] if tokenizer is not None else [])
    ids = _generation_ids(tokenizer, stop_ids)
    values |= {**ids, "torch_dtype": DTYPES[planned[0].dtype].name}

    with beside(folder.absolute(), folder=True) as new:
        tensor_files.write_tensors(new, planned, _arrays(tensors, config, params), max_shard_bytes)
        _write_json(new / "config.json", values)
        _write_json(new / "generation_config.json", ids)
        if tokenizer is not None:
            _save_tokenizer(new, tokenizer, config)
        if chat_template is not None:
            (new / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        _swap(new, folder)


# Weights.


def _load_params(folder: Path, table: Table, config: DecoderConfig, mesh: Mesh | None) -> dict[str, Any]:
    model = Decoder(config)
    abstract = model.abstract_params()
    if mesh is None:
        places = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)
    else:
        places = sharding.shardings(mesh, model.axes(), abstract, config.sharding_rules(mesh))
    shapes = hf_tensors.leaf_shapes({path: x.shape for path, x in trees.named_leaves(abstract)}, config)
    present = table.present(shapes)
    expected = {name: shape for t, shape in present for name in t.names(config.num_layers)}
    entries = _entries(folder, table, config, expected)
    holders = {path: (t, part) for t, _ in present for part, path in enumerate(t.ours)}

    def one(path: str, leaf: jax.ShapeDtypeStruct, place: Sharding) -> jax.Array:
        tensor, part = holders[hf_tensors.block_path(path)]
        sources = [entries[name] for name in tensor.names(config.num_layers)]
        return _read(sources, tensor, part, config.num_heads, leaf, place)

    return trees.map_named(one, abstract, places)


def _entries(folder: Path, table: Table, config: DecoderConfig, expected: Mapping[str, Any]) -> dict[str, Entry]:
    """The tensors of a checkpoint under today's names, checked against what the model has."""
    entries: dict[str, Entry] = {}
    for name, entry in tensor_files.open_tensors(folder).items():
        current = table.rename(name)
        if current in entries:
            raise CheckpointError(f"{folder}: two tensors are both {current}, one of them named {name}")
        if current is not None:
            entries[current] = entry
    tied = entries.pop(table.head, None) if config.tie_embeddings else None
    hf_tensors.compare(expected, {name: e.shape for name, e in entries.items()}, str(folder))
    odd = sorted(f"{name} ({e.dtype})" for name, e in entries.items() if e.dtype not in DTYPES)
    if odd:
        raise CheckpointError(f"{folder}: tensors in a format other than {', '.join(DTYPES)}: {', '.join(odd)}")
    if tied is not None and not _equal(tied, entries[table.embedding]):
        raise CheckpointError(
            f"{folder}: tie_word_embeddings is true, but {table.head} is not {table.embedding}: set it to false"
        )
    return entries


def _equal(a: Entry, b: Entry) -> bool:
    """Whether two tensors are the same bits, compared some rows at a time."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    ours, theirs = (entry.file.view(entry).view(np.uint8) for entry in (a, b))
    same = all(np.array_equal(ours[i : i + 1024], theirs[i : i + 1024]) for i in range(0, len(ours), 1024))
    del ours, theirs
    a.file.release(a)
    b.file.release(b)
    return same


def _read(
    sources: Sequence[Entry], tensor: Tensor, part: int, num_heads: int, leaf: jax.ShapeDtypeStruct, place: Sharding
) -> jax.Array:
    """One parameter, device by device: of each device's part, one layer after the other."""
    parts: dict[str, np.ndarray] = {}

    def piece(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) in parts:
            return parts[str(index)]
        layers, within = (sources[index[0]], index[1:]) if tensor.per_layer else (sources, index)
        out = None
        for row, entry in enumerate(layers):
            value = tensor.split(entry.file.view(entry), part, num_heads)[within]
            if out is None:
                out = np.empty((len(layers), *value.shape), leaf.dtype)
            _copy(out[row], value)
            del value
            entry.file.release(entry)
        parts[str(index)] = out if tensor.per_layer else out[0]
        return parts[str(index)]

    # Waiting keeps the buffers of one parameter, not of several that are under way.
    return jax.make_array_from_callback(leaf.shape, place, piece).block_until_ready()


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source` for a transposed source: converted in the order it is stored in, then turned."""
    if source.ndim == 2 and source.dtype != target.dtype and not source.flags.c_contiguous:
        source = source.T.astype(target.dtype).T
    target[...] = source


def _plan(
    table: Table, config: DecoderConfig, params: Mapping[str, Any], leaves: Mapping[str, Any], dtype: str | None
) -> tuple[list[Planned], list[Tensor]]:
    """What is written, in order, after a check of the parameters against the configuration."""
    model_shapes = {path: x.shape for path, x in trees.named_leaves(Decoder(config).abstract_params())}
    shapes = hf_tensors.leaf_shapes(model_shapes, config)
    lengths = [run_length(stack) for stack in params["blocks"]]
    if sum(lengths) != config.num_layers:
        raise CheckpointError(f"the parameters have {sum(lengths)} layers, the configuration {config.num_layers}")
    wanted = {path: shape for path, shape in model_shapes.items() if not path.startswith("blocks/")}
    for run, length in enumerate(lengths):
        stacked = {p: s for p, s in shapes.items() if p.startswith("blocks/")}
        wanted |= {p.replace("blocks/", f"blocks/{run}/", 1): (length, *s) for p, s in stacked.items()}
    hf_tensors.compare(wanted, {path: tuple(leaf.shape) for path, leaf in leaves.items()}, "parameters")
    planned, tensors = [], []
    for tensor, shape in table.present(shapes):
        path = tensor.ours[0].replace("blocks/", "blocks/0/", 1)
        stored = np.dtype(dtype or leaves[path].dtype)
        if stored not in DTYPES.values():
            raise ConfigError(f"{path} is {stored}: pass dtype, one of {', '.join(str(d) for d in DTYPES.values())}")
        code = next(code for code, known in DTYPES.items() if known == stored)
        planned += [Planned(name, shape, code) for name in tensor.names(config.num_layers)]
        tensors.append(tensor)
    return planned, tensors


def _arrays(tensors: Sequence[Tensor], config: DecoderConfig, params: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """The arrays of `_plan`, one at a time."""

    def host(tree: Any, path: str) -> np.ndarray:
        for key in path.split("/"):
            tree = tree[key]
        return np.asarray(jax.device_get(to_dense(tree)))

    for tensor in tensors:
        if not tensor.per_layer:
            yield tensor.join([host(params, path) for path in tensor.ours], config.num_heads)
            continue
        for stack in params["blocks"]:
            stacked = [host(stack, path.removeprefix("blocks/")) for path in tensor.ours]
            for layers in zip(*stacked, strict=True):
                yield tensor.join(layers, config.num_heads)


# What lies beside the weights.


def _load_tokenizer(folder: Path) -> Tokenizer | None:
    if (folder / "tokenizer.json").exists():
        return load_tokenizer(folder)
    if (folder / "tokenizer.model").exists():
        return load_tokenizer(folder / "tokenizer.model")
    return None


def _load_chat_template(folder: Path) -> str | None:
    """The file `chat_template.jinja`, or the (default) template in `tokenizer_config.json`."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    path = folder / "tokenizer_config.json"
    template = read_object(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"{path}: chat_template is {template!r}, expected text")
    return template


def _adds_bos(folder: Path, tokenizer: Tokenizer | None) -> bool:
    """What `tokenizer_config.json` says, else what the tokenizer's own file does."""
    path = folder / "tokenizer_config.json"
    said = read_object(path).get("add_bos_token") if path.exists() else None
    if isinstance(said, bool):
        return said
    return isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.adds_bos


def _stop_ids(folder: Path, values: Mapping[str, Any], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    ids = read_object(path).get("eos_token_id") if path.exists() else None
    ids = values.get("eos_token_id") if ids is None else ids
    if ids is None:
        return () if tokenizer is None else (tokenizer.special_ids["eos"],)
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int for i in ids):
        raise ConfigError(f"{path}: eos_token_id is {ids!r}, expected an id or a list of ids")
    return tuple(ids)


def _generation_ids(tokenizer: Tokenizer | None, stop_ids: Sequence[int]) -> dict[str, Any]:
    special = {} if tokenizer is None else tokenizer.special_ids
    eos = None if not stop_ids else stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)
    return {"bos_token_id": special.get("bos"), "eos_token_id": eos, "pad_token_id": special.get("pad")}


def _save_tokenizer(folder: Path, tokenizer: HuggingFaceTokenizer, config: DecoderConfig) -> None:
    import tokenizers

    tokenizer.save(folder)
    engine = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    roles = {f"{role}_token": engine.id_to_token(tokenizer.special_ids[role]) for role in ("bos", "eos", "pad")}
    settings = {
        # What reads a tokenizer.json as it is. (For Qwen 2 `transformers` 5 takes that model's own class all the same.)
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_length,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# Folders.

_OURS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "jaxlm_tokenizer.json",
    "chat_template.jinja",
    tensor_files.INDEX,
)


def _check_replaceable(folder: Path) -> None:
    """Whether `save` may write here: `ConfigError` for a file, or a folder with files that no `save` wrote."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, expected a folder")
    if folder.is_dir():
        foreign = [p.name for p in folder.iterdir() if p.name not in _OURS and not p.match("model*.safetensors")]
        if foreign:
            raise ConfigError(f"{folder} holds other files ({', '.join(sorted(foreign)[:5])}): choose a new folder")


def _swap(new: Path, folder: Path) -> None:
    """Puts a finished folder in place of one that may exist."""
    os.chmod(new, 0o755)
    for file in new.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
    if folder.exists():
        with beside(folder.absolute(), folder=True) as old:
            os.replace(folder, old)
            try:
                os.replace(new, folder)
            except BaseException:
                os.replace(old, folder)
                raise
    else:
        os.replace(new, folder)
