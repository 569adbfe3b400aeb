"""GGUF files that are refused, each with a word on what is wrong with it."""

import numpy as np
import pytest

from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.interop import gguf
from tests.interop import gguf_files as files


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.05, 0.5, 0.9999])
def test_a_file_that_is_cut_short_says_so(share, tmp_path):
    path, _, _ = files.tiny_file(tmp_path)
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
    path, _, _ = files.tiny_file(tmp_path, tensors=changes)
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
        ({**files.BYTE_LEVEL, "tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre 'tekken'"),
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
        gguf.load(files.tiny_file(tmp_path, metadata=metadata)[0])


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
        gguf.load(files.tiny_file(tmp_path, metadata={**files.BYTE_LEVEL, **metadata})[0])


def test_other_architectures_types_and_missing_keys_are_refused_by_name(tmp_path):
    path = files.write(tmp_path / "model.gguf", "qwen2moe", {"block_count": 1}, {})
    with pytest.raises(ConfigError, match="'qwen2moe'.*did you mean 'qwen2'"):
        gguf.load(path)
    raw = files.Quantized(np.zeros((64, 84), np.uint8), "Q2_K")
    path, _, _ = files.tiny_file(tmp_path, embed_dim=256, tensors={"token_embd.weight": raw})
    with pytest.raises(ConfigError, match="token_embd.weight is Q2_K"):
        gguf.load(path)
    path, _, _ = files.tiny_file(tmp_path, metadata={"context_length": None})
    with pytest.raises(CheckpointError, match=r"no metadata 'llama\.context_length'"):
        gguf.load(path)
