"""Checkpoints written by Hugging Face transformers, and ours opened by it. Needs torch and transformers."""

import json

import jax
import numpy as np
import pytest

from jaxlm.data.tokenizers import HuggingFaceTokenizer
from jaxlm.interop import huggingface
from tests.interop.checkpoints import tokenizer_definition
from tests.models import golden

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOKENS = golden.tokens()
_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_SHAPE = {
    **_IDS,
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_RMS = {**_SHAPE, "num_key_value_heads": 2, "rms_norm_eps": 0.01}
_THETA = {"rope_theta": 100.0}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_THETA}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_slow": 0.5, **_THETA}
_GEMMA = {**_RMS, "head_dim": 12}
_PATTERN = ["sliding_attention"] * 3 + ["full_attention"]

CASES = {
    "llama": ("LlamaConfig", _RMS),
    "llama_3": (
        "LlamaConfig",
        {**_RMS, "rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 32}, "tie_word_embeddings": True},
    ),
    "llama_biases": ("LlamaConfig", {**_RMS, "attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama_linear": ("LlamaConfig", {**_RMS, "rope_parameters": {"rope_type": "linear", "factor": 4.0, **_THETA}}),
    "llama_dynamic": (
        "LlamaConfig",
        {
            **_RMS,
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **_THETA},
        },
    ),
    "mistral": ("MistralConfig", {**_RMS, "sliding_window": 5}),
    "mistral_full": ("MistralConfig", {**_RMS, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {**_RMS, "tie_word_embeddings": True}),
    "qwen2_windows": (
        "Qwen2Config",
        {**_RMS, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    ),
    "qwen2_yarn": ("Qwen2Config", {**_RMS, "rope_parameters": {**_YARN, "mscale": 1.2, "mscale_all_dim": 0.7}}),
    "qwen3": ("Qwen3Config", {**_RMS, "head_dim": 12}),
    "qwen3_yarn": ("Qwen3Config", {**_RMS, "head_dim": 12, "attention_bias": True, "rope_parameters": _YARN}),
    "neox": ("GPTNeoXConfig", {**_SHAPE, "layer_norm_eps": 0.01}),
    "neox_serial": (
        "GPTNeoXConfig",
        {
            **_SHAPE,
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_act": "gelu_new",
            "rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "linear", "factor": 2.0, **_THETA},
        },
    ),
    "gpt2": ("GPT2Config", {**_IDS, "vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "gpt2_options": (
        "GPT2Config",
        {
            **_IDS,
            "vocab_size": 64,
            "n_embd": 32,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 64,
            "n_inner": 40,
            "activation_function": "relu",
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma2": (
        "Gemma2Config",
        {**_GEMMA, "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "num_hidden_layers": 8, "sliding_window": 5}),
    "gemma3_pattern": (
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "sliding_window": 5,
            "layer_types": _PATTERN,
            "query_pre_attn_scalar": 20,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, **_THETA},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
    ),
}


def randomize(model):
    """Every parameter, norms and biases included, drawn anew."""
    generator = torch.Generator().manual_seed(0)
    unit_offset = "gemma" in model.config.model_type
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.rand(p.shape, generator=generator) * 2 - 1
            if p.ndim == 1:
                is_scale = name.endswith("weight") and not unit_offset
                p.copy_(0.5 * noise + (1.0 if is_scale else 0.0))
            else:
                p.copy_(noise * 2 * p.shape[-1] ** -0.5)
    return model.eval()


def build(name):
    config_class, fields = CASES[name]
    config = getattr(transformers, config_class)(**fields)
    config._attn_implementation = "eager"
    return randomize(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def their_logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long(), use_cache=False).logits.float().numpy()


def our_logits(found):
    return np.asarray(jax.jit(found.model.apply)({"params": found.params}, TOKENS))


@pytest.mark.parametrize("name", CASES)
def test_logits_agree_both_ways(name, tmp_path):
    model = build(name)
    expected = their_logits(model)
    assert expected.std() > 0.1
    model.save_pretrained(tmp_path / "theirs")
    found = huggingface.load(tmp_path / "theirs")
    np.testing.assert_allclose(our_logits(found), expected, atol=1e-4, rtol=0)

    huggingface.save(tmp_path / "ours", found.config, found.params)
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    np.testing.assert_allclose(their_logits(opened.eval()), expected, atol=1e-4, rtol=0)


def test_shards_written_by_either_side(tmp_path):
    model = build("qwen2")
    expected = their_logits(model)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    found = huggingface.load(tmp_path / "theirs")
    np.testing.assert_allclose(our_logits(found), expected, atol=1e-4, rtol=0)
    huggingface.save(tmp_path / "ours", found.config, found.params, max_shard_bytes=20_000)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    np.testing.assert_allclose(their_logits(opened), expected, atol=1e-4, rtol=0)


def test_the_text_part_of_a_gemma_3_that_sees_images(tmp_path):
    text = {**_GEMMA, "sliding_window": 5, "num_hidden_layers": 8, "tie_word_embeddings": True}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**text).to_dict(),
        vision_config={**vision, "image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        **{f"{name}_token_index": i for i, name in enumerate(("boi", "eoi", "image"), 61)},
    )
    config._attn_implementation = "eager"
    model = randomize(transformers.Gemma3ForConditionalGeneration(config))
    tokens = np.minimum(TOKENS, 60)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    model.save_pretrained(tmp_path)
    found = huggingface.load(tmp_path)
    logits = jax.jit(found.model.apply)({"params": found.params}, tokens)
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-4, rtol=0)


def test_bfloat16_is_read_and_written_exactly(tmp_path):
    model = build("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    found = huggingface.load(tmp_path / "theirs", dtype="bfloat16")
    huggingface.save(tmp_path / "ours", found.config, found.params)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert opened.dtype == torch.bfloat16
    theirs, ours = model.state_dict(), opened.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3", "neox"])
def test_transformers_opens_our_tokenizer(family, tmp_path):
    tokenizer = HuggingFaceTokenizer(tokenizer_definition(), eos="<|im_end|>")
    found = golden.CASES[family]
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    huggingface.save(tmp_path, found, golden.parameters(found), tokenizer, chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("def read(path):\n    return café", "  two  spaces\t\n"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.eos_token == "<|im_end|>"
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.special_ids["eos"] == theirs.eos_token_id
