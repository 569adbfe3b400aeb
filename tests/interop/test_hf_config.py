"""Configurations: published `config.json` files against our presets, old keys and new, and every refusal."""

import contextlib
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError
from jaxlm.interop import hf_config
from jaxlm.layers import RopeScaling
from jaxlm.models import DecoderConfig
from jaxlm.models.presets import PRESETS, preset
from jaxlm.testing import tiny_config

# What the models' publishers wrote, without keys that repeat what others here show.
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 49152,
}
LLAMA32 = {
    **SMOLLM2,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 896,
    "initializer_range": 0.02,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3 = {
    **QWEN25,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rope_scaling": None,
    "sliding_window": None,
}
GEMMA = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA2 = {
    **GEMMA,
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "model_type": "gemma2",
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA3 = {
    "_sliding_window_pattern": 6,
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 640,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "layer_types": ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)],
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 512,
    "use_bidirectional_attention": False,
    "vocab_size": 262144,
}
PUBLISHED = {
    "smollm2-135m": SMOLLM2,
    "llama-3.2-1b": LLAMA32,
    "pythia-70m": PYTHIA,
    "gpt2": GPT2,
    "qwen2.5-0.5b": QWEN25,
    "qwen3-0.6b": QWEN3,
    "gemma-2b": GEMMA,
    "gemma-2-2b": GEMMA2,
    "gemma-3-270m": GEMMA3,
}


def read(values, *remove, ignore_keys=(), **changes):
    merged = {k: v for k, v in {**values, **changes}.items() if k not in remove}
    return hf_config.read(merged, ignore_keys)[1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_give_our_presets(name):
    found = read(PUBLISHED[name])
    assert not hf_config.differences(preset(name), found)
    assert found.max_length == preset(name).max_length
    assert found.init_std == pytest.approx(preset(name).init_std, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("minicpm")])  # no family has these
def test_every_preset_can_be_written(name):
    family, values = hf_config.write(preset(name))
    again_family, again = hf_config.read(values)
    assert family is again_family
    assert not hf_config.differences(preset(name), again)
    assert hf_config.write(again)[1] == values


