"""Folders in Hugging Face's format: round trips, golden logits, meshes, and everything that is refused."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file

from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.core.precision import Precision
from jaxlm.core.sharding import MeshConfig, make_mesh, use_mesh
from jaxlm.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer
from jaxlm.interop import huggingface
from jaxlm.models import Decoder
from jaxlm.models.blocks import recut
from jaxlm.testing import FAMILIES, tiny_config, tiny_decoder
from jaxlm.weights import LowRank
from tests.interop.checkpoints import edit_config, edit_tensors, tokenizer_definition
from tests.models import golden

LOGITS, _ = golden.load()


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


@pytest.fixture
def llama(tmp_path):
    """A saved tiny Llama."""
    model, params = tiny_decoder("llama")
    huggingface.save(tmp_path / "llama", model.config, params)
    return tmp_path / "llama"


@pytest.mark.parametrize("name", golden.CASES)
def test_what_is_saved_comes_back_and_computes_the_golden_logits(name, tmp_path):
    config, params = golden.CASES[name], golden.parameters(golden.CASES[name])
    huggingface.save(tmp_path, config, params)
    found = huggingface.load(tmp_path)
    assert same(found.params, params)
    logits = jax.jit(found.model.apply)({"params": found.params}, golden.tokens())
    np.testing.assert_allclose(np.asarray(logits), LOGITS[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_load_save_is_byte_stable(family, tmp_path):
    model, params = tiny_decoder(family)
    tokenizer = HuggingFaceTokenizer(tokenizer_definition(), eos="<|endoftext|>")
    beside = {"chat_template": "{{ messages }}", "stop_ids": (0, 2), "max_shard_bytes": 30_000}
    huggingface.save(tmp_path / "first", model.config, params, tokenizer, **beside)
    found = huggingface.load(tmp_path / "first")
    assert (found.chat_template, found.stop_ids) == ("{{ messages }}", (0, 2))
    beside = {"chat_template": found.chat_template, "stop_ids": found.stop_ids, "max_shard_bytes": 30_000}
    huggingface.save(tmp_path / "second", found.config, found.params, found.tokenizer, **beside)
    first, second = files(tmp_path / "first"), files(tmp_path / "second")
    assert "model.safetensors.index.json" in first
    assert first == second


def test_names_and_layouts_of_a_llama(llama):
    """The card's table: linear weights are `(out, in)`, the norm before the MLP has a name of its own."""
    _, params = tiny_decoder("llama")
    block, arrays = params["blocks"][0], load_file(llama / "model.safetensors")
    assert len(arrays) == 4 * 9 + 3
    layer = "model.layers.2."
    np.testing.assert_array_equal(arrays[layer + "self_attn.k_proj.weight"], block["attention"]["key"]["kernel"][2].T)
    np.testing.assert_array_equal(arrays[layer + "post_attention_layernorm.weight"], block["mlp_norm"]["scale"][2])
    np.testing.assert_array_equal(arrays["lm_head.weight"], params["head"]["kernel"].T)


def test_fused_projections():
    """GPT-NeoX keeps q, k, v of a head together, GPT-2 all q, all k, all v; each by an index written out."""
    from jaxlm.interop.hf_tensors import Layout, Tensor

    heads, size, embed = 2, 3, 4
    q, k, v = (np.arange(embed * heads * size).reshape(embed, -1) + 100 * i for i in range(3))
    neox = Tensor("x", ("q", "k", "v"), Layout.HEADS)
    joined = neox.join([q, k, v], heads)
    for head in range(heads):
        for part, ours in enumerate((q, k, v)):
            rows = joined[(head * 3 + part) * size : (head * 3 + part + 1) * size]
            np.testing.assert_array_equal(rows, ours[:, head * size : (head + 1) * size].T)
    gpt2 = Tensor("x", ("q", "k", "v"), Layout.COLUMNS)
    np.testing.assert_array_equal(gpt2.join([q, k, v], heads), np.hstack([q, k, v]))
    for tensor in (neox, gpt2):
        for i, ours in enumerate((q, k, v)):
            np.testing.assert_array_equal(tensor.split(tensor.join([q, k, v], heads), i, heads), ours)


