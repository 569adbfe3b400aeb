"""Writes `golden_logits.npz`: what Hugging Face transformers computes with the parameters of `golden.py`.

    pip install -e '.[bench]' && python tests/models/make_golden.py

Models are built from configurations written here; nothing is downloaded.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers

from jaxlm.core import trees
from jaxlm.models import DecoderConfig
from tests.models import golden

Params = Mapping[str, Any]

FAMILY = {
    "llama3.2": "llama",
    "linear": "llama",
    "dynamic": "llama",
    "yarn": "qwen3",
    "neox_serial": "neox",
    "gpt2_scaled": "gpt2",
    "gemma3_scaled": "gemma3",
}
"""The family of the cases that are not named after theirs."""


def main() -> None:
    logits, checksums = {}, {}
    for name, config in golden.CASES.items():
        family = FAMILY.get(name, name)
        params = golden.parameters(config)
        model = build(family, config)
        load(model, weights(family, config, params))
        with torch.no_grad():
            out = model(torch.from_numpy(golden.tokens()).long(), use_cache=False).logits
        logits[name] = out.float().numpy()
        checksums[name] = golden.checksum(params)
        print(f"{name:15s} {type(model).__name__:22s} logits {out.std():.3f} (std), {out.abs().max():.2f} (max)")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}
    meta = json.dumps({"versions": versions, "checksums": checksums})
    np.savez_compressed(golden.PATH, meta=np.array(meta), **logits)
    print(f"{golden.PATH.name}: {golden.PATH.stat().st_size:,} bytes, {versions}")


def build(family: str, c: DecoderConfig) -> torch.nn.Module:
    """The transformers model with a configuration's switches, in float32, random weights."""
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.max_length,
            n_embd=c.embed_dim,
            n_layer=c.num_layers,
            n_head=c.num_heads,
            n_inner=c.mlp_dim,
            layer_norm_epsilon=c.norm_eps,
            scale_attn_by_inverse_layer_idx=c.attention_scale_by_layer,
            **ids,
        )
    else:
        shared = {
            "vocab_size": c.vocab_size,
            "hidden_size": c.embed_dim,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "intermediate_size": c.mlp_dim,
            "max_position_embeddings": c.max_length,
            "tie_word_embeddings": c.tie_embeddings,
            **ids,
        }
        if family == "neox":
            config = transformers.GPTNeoXConfig(
                **shared,
                layer_norm_eps=c.norm_eps,
                use_parallel_residual=c.parallel_residual,
                rope_parameters={**rope(c), "partial_rotary_factor": c.rope_fraction},
            )
        else:
            shared |= {"num_key_value_heads": c.kv_heads, "head_dim": c.head_size, "rms_norm_eps": c.norm_eps}
            config = rms_config(family, c, shared)
    config._attn_implementation = "eager"
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def rms_config(family: str, c: DecoderConfig, shared: dict[str, Any]) -> transformers.PreTrainedConfig:
    """The configuration of the families that descend from Llama."""
    if family not in ("gemma2", "gemma3"):
        if c.rope_scaling is not None and c.rope_scaling.kind == "dynamic":
            shared["max_position_embeddings"] = c.rope_scaling.original_length
        if family == "qwen2":
            del shared["head_dim"]
        classes = {
            "llama": transformers.LlamaConfig,
            "smollm2": transformers.LlamaConfig,
            "qwen2": transformers.Qwen2Config,
            "qwen3": transformers.Qwen3Config,
            "gemma": transformers.GemmaConfig,
        }
        return classes[family](**shared, rope_parameters=rope(c))
    scale = c.head_size**-0.5 if c.attention_scale is None else c.attention_scale
    layer_types = ["full_attention" if kind.window is None else "sliding_attention" for kind in c.layer_kinds()]
    shared |= {
        "sliding_window": c.window,
        "layer_types": layer_types,
        "query_pre_attn_scalar": round(scale**-2),
        "final_logit_softcapping": c.final_softcap,
        "attn_logit_softcapping": c.attention_softcap,
    }
    if family == "gemma2":
        return transformers.Gemma2Config(**shared, rope_parameters=rope(c))
    local = {"rope_type": "default", "rope_theta": c.rope_theta_local}
    return transformers.Gemma3TextConfig(
        **shared, rope_parameters={"full_attention": rope(c), "sliding_attention": local}
    )


