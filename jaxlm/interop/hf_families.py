"""The families of Hugging Face models that our decoder expresses: keys of their `config.json` <-> our configuration.

A family is a pair of functions, `read` and `write`, and the defaults of its configuration class in `transformers`
(5.23), whose files may leave them out. Keys that no `read` asks for are the business of `jaxlm.interop.hf_config`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.core.errors import ConfigError
from jaxlm.interop import hf_keys
from jaxlm.interop.hf_keys import Keys
from jaxlm.models import DecoderConfig
from jaxlm.models.config import MOST_LAYERS


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of `transformers`. `read` takes the keys of a `config.json`, `write` gives them."""

    name: str
    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Keys], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]


def _rms(keys: Keys, activation: str | None = None, **fields: Any) -> DecoderConfig:
    """What the descendants of Llama share."""
    if fields.get("window") is None or not any(fields.get("window_pattern", (True,))):
        fields = {k: v for k, v in fields.items() if k not in ("window", "window_pattern")}
    return DecoderConfig(
        vocab_size=keys.integer("vocab_size"),
        num_layers=keys.integer("num_hidden_layers"),
        embed_dim=keys.integer("hidden_size"),
        num_heads=keys.integer("num_attention_heads"),
        mlp_dim=keys.integer("intermediate_size"),
        num_kv_heads=keys.integer("num_key_value_heads", None),
        head_dim=keys.integer("head_dim", None),
        max_length=keys.integer("max_position_embeddings"),
        norm_eps=float(keys.get("rms_norm_eps")),
        activation=activation or hf_keys.activation(keys, "hidden_act"),
        tie_embeddings=keys.flag("tie_word_embeddings"),
        init_std=float(keys.get("initializer_range", zero=True)),
        **fields,
    )


def _rms_keys(c: DecoderConfig, activation: str = "hidden_act", **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        activation: hf_keys.activation_name(c),
        "max_position_embeddings": hf_keys.position_key(c),
        "initializer_range": c.init_std,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_theta": c.rope_theta,
        "rope_scaling": hf_keys.scaling_keys(c.rope_scaling),
        "use_cache": True,
        **more,
    }


def _divides(c: DecoderConfig) -> None:
    """A check that several of `transformers`' configurations make, whatever their head_dim."""
    if c.embed_dim % c.num_heads:
        raise ConfigError(f"embed_dim {c.embed_dim} divisible by num_heads {c.num_heads}")


# The families.


def _read_llama(keys: Keys) -> DecoderConfig:
    keys.only("rope_interleaved", False, None)
    bias = keys.flag("attention_bias")
    rope = hf_keys.flat_rotation(keys, keys.peek("max_position_embeddings"))
    return _rms(keys, qkv_bias=bias, out_bias=bias, mlp_bias=keys.flag("mlp_bias"), **rope)


def _write_llama(c: DecoderConfig) -> dict[str, Any]:
    _divides(c)
    return _rms_keys(c, attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias)


def _read_mistral(keys: Keys) -> DecoderConfig:
    rope = hf_keys.flat_rotation(keys, keys.peek("max_position_embeddings"))
    return _rms(keys, window=keys.integer("sliding_window", None), **rope)


def _write_mistral(c: DecoderConfig) -> dict[str, Any]:
    return _rms_keys(c, sliding_window=c.window)


def _qwen_window(keys: Keys) -> dict[str, Any]:
    layers = hf_keys.num_layers(keys)
    window, first = keys.integer("sliding_window", None), keys.integer("max_window_layers", zero=True)
    pattern = hf_keys.window_pattern(keys, layers) or tuple(i >= first for i in range(layers))
    return {"window": window, "window_pattern": pattern} if keys.flag("use_sliding_window") else {}


def _qwen_window_keys(c: DecoderConfig) -> dict[str, Any]:
    out = {"use_sliding_window": c.window is not None, "sliding_window": c.window, "max_window_layers": c.num_layers}
    return out if c.window is None else {**out, "layer_types": hf_keys.layer_types(c)}


def _read_qwen2(keys: Keys) -> DecoderConfig:
    rope = hf_keys.flat_rotation(keys, keys.peek("max_position_embeddings"))
    return _rms(keys, qkv_bias=True, **_qwen_window(keys), **rope)


def _write_qwen2(c: DecoderConfig) -> dict[str, Any]:
    keys = _rms_keys(c, **_qwen_window_keys(c))
    if c.head_size * c.num_heads == c.embed_dim:
        del keys["head_dim"]
    return keys


def _read_qwen3(keys: Keys) -> DecoderConfig:
    bias = keys.flag("attention_bias")
    rope = hf_keys.flat_rotation(keys, keys.peek("max_position_embeddings"))
    return _rms(keys, qk_norm=True, qkv_bias=bias, out_bias=bias, **_qwen_window(keys), **rope)


