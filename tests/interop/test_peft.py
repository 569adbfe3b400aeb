"""Adapters in PEFT's format: round trips, and what PEFT itself computes with them."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.core.sharding import MeshConfig, make_mesh, use_mesh
from jaxlm.core.trees import map_named
from jaxlm.interop import Pretrained, huggingface, load
from jaxlm.interop.peft import load_adapter, save_adapter
from jaxlm.models import Decoder
from jaxlm.peft import LoraConfig, add_lora, merge_lora
from jaxlm.testing import tiny_config

IDS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A base model in a folder, an adapter over it in another, and the adapted model itself."""
    folder = tmp_path_factory.mktemp("peft")
    config = tiny_config("llama")
    plain = jax.jit(Decoder(config).init)(jax.random.key(0))["params"]
    adapted = add_lora(jax.random.key(1), plain, LoraConfig(rank=2, alpha=6, targets=("query", "down")))
    adapted = map_named(lambda path, x: x + 0.1 if path.endswith("kernel/b") else x, adapted)
    huggingface.save(folder / "base", config, plain)
    save_adapter(folder / "adapter", config, adapted, str(folder / "base"))
    return folder, Pretrained(config, adapted), plain


def logits(found):
    return jax.jit(lambda p: found.model.apply({"params": p}, IDS))(found.params)


def test_an_adapter_opens_over_its_base(adapter):
    folder, made, _ = adapter
    found = load(folder / "adapter")
    chex.assert_trees_all_equal(found.params, made.params)
    chex.assert_trees_all_close(logits(found), logits(made))
    described = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert described["target_modules"] == ["down_proj", "q_proj"]
    assert (described["r"], described["lora_alpha"]) == (2, 6.0)


def test_an_adapter_far_from_its_base_opens_in_the_run_that_began_with_it_alone(adapter, tmp_path):
    folder, made, _ = adapter
    shutil.copytree(folder / "adapter", tmp_path / "run" / "adapter")
    with pytest.raises(ConfigError, match="not in the folder that holds the adapter: if you trust it, load it"):
        load(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model": str(folder / "base")}))
    chex.assert_trees_all_equal(load(tmp_path / "run").params, made.params)
    with pytest.raises(ConfigError, match="not in the folder that holds the adapter"):
        load(tmp_path / "run" / "adapter")


def test_a_base_may_be_given(adapter):
    folder, made, plain = adapter
    found = load_adapter(folder / "adapter", Pretrained(made.config, plain))
    chex.assert_trees_all_equal(found.params, made.params)


def test_a_mesh_holds_the_factors_too(adapter):
    folder, made, _ = adapter
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    found = load(folder / "adapter", mesh=mesh)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(found.params)} == {4}
    with use_mesh(mesh, found.config.sharding_rules(mesh)):
        chex.assert_trees_all_close(logits(found), logits(made), atol=1e-5)


def test_peft_computes_the_same(adapter):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import torch

    folder, made, _ = adapter
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        theirs = model(torch.tensor(np.array(IDS))).logits.numpy()
    np.testing.assert_allclose(logits(made), theirs, atol=1e-4)


def test_merged_weights_save_as_a_plain_model(adapter, tmp_path):
    _, made, _ = adapter
    with pytest.raises(ConfigError, match="LowRank"):
        huggingface.save(tmp_path / "merged", made.config, made.params)
    huggingface.save(tmp_path / "merged", made.config, merge_lora(made.params))
    chex.assert_trees_all_close(logits(load(tmp_path / "merged")), logits(made), atol=2e-5)


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"])])
def test_other_kinds_of_adapters_are_refused_by_name(adapter, tmp_path, key, value):
    folder, made, plain = adapter
    described = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**described, key: value}))
    with pytest.raises(ConfigError, match=key):
        load_adapter(tmp_path, Pretrained(made.config, plain))


def test_an_adapter_of_another_model_is_refused(adapter):
    folder, *_ = adapter
    config = tiny_config("llama", mlp_dim=24)
    other = jax.jit(Decoder(config).init)(jax.random.key(0))["params"]
    with pytest.raises(CheckpointError, match=r"lora_A of mlp/down/kernel is \(2, .*expected \(2, 24\)"):
        load_adapter(folder / "adapter", Pretrained(config, other))


def test_families_with_fused_kernels_and_plain_models_are_refused(tmp_path):
    config = tiny_config("gpt2")
    params = jax.jit(Decoder(config).init)(jax.random.key(0))["params"]
    with pytest.raises(ConfigError, match="fuse"):
        save_adapter(tmp_path, config, params, "base")
    config = tiny_config("llama")
    params = jax.jit(Decoder(config).init)(jax.random.key(0))["params"]
    with pytest.raises(ConfigError, match="no adapter"):
        save_adapter(tmp_path, config, params, "base")
