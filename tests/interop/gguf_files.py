"""Writes small GGUF files with the `gguf` package, as converters of models do."""

import dataclasses
from pathlib import Path

import gguf
import numpy as np

from jaxlm.models import DecoderConfig, layer
from jaxlm.testing import tiny_decoder

FAMILIES = {"llama": "llama", "smollm2": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
FAMILIES |= {name: name for name in ("gemma", "gemma2", "gemma3")}
"""GGUF's architecture for each of ours that it has."""

TYPE_SIZES = {kind.name: sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
# Where the float16 numbers of a block are.
_SCALES = {
    "Q8_0": [0],
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}
_NAMES = {
    "attn_norm": ("attention_norm",),
    "ffn_norm": ("mlp_norm",),
    "attn_q": ("attention", "query"),
    "attn_k": ("attention", "key"),
    "attn_v": ("attention", "value"),
    "attn_output": ("attention", "out"),
    "attn_q_norm": ("attention", "query_norm"),
    "attn_k_norm": ("attention", "key_norm"),
    "ffn_gate": ("mlp", "gate"),
    "ffn_up": ("mlp", "up"),
    "ffn_down": ("mlp", "down"),
    "post_attention_norm": ("attention_post_norm",),
    "post_ffw_norm": ("mlp_post_norm",),
}


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Bytes of a quantized matrix: random but for the scales, which are small numbers."""
    block, size = TYPE_SIZES[kind]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for at in _SCALES[kind]:
        scale = rng.normal(size=raw.shape[:2]).astype(np.float16) * np.float16(1e-3)
        raw[..., at : at + 2] = scale[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def tensors_of(arch: str, config: DecoderConfig, params) -> dict[str, np.ndarray]:
    """Float32 tensors under llama.cpp's names, in its orientation and pairing of rotary dimensions."""
    one = 1.0 if config.norm_unit_offset else 0.0
    found = {
        "token_embd.weight": params["embedding"]["table"],
        "output_norm.weight": params["final_norm"]["scale"] + one,
    }
    if not config.tie_embeddings:
        found["output.weight"] = params["head"]["kernel"].T
    for i in range(config.num_layers):
        block = layer(params, i)
        for name, path in _NAMES.items():
            node = block
            for key in path:
                node = node.get(key, {})
            if "scale" in node:
                found[f"blk.{i}.{name}.weight"] = node["scale"] + one
            for leaf, suffix in (("kernel", "weight"), ("bias", "bias")):
                if leaf in node:
                    value = np.asarray(node[leaf]).T
                    if arch == "llama" and name in ("attn_q", "attn_k"):
                        heads = config.num_heads if name == "attn_q" else config.kv_heads
                        split = value.reshape(heads, 2, config.head_size // 2, *value.shape[1:])
                        value = split.swapaxes(1, 2).reshape(value.shape)
                    found[f"blk.{i}.{name}.{suffix}"] = value
    return {name: np.ascontiguousarray(value, np.float32) for name, value in found.items()}


@dataclasses.dataclass
class Quantized:
    """A tensor's bytes and the name of their type."""

    raw: np.ndarray
    kind: str


def metadata_of(arch: str, c: DecoderConfig) -> dict[str, object]:
    """What a converter says of a model, without the architecture's prefix."""
    found = {
        "block_count": c.num_layers,
        "context_length": c.max_length,
        "embedding_length": c.embed_dim,
        "feed_forward_length": c.mlp_dim,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.kv_heads,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.freq_base": c.rope_theta,
    }
    if c.head_dim is not None:
        found |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    if c.window is not None:
        found["attention.sliding_window"] = c.window
    for name, cap in (("attn", c.attention_softcap), ("final", c.final_softcap)):
        if cap is not None:
            found[f"{name}_logit_softcapping"] = cap
    return found


def write(path: Path, arch: str, metadata: dict, tensors: dict[str, np.ndarray | Quantized]) -> Path:
    """`metadata` keys without a known first part belong to the architecture. Arrays keep their dtype."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        key = key if key.split(".")[0] in ("tokenizer", "general") else f"{arch}.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        if isinstance(value, Quantized):
            writer.add_tensor(name, value.raw, raw_dtype=gguf.GGMLQuantizationType[value.kind])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_file(folder, family="llama", metadata=(), tensors=(), **changes):
    """A file with a tiny model, its decoder and its parameters."""
    if family == "gemma2":
        changes.setdefault("attention_scale", None)
    model, params = tiny_decoder(family, init_std=0.02, init_out_std=None, **changes)
    arch = FAMILIES[family]
    settings = {**metadata_of(arch, model.config), **dict(metadata)}
    stored = {**tensors_of(arch, model.config, params), **dict(tensors)}
    settings = {k: v for k, v in settings.items() if v is not None}
    stored = {k: v for k, v in stored.items() if v is not None}
    return write(folder / "model.gguf", arch, settings, stored), model, params


def byte_alphabet():
    """The printable characters that stand for bytes, as in GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "12", "123", "Ġa"],
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 259,
    "tokenizer.ggml.merges": ["1 2", "12 3", "Ġ a"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{{ messages }}",
}
"""Metadata of a tokenizer that knows every byte and three merges."""