def _write_qwen3(c: DecoderConfig) -> dict[str, Any]:
    return _rms_keys(c, attention_bias=c.qkv_bias, **_qwen_window_keys(c))


def _gemma(keys: Keys, **fields: Any) -> DecoderConfig:
    keys.only("use_bidirectional_attention", None, False)
    bias = keys.flag("attention_bias")
    # Files of Gemma 1 say `gelu` and mean its tanh form.
    known = {**hf_keys.ACTIVATIONS, "gelu": "gelu_tanh"}
    activation = hf_keys.activation(keys, "hidden_act", "hidden_activation", known=known)
    scale = keys.peek("hidden_size") ** 0.5
    return _rms(keys, activation, norm_unit_offset=True, qkv_bias=bias, out_bias=bias, embedding_scale=scale, **fields)


def _read_gemma(keys: Keys) -> DecoderConfig:
    return _gemma(keys, **hf_keys.flat_rotation(keys, keys.peek("max_position_embeddings")))


def _write_gemma(c: DecoderConfig) -> dict[str, Any]:
    return _rms_keys(c, attention_bias=c.qkv_bias)


def _read_gemma2(keys: Keys) -> DecoderConfig:
    return _gemma(
        keys,
        norm_placement="sandwich",
        attention_scale=keys.get("query_pre_attn_scalar") ** -0.5,
        attention_softcap=keys.get("attn_logit_softcapping", None),
        final_softcap=keys.get("final_logit_softcapping", None),
        window=keys.integer("sliding_window", None),
        window_pattern=hf_keys.window_pattern(keys, hf_keys.num_layers(keys)) or (True, False),
        **hf_keys.flat_rotation(keys, keys.peek("max_position_embeddings")),
    )


def _write_gemma2(c: DecoderConfig) -> dict[str, Any]:
    _divides(c)
    return _rms_keys(c, "hidden_activation", attn_logit_softcapping=c.attention_softcap, **_gemma_keys(c))


def _gemma_keys(c: DecoderConfig) -> dict[str, Any]:
    scale = c.head_size**-0.5 if c.attention_scale is None else c.attention_scale
    return {
        "attention_bias": c.qkv_bias,
        "query_pre_attn_scalar": round(scale**-2),
        "final_logit_softcapping": c.final_softcap,
        "sliding_window": c.window,
        "layer_types": hf_keys.layer_types(c),
    }


def _read_gemma3(keys: Keys) -> DecoderConfig:
    # transformers 5.23 has the key and does not use it.
    keys.only("attn_logit_softcapping", None)
    period = keys.integer("sliding_window_pattern", keys.integer("_sliding_window_pattern", 6))
    if period < 1:
        raise ConfigError(f"config.json: 'sliding_window_pattern' is {period}, expected at least 1")
    max_length, rope = keys.peek("max_position_embeddings"), hf_keys.rope_dict(keys)
    theta, local_theta = keys.get("rope_theta", 1e6), keys.get("rope_local_base_freq", 1e4)
    if rope.keys() & {"full_attention", "sliding_attention"}:
        by_kind = Keys(rope, {}, "rope_parameters.")
        rope, local = by_kind.get("full_attention", {}, dict), by_kind.get("sliding_attention", {}, dict)
        for name, value in by_kind.unread().items():
            raise ConfigError(f"config.json: 'rope_parameters.{name}' is {value!r}, expected a kind of layer")
        local = hf_keys.rotation(local, local_theta, max_length)
        if "rope_scaling" in local:
            raise ConfigError(f"config.json: rope type '{local['rope_scaling'].kind}' in sliding_attention")
        local_theta = local["rope_theta"]
    pattern = hf_keys.window_pattern(keys, hf_keys.num_layers(keys))
    return _gemma(
        keys,
        norm_placement="sandwich",
        qk_norm=True,
        attention_scale=keys.get("query_pre_attn_scalar") ** -0.5,
        final_softcap=keys.get("final_logit_softcapping", None),
        window=keys.integer("sliding_window", None),
        window_pattern=pattern or (True,) * min(period - 1, MOST_LAYERS) + (False,),
        rope_theta_local=float(local_theta),
        **hf_keys.rotation(rope, theta, max_length),
    )


def _write_gemma3(c: DecoderConfig) -> dict[str, Any]:
    _divides(c)
    local = c.rope_theta if c.rope_theta_local is None else c.rope_theta_local
    return _rms_keys(c, "hidden_activation", rope_local_base_freq=local, **_gemma_keys(c))


