import jax
import jax.numpy as jnp
import pytest

from jaxlm.core import trees
from jaxlm.models import Decoder
from jaxlm.models.flops import forward_flops_per_token
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
