"""Published decoders by name: `preset("smollm2-135m")`.

Shapes are those of the published `config.json` files; `PARAMETERS` are the published models' parameter counts, which
the tests compare with what these configurations build. Larger members derive from the first of their family.
"""

import dataclasses
from collections.abc import Mapping

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.layers.rotary import RopeScaling
from jaxlm.models.config import DecoderConfig
from jaxlm.models.scaling_rules import ScalingRules


def _sized(base: DecoderConfig, layers: int, embed: int, heads: int, mlp: int, kv: int | None = None, **more):
    shape = {"num_layers": layers, "embed_dim": embed, "num_heads": heads, "mlp_dim": mlp, "num_kv_heads": kv}
    return dataclasses.replace(base, **shape, **more)


# Llama 2 (Touvron et al. 2023, arXiv 2307.09288) and 3 (arXiv 2407.21783).
LLAMA2_7B = DecoderConfig(32_000, 32, 4096, 32, 11_008, max_length=4096)
LLAMA3_8B = _sized(LLAMA2_7B, 32, 4096, 32, 14_336, 8, vocab_size=128_256, rope_theta=5e5, max_length=8192)
_LLAMA32_ROPE = RopeScaling("llama3", 32.0, 8192)
LLAMA32_1B = _sized(
    LLAMA3_8B, 16, 2048, 32, 8192, 8, head_dim=64, tie_embeddings=True, rope_scaling=_LLAMA32_ROPE, max_length=131_072
)
# The sizes that memory-efficient pretraining papers share (GaLore, arXiv 2403.03507; SCALE, arXiv 2506.16659).
LLAMA_60M = DecoderConfig(32_000, 8, 512, 8, 1376, max_length=1024, norm_eps=1e-6, init_out_std=0.02)
# SmolLM2 (Ben Allal et al. 2025, arXiv 2502.02737).
SMOLLM2_135M = DecoderConfig(
    49_152, 30, 576, 9, 1536, 3, max_length=8192, rope_theta=1e5, tie_embeddings=True, init_std=0.0416666
)
# Pythia (Biderman et al. 2023, arXiv 2304.01373); the vocabulary is padded to multiples of 128 by model parallelism.
PYTHIA_70M = DecoderConfig(
    50_304,
    6,
    512,
    8,
    2048,
    norm="layer",
    parallel_residual=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    mlp_gated=False,
    activation="gelu",
    rope_fraction=0.25,
)
# GPT-2 (Radford et al. 2019).
GPT2 = DecoderConfig(
    50_257,
    12,
    768,
    12,
    3072,
    max_length=1024,
    norm="layer",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    mlp_gated=False,
    activation="gelu_tanh",
    position="learned",
    tie_embeddings=True,
)
# Qwen 2.5 (arXiv 2412.15115) and Qwen 3 (arXiv 2505.09388).
QWEN25_05B = DecoderConfig(
    151_936,
    24,
    896,
    14,
    4864,
    2,
    max_length=32_768,
    norm_eps=1e-6,
    qkv_bias=True,
    rope_theta=1e6,
    tie_embeddings=True,
)
QWEN3_06B = DecoderConfig(
    151_936,
    28,
    1024,
    16,
    3072,
    8,
    head_dim=128,
    max_length=40_960,
    norm_eps=1e-6,
    qk_norm=True,
    rope_theta=1e6,
    tie_embeddings=True,
)


def _gemma(embed: int, **shape) -> DecoderConfig:
    return DecoderConfig(
        embed_dim=embed,
        norm_eps=1e-6,
        norm_unit_offset=True,
        activation="gelu_tanh",
        embedding_scale=embed**0.5,
        tie_embeddings=True,
        **shape,
    )


# Gemma 1 (arXiv 2403.08295), 2 (arXiv 2408.00118), 3 (arXiv 2503.19786).
GEMMA_2B = _gemma(
    2048, vocab_size=256_000, num_layers=18, num_heads=8, num_kv_heads=1, head_dim=256, mlp_dim=16_384, max_length=8192
)
GEMMA2_2B = _gemma(
    2304,
    vocab_size=256_000,
    num_layers=26,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    mlp_dim=9216,
    max_length=8192,
    norm_placement="sandwich",
    attention_softcap=50.0,
    final_softcap=30.0,
    attention_scale=256**-0.5,
    window=4096,
    window_pattern=(True, False),
)


def _gemma3(embed: int, mlp: int, layers: int, window: int) -> DecoderConfig:
    return _gemma(
        embed,
        vocab_size=262_144,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        mlp_dim=mlp,
        max_length=32_768,
        norm_placement="sandwich",
        qk_norm=True,
        rope_theta=1e6,
        rope_theta_local=1e4,
        window=window,
        window_pattern=(True, True, True, True, True, False),
    )


# MiniCPM (Hu et al. 2024, arXiv 2404.06395), whose own parametrization has the rates of one width serve all, and the
# sizes of its wind tunnel ("0.2b" in the paper is 0.2 billion parameters without embeddings).
MINICPM_2B = DecoderConfig(122_753, 40, 2304, 36, 5760, max_length=4096, tie_embeddings=True)


