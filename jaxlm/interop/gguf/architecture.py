"""The configuration that a GGUF file's metadata describe, and the names of its tensors.

Keys and tensor names: ggml's `docs/gguf.md` and the tables of the `gguf` package. What llama.cpp takes for granted for
an architecture (windows of Gemma, its softcaps) is taken for granted here.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxlm.core.errors import CheckpointError, ConfigError, nearest
from jaxlm.interop.gguf.reader import File
from jaxlm.layers.rotary import RopeScaling, frequencies
from jaxlm.models import DecoderConfig
from jaxlm.models.config import MOST_LAYERS

_NEEDED = object()
_MOST = 1 << 31

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")


class Place(NamedTuple):
    """Where a tensor belongs: a path in the parameters (of a block, for a block's tensors) and the shape it has there.

    `kernel`: it is stored transposed. `heads`: its rows are in the pairing of rotary dimensions that llama.cpp uses for
    this number of heads. `offset`: is added to it.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    kernel: bool = False
    heads: int | None = None
    offset: float = 0.0


def config(file: File) -> DecoderConfig:
    """The decoder's configuration. `ConfigError` for an architecture or option that is not supported, by name."""
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ConfigError(f"{file.path}: architecture '{arch}' is not supported: {nearest(str(arch), ARCHITECTURES)}")
    keys = _Keys(file, arch)
    layers, embed, heads = (keys.integer(k) for k in ("block_count", "embedding_length", "attention.head_count"))
    for name, size, most in (("layers", layers, MOST_LAYERS), ("embed", embed, _MOST), ("heads", heads, _MOST)):
        if not 1 <= size <= most:
            raise ConfigError(f"{file.path}: the number of {name} is {size}, expected 1 to {most}")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    head_dim = keys.integer("attention.key_length", None)
    if keys.get("attention.value_length", head_dim) != head_dim:
        raise ConfigError(f"{file.path}: {arch}.attention.value_length differs from key_length {head_dim}")
    head_size = head_dim or embed // heads
    if keys.get("rope.dimension_count", head_size) != head_size:
        raise ConfigError(f"{file.path}: {arch}.rope.dimension_count is not the head size {head_size}")
    for name, usual in (("attention.causal", True), ("expert_count", 0), ("expert_used_count", 0)):
        if keys.get(name, usual) != usual:
            raise ConfigError(f"{file.path}: {arch}.{name} {keys.get(name)} is not supported")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: no tensor 'token_embd.weight'")
    theta = keys.real("rope.freq_base", 10_000.0)
    length = keys.integer("context_length")

    def has(name: str) -> bool:
        return f"blk.0.{name}.bias" in file.tensors

    found: dict[str, Any] = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "num_layers": layers,
        "embed_dim": embed,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": None if head_size == embed // heads and embed % heads == 0 else head_size,
        "mlp_dim": keys.integer("feed_forward_length"),
        "max_length": length,
        # Written as float32: 9.99999997e-06 is 1e-05.
        "norm_eps": float(f"{keys.real('attention.layer_norm_rms_epsilon'):.6g}"),
        "qkv_bias": has("attn_q"),
        "out_bias": has("attn_output"),
        "mlp_bias": has("ffn_down"),
        "qk_norm": arch in ("qwen3", "gemma3"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(keys, head_size, theta, length),
        "tie_embeddings": "output.weight" not in file.tensors,
    }
    if arch.startswith("gemma"):
        found |= _gemma(keys, arch, layers, embed, heads, head_size)
    elif keys.integer("attention.sliding_window", length) < length:
        raise ConfigError(f"{file.path}: {arch}.attention.sliding_window is not supported for this architecture")
    keys.check_all_read()
    try:
        return DecoderConfig(**found)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from error


def _gemma(keys: "_Keys", arch: str, layers: int, embed: int, heads: int, head_size: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "norm_unit_offset": True,
        "activation": "gelu_tanh",
        "embedding_scale": embed**0.5,
    }
    if arch == "gemma":
        return found
    # The 27B models, known by their depth, scale attention by their width.
    scale = embed / heads if layers == {"gemma2": 46, "gemma3": 62}[arch] else head_size
    found |= {"norm_placement": "sandwich", "attention_scale": None if scale == head_size else scale**-0.5}
    window = keys.integer("attention.sliding_window", 4096 if arch == "gemma2" else None)
    found["window"] = window
    if arch == "gemma2":
        found["window_pattern"] = (True, False)
        for option, key, usual in (("attention", "attn", 50.0), ("final", "final", 30.0)):
            found[f"{option}_softcap"] = keys.real(f"{key}_logit_softcapping", usual)
        return found
    for key in ("attn", "final"):
        if (cap := keys.real(f"{key}_logit_softcapping", None)) is not None:
            found[{"attn": "attention", "final": "final"}[key] + "_softcap"] = cap
    if isinstance(keys.get("attention.sliding_window_pattern"), list):
        found["window_pattern"] = tuple(bool(x) for x in keys.get("attention.sliding_window_pattern"))
    else:
        period = keys.integer("attention.sliding_window_pattern", 6)
        found["window_pattern"] = (True,) * min(period - 1, MOST_LAYERS) + (False,)
    if window is not None:
        found["rope_theta_local"] = keys.real("rope.freq_base_swa", 10_000.0)
    return found


def _rope_scaling(keys: "_Keys", head_size: int, theta: float, length: int) -> RopeScaling | None:
    kind = keys.get("rope.scaling.type", "none")
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 0.0)) or 1.0
    original = keys.integer("rope.scaling.original_context_length", 0)
    attention_factor = keys.real("rope.scaling.attn_factor", None)
    fast, slow = keys.real("rope.scaling.yarn_beta_fast", 32.0), keys.real("rope.scaling.yarn_beta_slow", 1.0)
    keys.get("rope.scaling.finetuned")
    factors = keys.file.tensors.get("rope_freqs.weight")
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(
            f"{keys.file.path}: rope.scaling.type '{kind}': {nearest(str(kind), ('none', 'linear', 'yarn'))}"
        )
    if factors is not None:
        if kind != "none":
            raise ConfigError(f"{keys.file.path}: rope_freqs.weight and rope.scaling.type '{kind}' at once")
        return _llama3_scaling(keys.file, head_size, theta, original)
    if kind == "yarn":
        gain = None if attention_factor is None else float(attention_factor) * (0.1 * math.log(factor) + 1.0)
        return RopeScaling("yarn", factor, original or length, beta_fast=fast, beta_slow=slow, attention_factor=gain)
    # A factor without a type is linear, as in the first files that had one.
    return None if factor == 1.0 else RopeScaling("linear", factor, original or int(length / factor))


