import jax
import jax.numpy as jnp
import pytest

from jaxlm.core import trees
from jaxlm.models import Decoder
from jaxlm.models.flops import (
    decode_flops_per_token,
    executed_flops_per_token,
    forward_flops_per_token,
    train_flops_per_token,
)
from jaxlm.models.presets import preset
from jaxlm.testing import tiny_config


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_products_are_twice_the_kernels_and_attention_is_counted_key_by_key(family):
    config = tiny_config(family)
    model = Decoder(config)
    kernels = trees.count([x for path, x in trees.named_leaves(model.abstract_params()) if path.endswith("kernel")])
    if config.tie_embeddings:
        kernels += config.vocab_size * config.embed_dim
    length = 10
    pairs = sum(i + 1 for i in range(length)) / length
    attention = config.num_layers * config.num_heads * 2 * 2 * config.head_size * pairs
    assert forward_flops_per_token(config, length) == pytest.approx(2 * kernels + attention)


def test_windows_are_counted():
    config = tiny_config("gemma2", num_layers=2, window=4)
    full = forward_flops_per_token(tiny_config("gemma2", num_layers=2, window=None), 16)
    visible = sum(min(i + 1, 4) for i in range(16)) / 16
    saved = 2 * 2 * config.num_heads * config.head_size * (17 / 2 - visible)
    assert full - forward_flops_per_token(config, 16) == pytest.approx(saved)


def test_agrees_with_the_compiler_on_one_layer():
    # XLA counts a scan's body once; one layer makes that exact. It counts masked attention in full.
    config = preset("llama-60m", num_layers=1, attention="reference", remat="none", vocab_size=4096)
    model = Decoder(config)
    ids = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    lowered = jax.jit(model.apply).lower({"params": model.abstract_params()}, ids)
    counted = lowered.compile().cost_analysis()["flops"] / 64
    masked = 2 * 2 * config.num_heads * config.head_size * (64 - 65 / 2)
    assert counted == pytest.approx(forward_flops_per_token(config, 64) + masked, rel=0.05)


def test_what_is_computed_again():
    config = tiny_config("llama")
    forward, train = forward_flops_per_token(config, 8), train_flops_per_token(config, 8)
    head = 2 * config.embed_dim * config.vocab_size
    remats = ("none", "dots", "projections", "full")
    again = {remat: executed_flops_per_token(config, 8, remat) - train for remat in remats}
    assert again["none"] == 0
    assert again["full"] == pytest.approx(forward - head)
    assert again["dots"] == 2 * config.num_layers * config.num_heads * config.head_size * config.embed_dim
    assert again["dots"] < again["projections"] < again["full"]


def test_decoding_counts_one_token_against_the_cache():
    config = tiny_config("llama")
    per_key = 4 * config.num_layers * config.num_heads * config.head_size
    assert decode_flops_per_token(config, 1) == forward_flops_per_token(config, 1)
    assert decode_flops_per_token(config, 100) - decode_flops_per_token(config, 1) == 99 * per_key


def test_tokens_that_see_both_sides_have_twice_the_keys():
    causal, both = (forward_flops_per_token(tiny_config("gpt2", causal=c), 9) for c in (True, False))
    config = tiny_config("gpt2")
    assert both - causal == pytest.approx(config.num_layers * 4 * config.num_heads * config.head_size * (9 - 5))