def test_older_names_are_read(tmp_path):
    """GPT-2 without its prefix and with its masks, GPT-NeoX's renamed head, a tied head that is there twice."""
    model, params = tiny_decoder("gpt2")
    huggingface.save(tmp_path / "gpt2", model.config, params)

    def hub(arrays):
        short = {name.removeprefix("transformer."): x for name, x in arrays.items()}
        masks = {f"h.{i}.attn.bias": np.ones((1, 1, 8, 8), np.uint8) for i in range(4)}
        return {**short, **masks, "lm_head.weight": short["wte.weight"]}

    edit_tensors(tmp_path / "gpt2", hub)
    assert same(huggingface.load(tmp_path / "gpt2").params, params)

    model, params = tiny_decoder("neox")
    huggingface.save(tmp_path / "neox", model.config, params)
    edit_tensors(tmp_path / "neox", lambda a: {n.replace("embed_out", "lm_head"): x for n, x in a.items()})
    assert same(huggingface.load(tmp_path / "neox").params, params)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    model, params = tiny_decoder("smollm2")
    huggingface.save(tmp_path, model.config, params)
    edit_tensors(tmp_path, lambda a: {**a, "lm_head.weight": a["model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head\.weight is not"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize("family", ["llama", "neox", "gpt2"])
def test_loading_onto_a_mesh(family, tmp_path):
    model, params = tiny_decoder(family, num_kv_heads=None)
    huggingface.save(tmp_path, model.config, params, max_shard_bytes=30_000)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    found = huggingface.load(tmp_path, mesh=mesh)
    kernel = found.params["blocks"][0]["attention"]["query"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (4, 16, 16)
    assert same(jax.device_get(found.params), jax.device_get(params))
    tokens = golden.tokens()
    with use_mesh(mesh, found.config.sharding_rules(mesh)):
        sharded = jax.jit(found.model.apply)({"params": found.params}, tokens)
    whole = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(np.asarray(sharded), np.asarray(whole), atol=2e-5, rtol=0)


def test_a_mesh_reads_only_what_its_devices_hold(llama, monkeypatch):
    """Host buffers are the size of one device's part of one parameter."""
    sizes = []
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda shape, *a, **k: sizes.append(int(np.prod(shape))) or empty(shape, *a, **k))
    huggingface.load(llama, mesh=make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    assert 0 < max(sizes) <= 4 * 48 * 32 // 8


def test_formats(llama, tmp_path):
    found = huggingface.load(llama, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(found.params)} == {jnp.dtype("bfloat16")}
    assert found.config.precision == Precision(params="bfloat16")
    huggingface.save(tmp_path / "half", found.config, found.params)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    wide = huggingface.load(tmp_path / "half", dtype=Precision(activations="bfloat16"))
    assert wide.config.precision.activations == "bfloat16"
    assert same(jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide.params), found.params)
    huggingface.save(tmp_path / "again", wide.config, wide.params, dtype="bfloat16")
    assert files(tmp_path / "half") == files(tmp_path / "again")


def test_several_runs_of_layers_are_saved_as_one_model(llama, tmp_path):
    model, params = tiny_decoder("llama")
    cut = {**params, "blocks": recut(params["blocks"], [1, 3])}
    huggingface.save(tmp_path / "cut", model.config, cut)
    assert files(tmp_path / "cut") == files(llama)


def test_low_rank_weights_are_merged_only_when_asked(tmp_path):
    model, params = tiny_decoder("llama")
    query = params["blocks"][0]["attention"]["query"]
    w = query["kernel"]
    query["kernel"] = LowRank(w, jnp.ones((4, 32, 2)), 0.1 * jnp.ones((4, 2, 32)), 0.5)
    with pytest.raises(ConfigError, match=r"attention/query/kernel \(LowRank\).*dense=True"):
        huggingface.save(tmp_path, model.config, params)
    assert not list(tmp_path.iterdir())
    huggingface.save(tmp_path, model.config, params, dense=True)
    merged = huggingface.load(tmp_path).params["blocks"][0]["attention"]["query"]["kernel"]
    np.testing.assert_allclose(merged, np.asarray(w) + 0.1, atol=1e-6)


class TestTokenizer:
    def test_round_trip(self, llama, tmp_path):
        tokenizer = HuggingFaceTokenizer(tokenizer_definition(), eos="<|im_end|>", bos="<|im_start|>")
        found = huggingface.load(llama)
        assert (found.tokenizer, found.chat_template, found.stop_ids) == (None, None, ())
        huggingface.save(tmp_path / "out", found.config, found.params, tokenizer)
        again = huggingface.load(tmp_path / "out")
        assert again.tokenizer.fingerprint == tokenizer.fingerprint
        assert again.stop_ids == (tokenizer.special_ids["eos"],)

    def test_files_of_transformers(self, llama):
        """Without our settings: roles and template from `tokenizer_config.json`, several stop ids."""
        (llama / "tokenizer.json").write_text(tokenizer_definition())
        templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
        settings = {"eos_token": {"content": "<|im_end|>"}, "pad_token": None, "chat_template": templates}
        (llama / "tokenizer_config.json").write_text(json.dumps(settings))
        (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
        found = huggingface.load(llama)
        assert found.tokenizer.special_ids["eos"] == 2
        assert (found.chat_template, found.stop_ids) == ("yes", (2, 0))
        (llama / "chat_template.jinja").write_text("newer")
        (llama / "generation_config.json").unlink()
        edit_config(llama, eos_token_id=1)
        found = huggingface.load(llama)
        assert (found.chat_template, found.stop_ids) == ("newer", (1,))

    def test_whether_texts_begin_with_bos(self, llama):
        """By the post-processor of the tokenizer, unless the settings say otherwise."""
        definition = json.loads(tokenizer_definition())
        (llama / "tokenizer.json").write_text(json.dumps(definition))
        assert not huggingface.load(llama).add_bos
        first = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
        definition["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
        }
        (llama / "tokenizer.json").write_text(json.dumps(definition))
        assert huggingface.load(llama).add_bos
        (llama / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
        assert not huggingface.load(llama).add_bos

    def test_others_are_refused(self, tmp_path):
        model, params = tiny_decoder("llama")
        with pytest.raises(ConfigError, match="ByteTokenizer has no tokenizer.json"):
            huggingface.save(tmp_path, model.config, params, ByteTokenizer())


class TestBadTensors:
    def test_all_that_is_wrong_is_listed(self, llama):
        def damage(arrays):
            out = {name.replace("self_attn.q_proj", "self_attn.query_proj"): x for name, x in arrays.items()}
            del out["model.layers.1.mlp.down_proj.weight"]
            out["model.layers.3.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
            out["model.norm.weight"] = np.ones(31, np.float32)
            return out

        edit_tensors(llama, damage)
        with pytest.raises(CheckpointError) as error:
            huggingface.load(llama)
        assert str(error.value).splitlines()[1:] == [
            "  missing: model.layers.1.mlp.down_proj.weight",
            "  missing: model.layers.{0-3}.self_attn.q_proj.weight "
            "(did it become model.layers.{i}.self_attn.query_proj.weight?)",
            "  unexpected: model.layers.3.self_attn.q_proj.bias",
            "  unexpected: model.layers.{0-3}.self_attn.query_proj.weight",
            "  misshapen: model.norm.weight: [31], expected [32]",
        ]
        assert "5 missing, 5 unexpected, 1 misshapen" in str(error.value)

    def test_more_layers_than_the_configuration_has(self, llama):
        edit_config(llama, num_hidden_layers=3)
        with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.3\.mlp\.up_proj\.weight"):
            huggingface.load(llama)

    def test_a_head_dim_that_is_not_the_tensors(self, llama):
        edit_config(llama, head_dim=16)
        message = r"model\.layers\.\{0-3\}\.self_attn\.q_proj\.weight: \[32, 32\], expected \[64, 32\]"
        with pytest.raises(CheckpointError, match=message):
            huggingface.load(llama)

    def test_quantized_tensors(self, llama):
        edit_tensors(llama, lambda a: {**a, "model.norm.weight": np.ones(32, np.int8)})
        with pytest.raises(CheckpointError, match=r"other than F64, F32, F16, BF16: model\.norm\.weight \(I8\)"):
            huggingface.load(llama)


class TestBadSaves:
    def test_a_model_that_no_family_expresses(self, tmp_path):
        model, params = tiny_decoder("llama", parallel_residual=True)
        with pytest.raises(ConfigError, match="nearest, 'llama' would have parallel_residual False, not True"):
            huggingface.save(tmp_path / "out", model.config, params)
        assert not (tmp_path / "out").exists()

    def test_parameters_of_another_model(self, tmp_path):
        _, params = tiny_decoder("llama")
        with pytest.raises(
            CheckpointError, match=r"(?s)missing: blocks\.|missing: blocks/0/attention/query_norm/scale"
        ):
            huggingface.save(tmp_path / "out", tiny_config("qwen3", head_dim=8), params)
        fewer = dataclasses.replace(tiny_config("llama"), num_layers=3)
        with pytest.raises(CheckpointError, match="have 4 layers, the configuration 3"):
            huggingface.save(tmp_path / "out", fewer, params)

    def test_a_folder_of_other_files(self, llama):
        model, params = tiny_decoder("llama")
        (llama / "notes.txt").write_text("mine")
        with pytest.raises(ConfigError, match=r"holds other files \(notes\.txt\)"):
            huggingface.save(llama, model.config, params)
        assert (llama / "notes.txt").read_text() == "mine"

    def test_an_earlier_save_is_replaced_whole(self, llama):
        model, params = tiny_decoder("qwen3")
        huggingface.save(llama, model.config, params, max_shard_bytes=30_000)
        assert not (llama / "model.safetensors").exists()
        assert same(huggingface.load(llama).params, params)
        assert [p.name for p in llama.parent.iterdir()] == ["llama"]

    def test_a_failure_leaves_what_was_there(self, llama, monkeypatch):
        before = files(llama)

        def fail(*args):
            raise OSError("disk full")

        monkeypatch.setattr(huggingface.tensor_files, "write_tensors", fail)
        model, params = tiny_decoder("qwen3")
        with pytest.raises(OSError, match="disk full"):
            huggingface.save(llama, model.config, params)
        assert files(llama) == before
        assert [p.name for p in llama.parent.iterdir()] == ["llama"]

    def test_a_failure_to_take_its_place_puts_back_what_was_there(self, llama, monkeypatch):
        before, replace = files(llama), os.replace

        def fail(source, target):
            if Path(target) == llama and (Path(source) / "config.json").read_bytes() != before["config.json"]:
                raise OSError("no such device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail)
        model, params = tiny_decoder("qwen3")
        with pytest.raises(OSError, match="no such device"):
            huggingface.save(llama, model.config, params)
        assert files(llama) == before
        assert [p.name for p in llama.parent.iterdir()] == ["llama"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [({"dtype": "int8"}, "dtype is 'int8', expected one of"), ({"max_shard_bytes": 0}, "max_shard_bytes is 0")],
    )
    def test_arguments(self, tmp_path, arguments, message):
        model, params = tiny_decoder("llama")
        with pytest.raises(ConfigError, match=message):
            huggingface.save(tmp_path, model.config, params, **arguments)


def test_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CheckpointError, match="no config.json"):
        huggingface.load(tmp_path)
    with pytest.raises(CheckpointError, match="no folder 'org/model'.*HF_HUB_OFFLINE"):
        huggingface.load("org/model")


def test_a_name_in_the_cache(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    commit, model = "0123456789abcdef0123456789abcdef01234567", tmp_path / "cache" / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "blobs").mkdir()
    (model / "snapshots" / commit).mkdir(parents=True)
    for i, file in enumerate(llama.iterdir()):
        file.rename(model / "blobs" / str(i))
        (model / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{i}")
    _, params = tiny_decoder("llama")
    assert same(huggingface.load("org/tiny").params, params)
    assert same(huggingface.load("org/tiny", revision=commit).params, params)
    with pytest.raises(CheckpointError, match="revision 'v2' of a model of that name is not in"):
        huggingface.load("org/tiny", revision="v2")
    with pytest.raises(CheckpointError, match=r"revision is '\.\./x'"):
        huggingface.load("org/tiny", revision="../x")


def test_params_are_those_of_the_model(llama):
    """What `load` returns has the structure that `init` makes."""
    found = huggingface.load(llama)
    abstract = Decoder(found.config).abstract_params()
    assert jax.tree.structure(abstract) == jax.tree.structure(found.params)