def rope(c: DecoderConfig) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 names them."""
    scaling = c.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": c.rope_theta}
    out = {"rope_type": scaling.kind, "rope_theta": c.rope_theta, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        out |= {"low_freq_factor": scaling.low_frequency_factor, "high_freq_factor": scaling.high_frequency_factor}
    if scaling.kind == "yarn":
        out |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return out


def weights(family: str, c: DecoderConfig, params: Params) -> dict[str, np.ndarray]:
    """Our parameters under the names and in the layouts of a transformers state dict."""
    out = {}
    blocks = params["blocks"][0]
    for i in range(c.num_layers):
        layer = {path: leaf[i] for path, leaf in trees.named_leaves(blocks)}
        named = {"neox": neox_layer, "gpt2": gpt2_layer}.get(family, llama_layer)(c, layer)
        prefix = {"neox": "gpt_neox.layers", "gpt2": "transformer.h"}.get(family, "model.layers")
        out |= {f"{prefix}.{i}.{name}": value for name, value in named.items()}
    embedding, norm = {
        "neox": ("gpt_neox.embed_in", "gpt_neox.final_layer_norm"),
        "gpt2": ("transformer.wte", "transformer.ln_f"),
    }.get(family, ("model.embed_tokens", "model.norm"))
    out[f"{embedding}.weight"] = params["embedding"]["table"]
    out[f"{norm}.weight"] = params["final_norm"]["scale"]
    if "bias" in params["final_norm"]:
        out[f"{norm}.bias"] = params["final_norm"]["bias"]
    if c.position == "learned":
        out["transformer.wpe.weight"] = params["positions"]["table"]
    out["lm_head.weight"] = params["embedding"]["table"] if c.tie_embeddings else params["head"]["kernel"].T
    return out


def llama_layer(c: DecoderConfig, layer: Params) -> dict[str, np.ndarray]:
    """A layer of Llama, Qwen or Gemma. Linear weights are `(out, in)`."""
    linears = {f"attention/{ours}": f"self_attn.{ours[0]}_proj" for ours in ("query", "key", "value", "out")}
    linears |= {f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    norms = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention/query_norm": "self_attn.q_norm",
        "attention/key_norm": "self_attn.k_norm",
    }
    if c.norm_placement == "sandwich":
        norms |= {
            "attention_post_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_post_norm": "post_feedforward_layernorm",
        }
    out = {}
    for path, value in layer.items():
        module, leaf = path.rsplit("/", 1)
        name = linears.get(module) or norms[module]
        out[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"] = value.T
    return out


def neox_layer(c: DecoderConfig, layer: Params) -> dict[str, np.ndarray]:
    """A layer of GPT-NeoX: rows of the joint projection are ordered head by head, `q k v` within each."""
    heads, size = c.num_heads, c.head_size
    parts = ("query", "key", "value")
    kernels = [layer[f"attention/{part}/kernel"].T.reshape(heads, size, c.embed_dim) for part in parts]
    biases = [layer[f"attention/{part}/bias"].reshape(heads, size) for part in parts]
    out = {
        "attention.query_key_value.weight": np.stack(kernels, 1).reshape(3 * heads * size, c.embed_dim),
        "attention.query_key_value.bias": np.stack(biases, 1).reshape(-1),
    }
    for ours, theirs in (
        ("attention/out", "attention.dense"),
        ("mlp/up", "mlp.dense_h_to_4h"),
        ("mlp/down", "mlp.dense_4h_to_h"),
    ):
        out |= {f"{theirs}.weight": layer[f"{ours}/kernel"].T, f"{theirs}.bias": layer[f"{ours}/bias"]}
    for ours, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")):
        out |= {f"{theirs}.weight": layer[f"{ours}/scale"], f"{theirs}.bias": layer[f"{ours}/bias"]}
    return out


def gpt2_layer(c: DecoderConfig, layer: Params) -> dict[str, np.ndarray]:
    """A layer of GPT-2, whose weights are `(in, out)`; columns of the joint projection are all q, all k, all v."""
    parts = [f"attention/{part}" for part in ("query", "key", "value")]
    out = {
        "attn.c_attn.weight": np.concatenate([layer[f"{part}/kernel"] for part in parts], axis=1),
        "attn.c_attn.bias": np.concatenate([layer[f"{part}/bias"] for part in parts]),
    }
    for ours, theirs in (("attention/out", "attn.c_proj"), ("mlp/up", "mlp.c_fc"), ("mlp/down", "mlp.c_proj")):
        out |= {f"{theirs}.weight": layer[f"{ours}/kernel"], f"{theirs}.bias": layer[f"{ours}/bias"]}
    for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
        out |= {f"{theirs}.weight": layer[f"{ours}/scale"], f"{theirs}.bias": layer[f"{ours}/bias"]}
    return out


def load(model: torch.nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Copies arrays into a model; every name must be known, every parameter given, every shape right."""
    state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
    result = model.load_state_dict(state, strict=False)
    buffers = {name for name, _ in model.named_buffers()}
    missing = set(result.missing_keys) - buffers
    if missing or result.unexpected_keys:
        raise SystemExit(f"missing {sorted(missing)}, unexpected {result.unexpected_keys}")


if __name__ == "__main__":
    main()