def _read_neox(keys: Keys) -> DecoderConfig:
    max_length, rope = keys.peek("max_position_embeddings"), hf_keys.rope_dict(keys)
    theta, bias = keys.get("rotary_emb_base"), keys.flag("attention_bias")
    rope = {"partial_rotary_factor": keys.get("rotary_pct"), **rope}
    return DecoderConfig(
        vocab_size=keys.integer("vocab_size"),
        num_layers=keys.integer("num_hidden_layers"),
        embed_dim=keys.integer("hidden_size"),
        num_heads=keys.integer("num_attention_heads"),
        mlp_dim=keys.integer("intermediate_size"),
        max_length=keys.integer("max_position_embeddings"),
        norm="layer",
        norm_eps=float(keys.get("layer_norm_eps")),
        parallel_residual=keys.flag("use_parallel_residual"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        mlp_gated=False,
        activation=hf_keys.activation(keys, "hidden_act"),
        tie_embeddings=keys.flag("tie_word_embeddings"),
        init_std=float(keys.get("initializer_range", zero=True)),
        **hf_keys.rotation(rope, theta, max_length, partial=True),
    )


def _write_neox(c: DecoderConfig) -> dict[str, Any]:
    _divides(c)
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "hidden_act": hf_keys.activation_name(c),
        "max_position_embeddings": hf_keys.position_key(c),
        "initializer_range": c.init_std,
        "layer_norm_eps": c.norm_eps,
        "use_parallel_residual": c.parallel_residual,
        "attention_bias": c.qkv_bias,
        "rotary_pct": c.rope_fraction,
        "rotary_emb_base": c.rope_theta,
        "rope_scaling": hf_keys.scaling_keys(c.rope_scaling),
        "tie_word_embeddings": c.tie_embeddings,
        "use_cache": True,
    }


def _read_gpt2(keys: Keys) -> DecoderConfig:
    keys.only("add_cross_attention", False)
    embed = keys.integer("n_embd")
    return DecoderConfig(
        vocab_size=keys.integer("vocab_size"),
        num_layers=keys.integer("n_layer"),
        embed_dim=embed,
        num_heads=keys.integer("n_head"),
        mlp_dim=keys.integer("n_inner", 4 * embed),
        max_length=keys.integer("n_positions"),
        norm="layer",
        norm_eps=float(keys.get("layer_norm_epsilon")),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        mlp_gated=False,
        activation=hf_keys.activation(keys, "activation_function"),
        position="learned",
        attention_scale=None if keys.flag("scale_attn_weights") else 1.0,
        attention_scale_by_layer=keys.flag("scale_attn_by_inverse_layer_idx"),
        tie_embeddings=keys.flag("tie_word_embeddings"),
        init_std=float(keys.get("initializer_range", zero=True)),
    )


def _write_gpt2(c: DecoderConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "n_embd": c.embed_dim,
        "n_inner": c.mlp_dim,
        "n_layer": c.num_layers,
        "n_head": c.num_heads,
        "n_positions": c.max_length,
        "activation_function": hf_keys.activation_name(c, tanh="gelu_new"),
        "initializer_range": c.init_std,
        "layer_norm_epsilon": c.norm_eps,
        "scale_attn_weights": c.attention_scale != 1.0,
        "scale_attn_by_inverse_layer_idx": c.attention_scale_by_layer,
        "tie_word_embeddings": c.tie_embeddings,
        "use_cache": True,
    }


_ANY = {"initializer_range": 0.02}
_RMS = {**_ANY, "hidden_act": "silu", "rms_norm_eps": 1e-6}
_QWEN = {
    **_RMS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA = {
    **_ANY,
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_GEMMA2 = {
    **_GEMMA,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA3 = {
    **_GEMMA2,
    # The text part of a model that sees images leaves out even these.
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131_072,
}
_NEOX = {
    **_ANY,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10_000.0,
}
_GPT2 = {
    **_ANY,
    "n_positions": 1024,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}

_LLAMA = {**_RMS, "max_position_embeddings": 2048}
_MISTRAL = {**_RMS, "num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}
_GEMMA1 = {**_GEMMA, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 16}
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "llama", "LlamaForCausalLM", _LLAMA, _read_llama, _write_llama),
        Family("mistral", "mistral", "MistralForCausalLM", _MISTRAL, _read_mistral, _write_mistral),
        Family("qwen2", "qwen2", "Qwen2ForCausalLM", _QWEN, _read_qwen2, _write_qwen2),
        Family("qwen3", "qwen3", "Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, _read_qwen3, _write_qwen3),
        Family("gpt_neox", "gpt_neox", "GPTNeoXForCausalLM", _NEOX, _read_neox, _write_neox),
        Family("gpt2", "gpt2", "GPT2LMHeadModel", _GPT2, _read_gpt2, _write_gpt2),
        Family("gemma", "gemma", "GemmaForCausalLM", _GEMMA1, _read_gemma, _write_gemma),
        Family("gemma2", "gemma2", "Gemma2ForCausalLM", {**_GEMMA2, **_CAPS}, _read_gemma2, _write_gemma2),
        Family("gemma3", "gemma3_text", "Gemma3ForCausalLM", _GEMMA3, _read_gemma3, _write_gemma3),
    )
}
"""In the order in which they are tried for a model that several can express."""
