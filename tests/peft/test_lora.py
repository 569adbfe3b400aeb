"""LoRA on models: nothing changes at first, only the factors are trained, merging and removing are exact."""

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.models import Decoder, blocks
from jaxlm.optim.roles import label
from jaxlm.peft import LoraConfig, adapted_axes, add_lora, is_lora, merge_lora, remove_lora
from jaxlm.testing import tiny_config
from jaxlm.weights import LowRank

IDS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])


def made(name="llama", **lora):
    model = Decoder(tiny_config(name))
    params = jax.jit(model.init)(jax.random.key(0))["params"]
    return model, params, add_lora(jax.random.key(1), params, LoraConfig(rank=2, **lora))


def trained(params):
    """With `b` no longer zero."""
    keys = iter(jax.random.split(jax.random.key(2), 99))
    return trees.map_named(
        lambda path, x: jax.random.normal(next(keys), x.shape) * 0.1 if path.endswith("kernel/b") else x, params
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_adapters_change_nothing_then_merge_and_remove_exactly(name):
    model, plain, adapted = made(name)
    apply = jax.jit(lambda p: model.apply({"params": p}, IDS))
    chex.assert_trees_all_close(apply(adapted), apply(plain), atol=1e-6)
    after = trained(adapted)
    assert jnp.abs(apply(after) - apply(plain)).max() > 1e-3
    chex.assert_trees_all_close(apply(merge_lora(after)), apply(after), atol=2e-5)
    chex.assert_trees_all_equal(remove_lora(after), plain)


def test_only_the_factors_of_the_targets_are_trained():
    model, plain, adapted = made(targets=("query", "down"))
    axes = adapted_axes(adapted, model.axes())
    trainable, frozen = trees.partition(adapted, is_lora, label(adapted, axes))
    names = sorted({path.split("/", 2)[2] for path, _ in trees.named_leaves(trainable)})
    assert names == ["attention/query/kernel/a", "attention/query/kernel/b", "mlp/down/kernel/a", "mlp/down/kernel/b"]
    chex.assert_trees_all_equal(trees.merge(trainable, frozen), adapted)
    assert trees.count(frozen) == trees.count(plain)


def test_each_kernel_starts_elsewhere_and_the_seed_decides():
    _, plain, one = made()
    again = add_lora(jax.random.key(1), plain, LoraConfig(rank=2))
    chex.assert_trees_all_equal(one, again)
    attention = one["blocks"][0]["attention"]
    assert jnp.abs(attention["query"]["kernel"].a - attention["out"]["kernel"].a).max() > 0.01


def test_a_model_in_several_runs():
    model, plain, _ = made()
    cut = {**plain, "blocks": blocks.recut(plain["blocks"], [1])}
    adapted = add_lora(jax.random.key(1), cut, LoraConfig(rank=2))
    axes = adapted_axes(adapted, model.axes())
    chex.assert_trees_all_equal_structs(
        jax.tree.map(lambda _: 0, adapted), jax.tree.map(lambda _: 0, label(adapted, axes))
    )
    assert all(isinstance(run["mlp"]["up"]["kernel"], LowRank) for run in adapted["blocks"])


def test_bad_settings_are_named():
    _, plain, adapted = made()
    with pytest.raises(ConfigError, match="'quary'.*query"):
        LoraConfig(targets=("quary",))
    with pytest.raises(ConfigError, match="rank is 0"):
        LoraConfig(rank=0)
    with pytest.raises(ConfigError, match="has an adapter already"):
        add_lora(jax.random.key(0), adapted, LoraConfig())
    _, gpt2, _ = made("gpt2", targets=("up",))
    with pytest.raises(ConfigError, match="none of the kernels gate"):
        add_lora(jax.random.key(0), gpt2, LoraConfig(targets=("gate",)))