def _llama3_scaling(file: File, head_size: int, theta: float, original: int) -> RopeScaling:
    """The rule of Llama 3.1 that gives `rope_freqs.weight`: by how much each frequency is divided."""
    tensor = file.tensors["rope_freqs.weight"]
    if tensor.type != "F32" or tensor.shape != (head_size // 2,):
        raise CheckpointError(
            f"{file.path}: rope_freqs.weight is {tensor.type} {tensor.shape}, expected F32 ({head_size // 2},)"
        )
    divisors = tensor.raw.view("<f4").reshape(-1)
    if not (np.isfinite(divisors).all() and (divisors >= 1).all()):
        raise CheckpointError(f"{file.path}: rope_freqs.weight has numbers below 1, or not finite")
    plain = np.asarray(frequencies(head_size, theta))
    # Nothing but the largest divisor is in the file; the published models have these other numbers.
    for length in (original or 8192, 8192):
        scaling = RopeScaling("llama3", float(np.max(divisors)), length)
        rule = plain / np.asarray(frequencies(head_size, theta, scaling))
        if rule.shape == divisors.shape and np.allclose(rule, divisors, rtol=1e-3):
            return scaling
    raise ConfigError(
        f"{file.path}: rope_freqs.weight does not follow the rule of Llama 3.1 for {original or 8192} tokens"
    )


def places(arch: str, c: DecoderConfig) -> tuple[dict[str, Place], dict[str, Place]]:
    """The tensors that a model has: by name, and by name within `blk.<i>.`."""
    embed, mlp = c.embed_dim, c.mlp_dim
    queries, keys = c.num_heads * c.head_size, c.kv_heads * c.head_size
    # Converters to GGUF add Gemma's one; in jaxlm scales are what is learned.
    offset = -1.0 if c.norm_unit_offset else 0.0
    # For this architecture alone converters reorder rotary dimensions.
    permuted = arch == "llama"

    outer = {
        "token_embd.weight": Place(("embedding", "table"), (c.vocab_size, embed)),
        "output_norm.weight": Place(("final_norm", "scale"), (embed,), offset=offset),
    }
    if not c.tie_embeddings:
        outer["output.weight"] = Place(("head", "kernel"), (embed, c.vocab_size), kernel=True)

    block: dict[str, Place] = {}

    def kernel(name: str, path: tuple[str, ...], size: tuple[int, int], bias: bool, heads: int | None = None):
        heads = heads if permuted else None
        block[f"{name}.weight"] = Place((*path, "kernel"), size, True, heads)
        if bias:
            block[f"{name}.bias"] = Place((*path, "bias"), size[1:], False, heads)

    def norm(name: str, *path: str, size: int = embed):
        block[f"{name}.weight"] = Place((*path, "scale"), (size,), offset=offset)

    kernel("attn_q", ("attention", "query"), (embed, queries), c.qkv_bias, c.num_heads)
    kernel("attn_k", ("attention", "key"), (embed, keys), c.qkv_bias, c.kv_heads)
    kernel("attn_v", ("attention", "value"), (embed, keys), c.qkv_bias)
    kernel("attn_output", ("attention", "out"), (queries, embed), c.out_bias)
    kernel("ffn_gate", ("mlp", "gate"), (embed, mlp), c.mlp_bias)
    kernel("ffn_up", ("mlp", "up"), (embed, mlp), c.mlp_bias)
    kernel("ffn_down", ("mlp", "down"), (mlp, embed), c.mlp_bias)
    norm("attn_norm", "attention_norm")
    norm("ffn_norm", "mlp_norm")
    if c.qk_norm:
        norm("attn_q_norm", "attention", "query_norm", size=c.head_size)
        norm("attn_k_norm", "attention", "key_norm", size=c.head_size)
    if c.norm_placement == "sandwich":
        norm("post_attention_norm", "attention_post_norm")
        norm("post_ffw_norm", "mlp_post_norm")
    return outer, block


class _Keys:
    """The metadata of one architecture, and which of them nobody asked for."""

    # Say nothing that the tensors' shapes or other keys do not.
    _IDLE = frozenset({"vocab_size", "tensor_data_layout", "use_parallel_residual", "rope.scaling.finetuned"})

    def __init__(self, file: File, arch: str):
        self.file, self.prefix = file, f"{arch}."
        self.values: Mapping[str, Any] = {
            k.removeprefix(self.prefix): v for k, v in file.metadata.items() if k.startswith(self.prefix)
        }
        self.read = set(self._IDLE)

    def get(self, name: str, usual: Any = None) -> Any:
        self.read.add(name)
        return self.values.get(name, usual)

    def need(self, name: str) -> Any:
        if name not in self.values:
            raise CheckpointError(f"{self.file.path}: no metadata '{self.prefix}{name}'")
        return self.get(name)

    def integer(self, name: str, usual: Any = _NEEDED) -> Any:
        """A whole number that a size may be; what is absent is `usual`."""
        return self._of(name, usual, int, f"a whole number below {_MOST}")

    def real(self, name: str, usual: Any = _NEEDED) -> Any:
        """A finite number that is not negative, as a float."""
        value = self._of(name, usual, (int, float), "a number")
        return None if value is None else float(value)

    def _of(self, name: str, usual: Any, kind: Any, expected: str) -> Any:
        value = self.need(name) if usual is _NEEDED else self.get(name, usual)
        if value is usual:
            return usual
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 <= value < _MOST:
            raise ConfigError(f"{self.file.path}: {self.prefix}{name} is {str(value)[:60]}, expected {expected}")
        return value

    def check_all_read(self) -> None:
        if unread := sorted(set(self.values) - self.read):
            names = ", ".join(f"{self.prefix}{name} = {str(self.values[name])[:40]}" for name in unread)
            raise ConfigError(f"{self.file.path}: these settings are not supported: {names}")