class TestOldAndNewKeys:
    def test_rope_parameters(self):
        scaling = LLAMA32["rope_scaling"]
        new = {**scaling, "rope_theta": 500000.0}
        found = read(LLAMA32, "rope_theta", "rope_scaling", rope_parameters=new)
        assert found == read(LLAMA32)
        # Where both stand there, they may not contradict each other.
        assert read(LLAMA32, "rope_scaling", rope_parameters=new) == found
        with pytest.raises(ConfigError, match=r"rope_theta is 10000\.0 and 500000\.0 in rope_parameters"):
            read(LLAMA32, "rope_scaling", rope_parameters=new, rope_theta=10000.0)
        with pytest.raises(ConfigError, match="expected one of them"):
            read(LLAMA32, rope_parameters={"rope_type": "default"})

    def test_the_older_name_of_the_type(self):
        found = read(SMOLLM2, rope_scaling={"type": "linear", "factor": 2.0})
        assert (found.rope_scaling.kind, found.rope_scaling.factor) == ("linear", 2.0)

    def test_neox(self):
        new = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
        assert read(PYTHIA, "rotary_pct", "rotary_emb_base", rope_parameters=new) == read(PYTHIA)
        assert read(PYTHIA, "rotary_pct", "rotary_emb_base") == read(PYTHIA)

    def test_gemma_3(self):
        full = {"rope_type": "default", "rope_theta": 1000000.0}
        local = {"rope_type": "default", "rope_theta": 10000.0}
        new = {"full_attention": full, "sliding_attention": local}
        found = read(GEMMA3, "rope_theta", "rope_local_base_freq", rope_parameters=new)
        assert found == read(GEMMA3)
        assert not hf_config.differences(found, read(GEMMA3, "layer_types", sliding_window_pattern=6))
        assert hf_config.differences(found, read(GEMMA3, "layer_types", sliding_window_pattern=3))

    def test_a_gemma_3_that_sees_images_gives_its_text_model(self):
        text = {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        }
        whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
        found = read({**whole, "mm_tokens_per_image": 256, "vision_config": {"hidden_size": 1152}})
        assert (found.vocab_size, found.num_heads, found.kv_heads, found.head_size) == (262208, 8, 4, 256)
        assert (found.rope_scaling.factor, found.rope_theta_local, found.tie_embeddings) == (8.0, 1e4, True)
        with pytest.raises(ConfigError, match="'quantization_config' is"):
            read({**whole, "quantization_config": {"bits": 4}})
        with pytest.raises(ConfigError, match="model_type 'llava' has a text_config"):
            read({**whole, "model_type": "llava"})

    def test_windows(self):
        mistral = {**SMOLLM2, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
        assert read(mistral).window == 4096  # the default of its class
        assert read(mistral, sliding_window=None).window is None
        qwen = read(QWEN25, use_sliding_window=True, sliding_window=8, max_window_layers=20)
        assert [k.window for k in qwen.layer_kinds()] == [None] * 20 + [8] * 4
        assert read(QWEN25, max_window_layers=20).window is None

    def test_yarn(self):
        scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
        assert read(QWEN3, rope_scaling=scaling).rope_scaling == RopeScaling("yarn", 4.0, 8192)
        without = {"rope_type": "yarn", "original_max_position_embeddings": 8192}
        assert read(QWEN3, rope_scaling=without).rope_scaling == RopeScaling("yarn", 5.0, 8192)


@pytest.mark.parametrize(
    ("values", "changes", "message"),
    [
        (SMOLLM2, {"rope_interleaved": True}, "'rope_interleaved' is True"),
        (SMOLLM2, {"sliding_window": 512}, "'sliding_window' is 512: llama models are not known to have it"),
        (SMOLLM2, {"quantization_config": {"bits": 4}}, r"'quantization_config' is \{'bits': 4\}"),
        (SMOLLM2, {"auto_map": {"AutoModel": "x.py"}}, "'auto_map' is"),
        (SMOLLM2, {"logit_scale": 0.1}, r"'logit_scale' is 0\.1.*ignore_keys=\['logit_scale'\]"),
        (SMOLLM2, {"hidden_act": "mish"}, "'hidden_act' is 'mish'"),
        (SMOLLM2, {"hidden_size": None}, "lacks 'hidden_size'"),
        (SMOLLM2, {"hidden_size": "576"}, "'hidden_size' is '576', expected int"),
        (SMOLLM2, {"tie_word_embeddings": 1}, "'tie_word_embeddings' is 1, expected bool"),
        (SMOLLM2, {"num_key_value_heads": 4}, "num_heads 9 is not divisible by model.num_kv_heads 4"),
        (SMOLLM2, {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        (SMOLLM2, {"rope_scaling": {"rope_type": "linear"}}, r"lacks 'rope_parameters\.factor'"),
        (SMOLLM2, {"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "they differ"),
        (SMOLLM2, {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor' is 0\.5"),
        (SMOLLM2, {"rope_parameters": {"mrope_section": [1, 2]}}, r"'rope_parameters\.mrope_section' is \[1, 2\]"),
        (QWEN25, {"use_mrope": True}, "'use_mrope' is True"),
        (QWEN3, {"rope_scaling": {"rope_type": "yarn", "truncate": False}}, r"'rope_parameters\.truncate' is False"),
        (QWEN3, {"num_experts": 8}, "'num_experts' is 8"),
        (GPT2, {"add_cross_attention": True}, "'add_cross_attention' is True"),
        (GEMMA2, {"use_bidirectional_attention": True}, "'use_bidirectional_attention' is True"),
        (GEMMA2, {"layer_types": ["chunked_attention"] * 26}, "has 'chunked_attention'"),
        (GEMMA2, {"layer_types": ["full_attention"]}, "has 1 entries, expected 26"),
        (GEMMA2, {"hidden_activation": "silu"}, "the activation is given as"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, r"'attn_logit_softcapping' is 50\.0"),
        (SMOLLM2, {"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification'.*did you"),
        (SMOLLM2, {"model_type": "qwen2_moe", "architectures": None}, "'qwen2_moe' is not supported: did you mean"),
        (SMOLLM2, {"model_type": "qwen2"}, r"'qwen2' with the architecture \['LlamaForCausalLM'\]"),
    ],
)
def test_what_we_would_not_compute_is_refused_by_name(values, changes, message):
    with pytest.raises(ConfigError, match=message):
        read(values, **changes)


ROPE_KEYS = ("rope_type", "factor", "rope_theta", "original_max_position_embeddings", "beta_fast", "mscale", "type")
NUMBERS = st.sampled_from([0, 1, -1, 2, 7, 64, 0.0, 0.5, -2.5, 1e30])
SCALARS = NUMBERS | st.sampled_from([None, True, False, "", "yarn", "llama3", "dynamic", "linear", "silu"])
ROPES = st.dictionaries(st.sampled_from((*ROPE_KEYS, "low_freq_factor", "high_freq_factor")), SCALARS, max_size=6)
VALUES = SCALARS | ROPES | st.lists(SCALARS | st.lists(SCALARS, max_size=1), max_size=3)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_file_gives_a_configuration_or_a_config_error(data):
    values = dict(data.draw(st.sampled_from(list(PUBLISHED.values()))))
    keys = st.sampled_from([*values, "rope_parameters", "layer_types", "text_config", "sliding_window_pattern"])
    values |= data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=3))
    with contextlib.suppress(ConfigError):
        assert isinstance(hf_config.read(values)[1], DecoderConfig)


def test_a_key_may_be_ignored_by_name():
    assert read(SMOLLM2, logit_scale=0.1, ignore_keys=["logit_scale"]) == read(SMOLLM2)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"norm": "layer"}, "norm 'rms', not 'layer'"),
        ("llama", {"rope_fraction": 0.5}, "rope_fraction 8, not 4"),
        ("llama", {"out_bias": True}, "out_bias False, not True"),
        ("llama", {"residual_scale": 0.5}, "residual_scale None, not 0.5"),
        ("llama", {"logit_scale": 0.5}, "logit_scale None, not 0.5"),
        ("gpt2", {"position": "none"}, "position"),
        ("gpt2", {"num_kv_heads": 2}, "num_kv_heads 4, not 2"),
        ("gemma2", {"attention_scale": 0.333}, "attention_scale"),
        ("gemma2", {"embedding_scale": 2.0}, "embedding_scale"),
        ("gemma", {"activation": "gelu"}, "activation 'gelu_tanh', not 'gelu'"),
        ("gemma3", {"attention_softcap": 5.0}, "attention_softcap None, not 5.0"),
    ],
)
def test_a_model_that_no_family_expresses(family, changes, message):
    config = dataclasses.replace(tiny_config(family), **changes)
    with pytest.raises(ConfigError, match=f"no Hugging Face family expresses this model.*{message}"):
        hf_config.write(config)
