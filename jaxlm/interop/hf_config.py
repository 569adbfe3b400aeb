"""The `config.json` of Hugging Face checkpoints and ours, both ways, old keys and new.

Every key is read, known not to matter to what is computed, or refused by name with its value.

What a family can express is not stated twice: `write` makes a `config.json`, reads it again, and takes the first
family that gives back a model that computes the same.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.core.configs import to_dict
from jaxlm.core.errors import ConfigError, nearest
from jaxlm.interop.hf_families import FAMILIES, Family
from jaxlm.interop.hf_keys import Keys
from jaxlm.models import DecoderConfig

# fmt: off
_INERT = (
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "name_or_path",
    "finetuning_task", "tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "is_decoder", "is_llama_config", "attention_dropout", "hidden_dropout",
    "classifier_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "id2label", "label2id", "num_labels",
    "problem_type", "task_specific_params", "transformers.js_config", "n_ctx", "pretraining_tp",
    "gradient_checkpointing", "chunk_size_feed_forward", "reorder_and_upcast_attn", "cache_implementation",
    "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate", "do_sample", "max_length",
    "min_length", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams",
)
# fmt: on
"""Keys that no forward pass without dropout reads, or that choose among ways to compute the same."""

_IMAGES = ("text_config", "vision_config", "mm_tokens_per_image") + tuple(
    f"{name}_token_{suffix}" for name in ("boi", "eoi", "image") for suffix in ("index", "id")
)
"""Keys of a Gemma 3 that sees images that its text model does not read."""

_INERT_PREFIXES = ("_", "summary_", "unsloth_")


def read(values: Mapping[str, Any], ignore_keys: Sequence[str] = ()) -> tuple[Family, DecoderConfig]:
    """The family and configuration that a `config.json` describes.

    A Gemma 3 that sees images gives its text model. Raises `ConfigError` for an architecture that is not one of
    `FAMILIES`, a key that is missing or of the wrong type, and, by name and value, for whatever may change the
    computation and is not supported (unless `ignore_keys` names it).
    """
    if values.get("text_config") is not None:
        if not isinstance(values["text_config"], Mapping):
            raise ConfigError(f"config.json: 'text_config' is {values['text_config']!r}, expected an object")
        if values.get("model_type") != "gemma3":
            raise ConfigError(f"config.json: model_type '{values.get('model_type')}' has a text_config: {_known()}")
        rest = {name: value for name, value in values.items() if name not in _IMAGES}
        values = {**rest, "model_type": "gemma3_text", **values["text_config"], "architectures": None}
    family = _family(values)
    keys = Keys({k: v for k, v in values.items() if k not in ignore_keys}, family.defaults)
    config = family.read(keys)
    for name, value in keys.unread().items():
        if name not in _INERT and not name.startswith(_INERT_PREFIXES):
            raise ConfigError(
                f"config.json: '{name}' is {value!r}: {family.model_type} models are not known to have it, and it may "
                f"change what they compute (if it does not, pass ignore_keys=['{name}'])"
            )
    return family, config


def write(config: DecoderConfig) -> tuple[Family, dict[str, Any]]:
    """The first family that can express a model, and its `config.json`.

    Raises `ConfigError` when none can; it says how the nearest one's model would differ.
    """
    tried: list[tuple[int, str]] = []
    for family in FAMILIES.values():
        try:
            values = {"architectures": [family.architecture], "model_type": family.model_type, **family.write(config)}
            differs = differences(config, read(values)[1])
        except ConfigError as error:
            differs = [str(error)]
        if not differs:
            return family, values
        tried.append((len(differs), f"'{family.name}' would have {'; '.join(differs)}"))
    raise ConfigError(f"no Hugging Face family expresses this model; the nearest, {min(tried)[1]}")


def _known() -> str:
    return f"expected one of {', '.join(f'{f.model_type} ({f.architecture})' for f in FAMILIES.values())}"


def _family(values: Mapping[str, Any]) -> Family:
    architectures = values.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ConfigError(f"config.json: 'architectures' is {architectures!r}, expected a list of names")
    for name in architectures:
        if name not in {f.architecture for f in FAMILIES.values()}:
            known = [f.architecture for f in FAMILIES.values()]
            raise ConfigError(f"config.json: architecture '{name}' is not supported: {nearest(name, known)}")
    model_type = values.get("model_type")
    for family in FAMILIES.values():
        if model_type == family.model_type or (model_type is None and family.architecture in architectures):
            if architectures and family.architecture not in architectures:
                raise ConfigError(f"config.json: model_type '{model_type}' with the architecture {architectures}")
            return family
    known = [f.model_type for f in FAMILIES.values()]
    raise ConfigError(f"config.json: model_type '{model_type}' is not supported: {nearest(str(model_type), known)}")


_NOT_COMPUTED = ("max_length", "init_std", "init_out_std", "init_embedding_std", "precision", "remat", "attention")
"""Fields that do not change what a model computes."""


def differences(wanted: DecoderConfig, got: DecoderConfig) -> list[str]:
    """How two models' computations differ: `"norm 'rms', not 'layer'"`."""
    a, b = _essence(wanted), _essence(got)
    return [f"{name} {b[name]!r}, not {a[name]!r}" for name in a if not _same(a[name], b[name])]


def _essence(c: DecoderConfig) -> dict[str, Any]:
    """The fields that matter, each choice said in one way."""
    fields = {k: v for k, v in to_dict(c).items() if k not in _NOT_COMPUTED}
    kinds = c.layer_kinds()
    local = c.rope_theta_local if any(kind.local_rope for kind in kinds) else None
    if local == c.rope_theta and c.rope_scaling is None:
        local = None
    fields |= {
        "head_dim": c.head_size,
        "num_kv_heads": c.kv_heads,
        "attention_scale": c.head_size**-0.5 if c.attention_scale is None else c.attention_scale,
        "window": [kind.window for kind in kinds],
        "rope_theta_local": local,
        "rope_fraction": c.rotary_dim,
    }
    del fields["window_pattern"]
    fields["max_length"] = c.max_length if c.position == "learned" else None
    if c.position != "rotary":
        fields |= dict.fromkeys(("rope_theta", "rope_theta_local", "rope_scaling", "rope_fraction"))
    scaling = c.rope_scaling
    if fields["rope_scaling"] is not None:
        read = {
            "linear": (),
            "dynamic": ("original_length",),
            "llama3": ("original_length", "low_frequency_factor", "high_frequency_factor"),
            "yarn": ("original_length", "beta_fast", "beta_slow", "attention_factor"),
        }[scaling.kind]
        fields["rope_scaling"] = {name: getattr(scaling, name) for name in ("kind", "factor", *read)}
    return fields


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6)
    return a == b
