"""Tiny decoders whose logits were computed once by Hugging Face transformers: cases, parameters, tokens, file.

`make_golden.py` writes `golden_logits.npz`; `test_parity.py` reads it. Parameters come from NumPy alone, seeded by
their paths, so both sides have the same ones whatever versions they run.
"""

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core import trees
from jaxlm.layers import RopeScaling
from jaxlm.models import Decoder, DecoderConfig
from jaxlm.testing import FAMILIES, tiny_config

PATH = Path(__file__).with_name("golden_logits.npz")


def _cases() -> dict[str, DecoderConfig]:
    cases = {family: tiny_config(family) for family in FAMILIES}
    # Caps that logits of this size reach, and a scale that is not the default one.
    cases["gemma2"] = dataclasses.replace(cases["gemma2"], attention_softcap=2.0, final_softcap=3.0)
    # A global layer (the sixth) and a remainder of the repeating group.
    cases["gemma3"] = dataclasses.replace(cases["gemma3"], num_layers=8, attention_scale=20**-0.5)
    # Settings of rotation whose frequencies fall on both sides of every threshold at this length.
    rope = {"rope_theta": 100.0, "max_length": 64}
    cases["llama3.2"] = tiny_config("llama", tie_embeddings=True, rope_scaling=RopeScaling("llama3", 8.0, 32), **rope)
    cases["linear"] = tiny_config("llama", rope_scaling=RopeScaling("linear", 4.0, 16), **rope)
    cases["dynamic"] = tiny_config("llama", rope_scaling=RopeScaling("dynamic", 2.0, 16), **rope)
    yarn = RopeScaling("yarn", 4.0, 16, beta_fast=2.0, beta_slow=0.5)
    cases["yarn"] = tiny_config("qwen3", rope_scaling=yarn, **rope)
    # Options that no family's published checkpoints, or not those of `FAMILIES`, turn on.
    cases["neox_serial"] = tiny_config("neox", parallel_residual=False)
    cases["gpt2_scaled"] = tiny_config("gpt2", attention_scale_by_layer=True)
    cases["gemma3_scaled"] = dataclasses.replace(cases["gemma3"], rope_scaling=RopeScaling("linear", 8.0, 16))
    # An epsilon that shows where it is added.
    return {name: dataclasses.replace(config, norm_eps=0.01) for name, config in cases.items()}


CASES = _cases()


def tokens() -> np.ndarray:
    """`[2, 24]` token ids below 64, none of which repeats in lockstep between the rows."""
    return np.random.default_rng(0).integers(0, 64, (2, 24), dtype=np.int32)


def parameters(config: DecoderConfig) -> dict[str, Any]:
    """Parameters of a decoder as NumPy arrays: norm scales and biases are as random as everything else."""

    def fill(path: str, leaf: Any) -> np.ndarray:
        uniform = np.random.default_rng(zlib.crc32(path.encode())).random(leaf.shape)
        unit = (2.0 * uniform - 1.0) * 3**0.5
        match path.rsplit("/", 1)[-1]:
            case "scale":
                value = 0.3 * unit + (0.0 if config.norm_unit_offset else 1.0)
            case "bias":
                value = 0.3 * unit
            case "table":
                value = 0.5 * unit
            case _:
                value = 1.5 * leaf.shape[-2] ** -0.5 * unit
        return value.astype(np.float32)

    return trees.map_named(fill, Decoder(config).abstract_params())


def checksum(params: Any) -> int:
    """The CRC-32 of all parameters, to tell a changed generator from a changed model."""
    crc = 0
    for _, leaf in trees.named_leaves(params):
        crc = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), crc)
    return crc


def load() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Logits `[2, 24, 64]` by case, and what is recorded with them: `versions`, `checksums`."""
    with np.load(PATH, allow_pickle=False) as file:
        logits = {name: file[name] for name in file.files if name != "meta"}
        return logits, json.loads(str(file["meta"]))
