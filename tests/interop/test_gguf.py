"""GGUF files, written by the `gguf` package and read by us."""

import functools

import chex
import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import weights
from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError
from jaxlm.interop import gguf
from jaxlm.interop.gguf import blocks, reader
from jaxlm.layers.rotary import RopeScaling, frequencies
from pallas_kernels import quantized_matmul as kernels
from tests.interop import gguf_files as files
from tests.pallas_kernels import absent_tpu

product = kernels.quantized_matmul
QUANTIZED = [kind for kind in gguf.TYPES if kind not in blocks.FLOATS]


def test_header_and_bytes_are_those_that_the_package_reads(tmp_path):
    settings = {"tokenizer.ggml.tokens": ["a", "é", ""], "tokenizer.ggml.scores": [0.5, -1.0], "general.flag": True}
    path, _, _ = files.tiny_file(tmp_path, metadata=settings)
    ours, theirs = reader.read(path), package.GGUFReader(path)
    expected = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.metadata == expected
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert found.type == tensor.tensor_type.name
        assert found.raw.tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("kind", QUANTIZED)
def test_dequantizes_bit_for_bit_as_the_package(kind, kernel):
    raw = files.random_blocks(kind, 8, 512)
    expected = package.quants.dequantize(raw, package.GGMLQuantizationType[kind])
    w = blocks.quantized(reader.Tensor("w", (8, 512), kind, raw), np.dtype("float32"), kernel=kernel)
    assert w.shape == ((512, 8) if kernel else (8, 512))
    for got in (w.dense(), jax.jit(lambda w: w.dense())(w)):
        got = np.asarray(got).T if kernel else np.asarray(got)
        np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32))
    # K-quants spend a byte on scales of six bits.
    assert weights.nbytes(w) <= raw.nbytes * (1.03 if kind in ("Q4_K", "Q5_K") else 1)


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_reads_short_floats(kind, tmp_path):
    path, model, params = files.tiny_file(tmp_path)
    kind = package.GGMLQuantizationType[kind]
    short = {
        name: files.Quantized(package.quants.quantize(x, kind), kind.name) if x.ndim == 2 else x
        for name, x in files.tensors_of("llama", model.config, params).items()
    }
    path, _, _ = files.tiny_file(tmp_path, tensors=short)
    found = gguf.load(path).params
    format = {"F16": jnp.float16, "BF16": jnp.bfloat16}[kind.name]
    rounded = jax.tree.map(lambda x: x.astype(format).astype(x.dtype) if x.ndim != 1 else x, params)
    for path_ in (("embedding", "table"), ("head", "kernel")):
        chex.assert_trees_all_equal(found[path_[0]][path_[1]], rounded[path_[0]][path_[1]])


@pytest.mark.parametrize("family", files.FAMILIES)
def test_every_architecture_comes_back_as_it_was_written(family, tmp_path):
    path, model, params = files.tiny_file(tmp_path, family)
    found = gguf.load(path)
    assert found.config == model.config
    chex.assert_trees_all_close(found.params, params, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(found.params, model.abstract_params())
    ids = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    expected = jax.jit(model.apply)({"params": params}, ids)
    chex.assert_trees_all_close(jax.jit(found.model.apply)({"params": found.params}, ids), expected, atol=1e-4)
    assert found.tokenizer is None


def test_biases_and_bfloat16(tmp_path):
    path, model, params = files.tiny_file(tmp_path, qkv_bias=True, out_bias=True, mlp_bias=True)
    found = gguf.load(path, dtype="bfloat16")
    assert found.config == model.config
    chex.assert_trees_all_equal(found.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def mixed_file(path):
    """Four layers of which the third and the fourth are of other types than the first two."""
    kinds = ["Q4_K", "Q4_K", "Q6_K", "F32"]
    shape = {"embed_dim": 256, "mlp_dim": 256, "num_heads": 4, "num_kv_heads": 2, "tie_embeddings": True}
    embedding = files.Quantized(files.random_blocks("Q8_0", 64, 256), "Q8_0")
    tensors = {"token_embd.weight": embedding, "output.weight": None}
    for i, kind in enumerate(kinds):
        for j, (name, rows) in enumerate({"attn_q": 256, "attn_k": 128, "ffn_up": 256, "ffn_down": 256}.items()):
            if kind != "F32":
                tensors[f"blk.{i}.{name}.weight"] = files.Quantized(files.random_blocks(kind, rows, 256, j), kind)
    return files.tiny_file(path, tensors=tensors, **shape)[0]


def test_packed_and_dequantized_models_agree(tmp_path):
    path = mixed_file(tmp_path)
    dense, packed = gguf.load(path), gguf.load(path, packed=True)
    assert dense.config == packed.config
    assert [len(jax.tree.leaves(run)) > 9 for run in packed.params["blocks"]] == [True, True, False]
    assert isinstance(packed.params["embedding"]["table"], weights.Quantized)
    unpacked = jax.tree.map(weights.dense, packed.params, is_leaf=lambda x: isinstance(x, weights.Weight))
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *unpacked["blocks"])
    chex.assert_trees_all_equal({**unpacked, "blocks": [joined]}, dense.params)
    ids = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    expected = jax.jit(dense.model.apply)({"params": dense.params}, ids)
    got = jax.jit(packed.model.apply)({"params": packed.params}, ids)
    # The same numbers summed in another order.
    chex.assert_trees_all_close(got, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_parameters_are_placed_on_a_mesh(packed, tmp_path):
    path = mixed_file(tmp_path)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    here, there = gguf.load(path, packed=packed), gguf.load(path, packed=packed, mesh=mesh)
    leaves = jax.tree.leaves(there.params)
    assert all(isinstance(x.sharding, jax.sharding.NamedSharding) and x.sharding.mesh == mesh for x in leaves)
    assert not there.params["embedding"]["table"].codes.is_fully_replicated if packed else True
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, found.params) for found in (here, there)))


