"""GGUF files: damaged bytes, and headers of any metadata in the right form."""

import functools
import struct
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.fuzz.mutations import damaged, damaged_value
from tests.fuzz.target import Target, home, put


def _gguf_metadata() -> dict[str, Any]:
    from jaxlm.testing import tiny_config
    from tests.interop.gguf_files import metadata_of

    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{b:02X}>" for b in range(256)), "a", "b", "ab", "\u2581"]
    types = [3, 3, 2, *[6] * 256, 1, 1, 1, 1]
    return {
        **metadata_of("llama", tiny_config("llama", num_layers=1, vocab_size=len(tokens))),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [float(-i) for i in range(len(tokens))],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }


@functools.cache
def _gguf(metadata_only: bool = False) -> bytes:
    from jaxlm.testing import tiny_decoder
    from tests.interop import gguf_files

    metadata = _gguf_metadata()
    model, params = tiny_decoder("llama", num_layers=1, vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    tensors = gguf_files.tensors_of("llama", model.config, params)
    return gguf_files.write(home() / "model.gguf", "llama", metadata, tensors).read_bytes()


def gguf_bytes(metadata: dict[str, Any], tensors: list[tuple[str, tuple[int, ...], int, int]], data: bytes) -> bytes:
    """A GGUF file of any metadata that JSON has, right or wrong."""

    def string(text: str) -> bytes:
        raw = text.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(raw)) + raw

    def value(x: Any) -> tuple[int, bytes]:
        if isinstance(x, bool):
            return 7, struct.pack("<?", x)
        if isinstance(x, int):
            kind, form = next(((k, f) for k, f, n in ((4, "<I", 32), (10, "<Q", 64)) if 0 <= x < 1 << n), (11, "<q"))
            return kind, struct.pack(form, max(-(1 << 63), min(x, (1 << 63) - 1)) if form == "<q" else x)
        if isinstance(x, float):
            return 6, struct.pack("<f", x if abs(x) < 1e38 else np.float32("inf"))
        if isinstance(x, str):
            return 8, string(x)
        items = [value(item) for item in (x if isinstance(x, list) else [])]
        kind = items[0][0] if items else 4
        body = b"".join(raw for k, raw in items if k == kind)
        return 9, struct.pack("<IQ", kind, sum(k == kind for k, _ in items)) + body

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, x in metadata.items():
        kind, raw = value(x)
        out += string(key) + struct.pack("<I", kind) + raw
    for name, dims, kind, offset in tensors:
        out += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return out + b"\0" * (-len(out) % 32) + data


def _ggufs() -> st.SearchStrategy[bytes]:
    def full(metadata: Any) -> bytes:
        metadata = metadata if isinstance(metadata, dict) else {}
        known = ("tokenizer", "general", "gemma3")
        named = {k if k.split(".")[0] in known else f"llama.{k}": v for k, v in metadata.items()}
        tensors = [("token_embd.weight", (32, 263), 0, 0), ("rope_freqs.weight", (4,), 0, 0)][: 1 + len(named) % 2]
        return gguf_bytes({"general.architecture": "llama", **named}, tensors, bytes(32 * 263 * 4))

    metadata = _gguf_metadata()
    lists = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores")
    small = {**metadata, **{name: metadata[name][-7:] for name in lists}}
    small["tokenizer.ggml.token_type"] = [6, 6, 6, 1, 1, 1, 1]
    byte_level = {**small, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b"]}
    byte_level["tokenizer.ggml.pre"] = "smollm"
    scaled = {**small, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.0}
    gemma = {f"gemma3.{k}" if k.split(".")[0] != "tokenizer" else k: v for k, v in small.items()}
    gemma |= {"general.architecture": "gemma3", "gemma3.attention.sliding_window": 4}
    return damaged_value(small, byte_level, scaled, gemma).map(full) | damaged(_gguf())


def read_gguf(data: bytes, folder: Path) -> None:
    from jaxlm.interop.gguf import architecture, reader, tokenizer

    file = reader.read(put(folder, "model.gguf", data))
    architecture.config(file).layer_kinds()
    tokenizer.stop_ids(file)
    tokenizer.tokenizer(file)


def read_gguf_whole(data: bytes, folder: Path) -> None:
    from jaxlm.interop import gguf

    gguf.load(put(folder, "model.gguf", data))


TARGETS: dict[str, Target] = {
    "gguf": Target(_ggufs, read_gguf, cost=3),
    "gguf_model": Target(lambda: damaged(_gguf()), read_gguf_whole, cost=60),
}
