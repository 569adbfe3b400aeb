"""Tiny decoders: the switches of each published family at a size that compiles in a second."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError, nearest
from jaxlm.models import Decoder, DecoderConfig
from jaxlm.models.presets import PRESETS

FAMILIES = {
    "llama": "llama-3-8b",
    "smollm2": "smollm2-135m",
    "qwen2": "qwen2.5-0.5b",
    "qwen3": "qwen3-0.6b",
    "neox": "pythia-70m",
    "gpt2": "gpt2",
    "gemma": "gemma-2b",
    "gemma2": "gemma-2-2b",
    "gemma3": "gemma-3-1b",
}
"""Family name to the published model whose switches its tiny version has."""


def tiny_config(family: str = "llama", **changes: Any) -> DecoderConfig:
    """A configuration with a family's switches, 4 layers of width 32 and a vocabulary of 64."""
    if family not in FAMILIES:
        raise ConfigError(f"no family '{family}': {nearest(family, FAMILIES)}")
    full = PRESETS[FAMILIES[family]]
    heads = 4
    shape = {
        "vocab_size": 64,
        "num_layers": 4,
        "embed_dim": 32,
        "num_heads": heads,
        "num_kv_heads": 2 if full.kv_heads < full.num_heads else heads,
        "mlp_dim": 48,
        "head_dim": 12 if family in ("qwen3", "gemma", "gemma2", "gemma3") else None,
        "max_length": 128,
        "window": None if full.window is None else 5,
        "embedding_scale": None if full.embedding_scale is None else 32**0.5,
        "rope_fraction": 0.5 if full.rope_fraction < 1 else 1.0,
    }
    return dataclasses.replace(full, **{**shape, **changes})


def tiny_decoder(family: str = "llama", seed: int = 0, **changes: Any) -> tuple[Decoder, dict[str, Any]]:
    """A tiny decoder and randomized parameters."""
    model = Decoder(tiny_config(family, **changes))
    return model, randomize(model.init(jax.random.key(seed))["params"], seed)


def randomize(params: Any, seed: int = 0, scale: float = 0.1) -> Any:
    """Adds noise to every parameter, so that norm scales and biases that are ignored or swapped show."""

    def noisy(path: str, x: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed + 1), hash_name(path))
        return x + (scale * jax.random.normal(key, x.shape)).astype(x.dtype)

    def hash_name(path: str) -> int:
        return sum((i + 1) * ord(c) for i, c in enumerate(path))

    return jax.tree.map(jnp.asarray, trees.map_named(noisy, params))
