"""Published checkpoints: safetensors, configurations of Hugging Face, adapters."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.mutations import as_json, damaged, damaged_json, damaged_value
from tests.fuzz.target import Target, home, put
from tests.interop.checkpoints import tokenizer_definition


def _safetensors() -> bytes:
    from jaxlm.interop.tensor_files import Planned, write_tensors

    folder = home() / "safetensors"
    folder.mkdir(exist_ok=True)
    arrays = {"a.weight": np.ones((3, 4), np.float32), "b": np.zeros(5, np.float16), "c": np.float64(2.0).reshape(())}
    codes = {"a.weight": "F32", "b": "F16", "c": "F64"}
    write_tensors(folder, [Planned(n, x.shape, codes[n]) for n, x in arrays.items()], iter(arrays.values()), 10**9)
    return (folder / "model.safetensors").read_bytes()


def _with_header() -> st.SearchStrategy[bytes]:
    whole = _safetensors()
    length = int.from_bytes(whole[:8], "little")

    def joined(header: bytes) -> bytes:
        return len(header).to_bytes(8, "little") + header + whole[8 + length :]

    return damaged_json(json.loads(whole[8 : 8 + length])).map(joined)


def read_tensors(data: bytes, folder: Path) -> None:
    from jaxlm.interop.tensor_files import DTYPES, open_tensors

    put(folder, "model.safetensors", data)
    for entry in open_tensors(folder).values():
        if entry.dtype in DTYPES:
            entry.file.view(entry).sum()


def read_index(data: bytes, folder: Path) -> None:
    from jaxlm.interop.tensor_files import open_tensors

    if not (folder / "one.safetensors").exists():
        put(folder, "one.safetensors", _safetensors())
    put(folder, "model.safetensors.index.json", data)
    open_tensors(folder)


def _index() -> st.SearchStrategy[bytes]:
    return damaged_json({"metadata": {"total_size": 9}, "weight_map": {"a.weight": "one.safetensors"}})


def _hf_configs() -> list[dict[str, Any]]:
    from jaxlm.interop import hf_config
    from jaxlm.layers.rotary import RopeScaling
    from jaxlm.testing import FAMILIES, tiny_config

    scaled = [
        tiny_config("llama", rope_scaling=RopeScaling("llama3", 8.0, 16)),
        tiny_config("llama", rope_scaling=RopeScaling("yarn", 4.0, 32)),
        tiny_config("qwen2", window=4, window_pattern=(False, True, True, True)),
    ]
    return [hf_config.write(config)[1] for config in [*map(tiny_config, FAMILIES), *scaled]]


def read_hf_config(values: Any, folder: Path) -> None:
    from jaxlm.core.json_files import read_object
    from jaxlm.interop import hf_config

    _, config = hf_config.read(read_object(put(folder, "config.json", as_json(values))))
    config.layer_kinds()


@functools.cache
def _checkpoint() -> Path:
    import jax

    from jaxlm.data.tokenizers import HuggingFaceTokenizer
    from jaxlm.interop import huggingface
    from jaxlm.models import Decoder
    from jaxlm.testing import tiny_config

    config = tiny_config("llama", num_layers=1, vocab_size=300)
    params = jax.jit(Decoder(config).init)(jax.random.key(0))["params"]
    tokenizer = HuggingFaceTokenizer(tokenizer_definition(), bos="<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>")
    huggingface.save(home() / "base", config, params, tokenizer, chat_template="{{ messages }}")
    return home() / "base"


_FOLDER_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "jaxlm_tokenizer.json")


def _hf_folder() -> st.SearchStrategy[tuple[str, bytes]]:
    whole = _checkpoint()
    files = [
        st.tuples(st.just(name), damaged_json(json.loads((whole / name).read_text()))) for name in _FOLDER_FILES
    ]
    tensors = st.tuples(st.just("model.safetensors"), damaged((whole / "model.safetensors").read_bytes()))
    return st.one_of(*files, tensors)


def read_hf_folder(case: tuple[str, bytes], folder: Path) -> None:
    from jaxlm.interop import huggingface

    name, data = case
    shutil.rmtree(folder)
    shutil.copytree(_checkpoint(), folder)
    if name == "tokenizer_config.json":  # is read where ours is not
        (folder / "jaxlm_tokenizer.json").unlink()
    put(folder, name, data)
    huggingface.load(folder)


@functools.cache
def _adapter() -> tuple[Path, Any]:
    import jax

    from jaxlm.interop import huggingface
    from jaxlm.interop.peft import save_adapter
    from jaxlm.peft import LoraConfig, add_lora

    base = huggingface.load(_checkpoint())
    params = add_lora(jax.random.key(1), base.params, LoraConfig(rank=2, alpha=6, targets=("query", "down")))
    save_adapter(home() / "adapter", base.config, params, "base")
    return home() / "adapter", base


def _adapters() -> st.SearchStrategy[tuple[str, bytes]]:
    folder, _ = _adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = (folder / "adapter_model.safetensors").read_bytes()
    return st.tuples(st.just("adapter_config.json"), damaged_json(config)) | st.tuples(
        st.just("adapter_model.safetensors"), damaged(tensors)
    )


def read_adapter(case: tuple[str, bytes], folder: Path) -> None:
    from jaxlm.interop.peft import load_adapter

    whole, base = _adapter()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        put(folder, name, (whole / name).read_bytes())
    put(folder, *case)
    load_adapter(folder, base)


def read_adapter_alone(case: bytes, folder: Path) -> None:
    """What it names as its base is nothing that is there, so that it never gets to the tensors."""
    from jaxlm.core.json_files import read_object
    from jaxlm.interop import peft

    described = read_object(put(folder, "adapter_config.json", case))
    peft._base(folder, described, None)


TARGETS: dict[str, Target] = {
    "safetensors": Target(lambda: damaged(_safetensors()), read_tensors),
    "safetensors_header": Target(_with_header, read_tensors),
    "safetensors_index": Target(_index, read_index),
    "hf_config": Target(lambda: damaged_value(*_hf_configs()), read_hf_config),
    "hf_folder": Target(_hf_folder, read_hf_folder, cost=150),
    "adapter": Target(_adapters, read_adapter, cost=8),
    "adapter_base": Target(
        lambda: damaged_json({"base_model_name_or_path": "../base"}, {"base_model_name_or_path": "org/name"}),
        read_adapter_alone,
    ),
}
