"""Tokenizers from the metadata of GGUF files."""

import pytest

from jaxlm.interop import gguf
from tests.interop import gguf_files as files

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
    path, _, _ = files.tiny_file(tmp_path, metadata={**files.BYTE_LEVEL, "tokenizer.ggml.pre": pre})
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
    path, _, _ = files.tiny_file(tmp_path, "gemma", metadata=SENTENCE_PIECE)
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
    path, _, _ = files.tiny_file(tmp_path, metadata={**SENTENCE_PIECE, "tokenizer.ggml.add_space_prefix": True})
    tokenizer = gguf.load(path).tokenizer
    assert tokenizer.decode(tokenizer.encode("ab a")) == " ab a"


def test_whether_texts_begin_with_bos_is_what_the_file_says(tmp_path):
    path, _, _ = files.tiny_file(tmp_path, metadata={**SENTENCE_PIECE, "tokenizer.ggml.add_bos_token": False})
    assert not gguf.load(path).add_bos
    (tmp_path / "other").mkdir()
    metadata = {**files.BYTE_LEVEL, "tokenizer.ggml.add_bos_token": True}
    path, _, _ = files.tiny_file(tmp_path / "other", metadata=metadata)
    assert gguf.load(path).add_bos


def check_protocol(tokenizer):
    special = set(tokenizer.special_ids.values())
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert special.isdisjoint(ids), text
    assert tokenizer.decode_bytes(tokenizer.encode(b"a\xff b")) == b"a\xff b"