def packed_on_a_mesh(tmp_path):
    """A model of formats that kernels take, here and on eight devices."""
    shape = {"embed_dim": 128, "mlp_dim": 128, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2}
    sizes = {"attn_q": 128, "attn_k": 64, "attn_v": 64, "attn_output": 128, "ffn_up": 128, "ffn_gate": 128}
    embedding = files.Quantized(files.random_blocks("Q8_0", 64, 128), "Q8_0")
    tensors = {"token_embd.weight": embedding, "output.weight": None}
    for i in range(2):
        for j, (name, rows) in enumerate({**sizes, "ffn_down": 128}.items()):
            kind = "Q4_1" if name == "ffn_up" else "Q4_0"
            tensors[f"blk.{i}.{name}.weight"] = files.Quantized(files.random_blocks(kind, rows, 128, j), kind)
    path, model, _ = files.tiny_file(tmp_path, tensors=tensors, tie_embeddings=True, **shape)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    return gguf.load(path, packed=True), gguf.load(path, packed=True, mesh=mesh), mesh


def test_packed_kernels_know_their_axes_so_that_each_device_multiplies_its_part(tmp_path, monkeypatch):
    here, there, mesh = packed_on_a_mesh(tmp_path)
    assert here.params["embedding"]["table"].names == ("tied_vocab", "embed")
    assert here.params["blocks"][0]["mlp"]["down"]["kernel"].names == ("mlp", "embed")
    ids = jnp.arange(32, dtype=jnp.int32).reshape(4, 8)
    expected = jax.jit(here.model.apply)({"params": here.params}, ids)
    for implementation in ("auto", "tpu_interpret"):
        monkeypatch.setattr(kernels, "quantized_matmul", functools.partial(product, implementation=implementation))
        with sharding.use_mesh(mesh, there.config.sharding_rules(mesh)):
            got = jax.jit(lambda *args: there.model.apply(*args))({"params": there.params}, ids)  # traced anew
        chex.assert_trees_all_close(np.asarray(got), expected, atol=1e-4, rtol=1e-5)


def test_packed_models_take_kernels_on_several_tpus(tmp_path):
    _, there, _ = packed_on_a_mesh(tmp_path)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2), absent_tpu.devices("v5e:2x4"))

    def absent(x):
        where = jax.sharding.NamedSharding(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    params = jax.tree.map(absent, there.params)
    ids = jax.ShapeDtypeStruct((4, 8), jnp.int32, sharding=sharding.batch_sharding(mesh, 2))
    with sharding.use_mesh(mesh, there.config.sharding_rules(mesh)), absent_tpu.no_disk_cache():
        text = jax.jit(there.model.apply).lower({"params": params}, ids).compile().as_text()
    # Seven of the scanned block, and the tied head.
    assert text.count('custom_call_target="tpu_custom_call"') == 8


def test_rope_settings(tmp_path):
    def scaling(tensors=(), **settings):
        metadata = {f"rope.scaling.{k}": v for k, v in settings.items()}
        return gguf.load(files.tiny_file(tmp_path, metadata=metadata, tensors=tensors)[0]).config.rope_scaling

    assert scaling() is None
    assert scaling(type="linear", factor=4.0) == RopeScaling("linear", 4.0, 32)
    yarn = scaling(type="yarn", factor=4.0, original_context_length=32)
    assert yarn == RopeScaling("yarn", 4.0, 32)
    llama3 = RopeScaling("llama3", 8.0, 8192)
    divisors = np.asarray(frequencies(8, 5e5) / frequencies(8, 5e5, llama3))
    assert scaling({"rope_freqs.weight": divisors}) == llama3
    with pytest.raises(ConfigError, match="rope_freqs.weight does not follow"):
        scaling({"rope_freqs.weight": divisors * np.float32(1.5)})
    with pytest.raises(ConfigError, match="rope.scaling.type 'longrope'"):
        scaling(type="longrope")