def _minicpm(layers: int, embed: int, heads: int, mlp: int, kv: int | None = None, **more) -> DecoderConfig:
    return ScalingRules().apply(_sized(MINICPM_2B, layers, embed, heads, mlp, kv, **more))


# Of "Pre-training under infinite compute" (Kim, Kotha et al. 2025, arXiv 2509.14786), with Llama 3's vocabulary.
INFINITE_150M = DecoderConfig(128_256, 6, 512, 8, 1792, max_length=4096)

PRESETS: Mapping[str, DecoderConfig] = {
    "llama-60m": LLAMA_60M,
    "llama-130m": _sized(LLAMA_60M, 12, 768, 12, 2048),
    "llama-350m": _sized(LLAMA_60M, 24, 1024, 16, 2736),
    "llama-1b": _sized(LLAMA_60M, 24, 2048, 32, 5461),
    "llama-7b": _sized(LLAMA_60M, 32, 4096, 32, 11_008, max_length=2048),
    "llama-2-7b": LLAMA2_7B,
    "llama-3-8b": LLAMA3_8B,
    "llama-3.2-1b": LLAMA32_1B,
    "llama-3.2-3b": _sized(LLAMA32_1B, 28, 3072, 24, 8192, 8, head_dim=128),
    "smollm2-135m": SMOLLM2_135M,
    "smollm2-360m": _sized(SMOLLM2_135M, 32, 960, 15, 2560, 5, init_std=0.02),
    "smollm2-1.7b": _sized(SMOLLM2_135M, 24, 2048, 32, 8192, 32, init_std=0.02, rope_theta=1.3e5),
    "pythia-70m": PYTHIA_70M,
    "pythia-160m": _sized(PYTHIA_70M, 12, 768, 12, 3072),
    "pythia-410m": _sized(PYTHIA_70M, 24, 1024, 16, 4096),
    "pythia-1b": _sized(PYTHIA_70M, 16, 2048, 8, 8192),
    "pythia-1.4b": _sized(PYTHIA_70M, 24, 2048, 16, 8192),
    "pythia-2.8b": _sized(PYTHIA_70M, 32, 2560, 32, 10_240),
    "pythia-6.9b": _sized(PYTHIA_70M, 32, 4096, 32, 16_384, vocab_size=50_432),
    "pythia-12b": _sized(PYTHIA_70M, 36, 5120, 40, 20_480, vocab_size=50_688),
    "gpt2": GPT2,
    "gpt2-medium": _sized(GPT2, 24, 1024, 16, 4096),
    "gpt2-large": _sized(GPT2, 36, 1280, 20, 5120),
    "gpt2-xl": _sized(GPT2, 48, 1600, 25, 6400),
    "qwen2.5-0.5b": QWEN25_05B,
    "qwen2.5-1.5b": _sized(QWEN25_05B, 28, 1536, 12, 8960, 2),
    "qwen2.5-3b": _sized(QWEN25_05B, 36, 2048, 16, 11_008, 2),
    "qwen2.5-7b": _sized(QWEN25_05B, 28, 3584, 28, 18_944, 4, vocab_size=152_064, tie_embeddings=False),
    "qwen3-0.6b": QWEN3_06B,
    "qwen3-1.7b": _sized(QWEN3_06B, 28, 2048, 16, 6144, 8),
    "qwen3-4b": _sized(QWEN3_06B, 36, 2560, 32, 9728, 8),
    "qwen3-8b": _sized(QWEN3_06B, 36, 4096, 32, 12_288, 8, tie_embeddings=False),
    "gemma-2b": GEMMA_2B,
    "gemma-2-2b": GEMMA2_2B,
    "gemma-3-270m": _gemma3(640, 2048, 18, 512),
    "gemma-3-1b": _gemma3(1152, 6912, 26, 512),
    "infinite-150m": INFINITE_150M,
    "infinite-300m": _sized(INFINITE_150M, 12, 768, 12, 2688),
    "infinite-600m": _sized(INFINITE_150M, 24, 1024, 16, 3584, 8),
    "infinite-1.4b": _sized(INFINITE_150M, 16, 2048, 16, 7168, 8),
    "minicpm-2.4b": _minicpm(40, 2304, 36, 5760),
    "minicpm-1.2b": _minicpm(52, 1536, 24, 3840, 8, vocab_size=73_440),
    "minicpm-9m": _minicpm(8, 320, 5, 800),
    "minicpm-30m": _minicpm(12, 512, 8, 1280),
    "minicpm-70m": _minicpm(14, 640, 10, 1600),
    "minicpm-0.1b": _minicpm(16, 768, 12, 1920),
    "minicpm-0.17b": _minicpm(18, 896, 14, 2240),
    "minicpm-0.2b": _minicpm(20, 1024, 16, 2560),
    "minicpm-0.5b": _minicpm(24, 1344, 21, 3360),
}

PARAMETERS: Mapping[str, int] = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "gemma-2b": 2_506_172_416,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
}
"""Parameters of the published checkpoints (a tied table counts once). Those missing have no single published count."""


def preset(name: str, **changes) -> DecoderConfig:
    """The configuration of a published model, with fields replaced: `preset("gpt2", num_layers=2)`."""
    if name not in PRESETS:
        raise ConfigError(f"no model preset '{name}': {nearest(name, PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
