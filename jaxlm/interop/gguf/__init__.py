"""Models from GGUF files, the format of llama.cpp: dequantized, or packed as they are.

found = gguf.load("SmolLM2-135M-Instruct.Q4_1.gguf")
logits = found.model.apply({"params": found.params}, ids)
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxlm.core.errors import ConfigError
from jaxlm.interop.gguf import architecture, parameters, reader
from jaxlm.interop.gguf import tokenizer as tokenizers
from jaxlm.interop.gguf.architecture import ARCHITECTURES
from jaxlm.interop.gguf.blocks import TYPES
from jaxlm.interop.pretrained import Pretrained

__all__ = ["ARCHITECTURES", "TYPES", "load"]


def load(path: str | Path, *, dtype: Any = "float32", packed: bool = False, mesh: Mesh | None = None) -> Pretrained:
    """A model of one of `ARCHITECTURES` with its tokenizer, chat template and stop tokens.

    Tensors are of any of `TYPES`, and of different ones in different layers. They are read from the mapped file and
    unpacked one at a time; beside the parameters there is never more than the largest stack's worth of other memory.

    Args:
      dtype: of the parameters.
      packed: leaves quantized matrices as they are, `jaxlm.weights.Quantized`, unpacked inside each product to
        `dtype`. Layers whose tensors have other types than those before begin a new run of `params["blocks"]`, and
        each run is compiled on its own. Tensors of floats become arrays of `dtype` in any case.
      mesh: places the parameters by the model's sharding rules.

    Raises `ConfigError` for an architecture, setting, tensor type or tokenizer that is not supported, and
    `CheckpointError` for a file that is damaged or whose tensors are not those of the model; all of them are listed.
    """
    file = reader.read(path)
    config = architecture.config(file)
    tokenizer = tokenizers.tokenizer(file)
    chat_template = file.metadata.get("tokenizer.chat_template")
    if not isinstance(chat_template, str | None):
        raise ConfigError(f"{path}: tokenizer.chat_template is {str(chat_template)[:60]}, expected text")
    return Pretrained(
        config=config,
        params=parameters.load(file, config, jnp.dtype(dtype), packed, mesh),
        tokenizer=tokenizer,
        chat_template=chat_template,
        stop_ids=tokenizers.stop_ids(file),
        add_bos=tokenizer is not None and tokenizer.adds_bos,
    )
