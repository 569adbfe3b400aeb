"""Tokenizers: `tokenizer.json` and what lies beside it, SentencePiece models."""

import functools
import json
import shutil
import struct
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.mutations import as_json, damaged, damaged_json, damaged_value
from tests.fuzz.target import Target, home, put
from tests.interop.checkpoints import tokenizer_definition


def _tokenizer_files() -> st.SearchStrategy[tuple[str, bytes]]:
    definition = json.loads(tokenizer_definition())
    small = {**definition, "model": {**definition["model"], "merges": definition["model"]["merges"][:3]}}
    others = [
        {**small, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {**small, "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Prepend", "prepend": "_"}]}},
        {**small, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "(a+)+$|\\s"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}},
        {**small, "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {}}},
        {**small, "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": True,
            "vocab": [["<unk>", 0.0], *([f"<0x{b:02X}>", -1.0] for b in range(256)), ["a", -2.0]]}},
        {**small, "model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "max_input_chars_per_word": 9,
            "continuing_subword_prefix": "##"}},
    ]  # fmt: skip
    settings = {"kind": "hugging_face", "bos": "<|im_start|>", "eos": "<|im_end|>", "pad": None}
    config = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>", "pad_token": None}
    return st.one_of(
        st.tuples(st.just("tokenizer.json"), damaged_value(small, *others).map(as_json)),
        st.tuples(st.just("tokenizer.json"), damaged(as_json(small))),
        st.tuples(st.just("jaxlm_tokenizer.json"), damaged_json(settings)),
        st.tuples(st.just("tokenizer_config.json"), damaged_json(config)),
    )


def use_tokenizer(tokenizer: Any) -> None:
    from jaxlm.core.errors import JaxlmError

    for text in ("", "a b\n\u00e9\u2581 <|im_end|> aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", b"\xff\0a"):
        try:
            tokenizer.decode(tokenizer.encode(text))
            if isinstance(text, str):
                tokenizer.encode_with_offsets(text)
        except JaxlmError:
            continue
    tokenizer.encode_batch(["a", "b c"])
    assert tokenizer.fingerprint
    for i in range(0, tokenizer.vocab_size, 17):
        tokenizer.token_bytes(i)


def read_tokenizer(case: tuple[str, bytes], folder: Path) -> None:
    from jaxlm.data.tokenizers import load_tokenizer

    shutil.rmtree(folder)
    put(folder, "tokenizer.json", tokenizer_definition().encode())
    put(folder, *case)
    use_tokenizer(load_tokenizer(folder))


@functools.cache
def sentence_piece_model() -> bytes:
    """A small lossless model."""
    from jaxlm.data.tokenizers import train_sentencepiece

    tokenizer = train_sentencepiece(["def read(path):\n    return 1\n" * 9], 300, cache=home() / "cache")
    tokenizer.save(home())
    return (home() / "sentencepiece.model").read_bytes()


def _field(number: int, value: Any) -> bytes:
    def varint(n: int) -> bytes:
        out = b""
        while n >= 128:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value % (1 << 64))


def _sentence_pieces() -> st.SearchStrategy[bytes]:
    """Damaged bytes, and models of any pieces and settings in the right form."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{b:02X}>", 0.0, 6) for b in range(256)] + [("a", -1.0, 1), ("ab", -2.0, 1), ("b", -3.0, 4)]
    texts = st.sampled_from(("", "a", "ab", "\u2581", "\u2581a", "<unk>", "<0x41>", "<0xZZ>", "a" * 500, "\u00e9"))
    edit = st.tuples(
        st.integers(0, len(pieces) - 1), texts, st.sampled_from((0.0, -1.0, 1e30, float("nan"))), st.integers(0, 7)
    )
    trainer = st.dictionaries(
        st.sampled_from((3, 4, 35, 36, 40, 41, 42, 43, 44, 45, 46, 47, 48)),
        st.sampled_from((0, 1, 2, 3, 4, 300, 1 << 31, -1, b"a", b"\xff", 1.5)),
        max_size=3,
    )
    normalizer = st.dictionaries(st.integers(1, 6), st.sampled_from((0, 1, b"", b"AAAA", b"\xff" * 40)), max_size=3)

    def build(case: Any) -> bytes:
        edits, settings, rules = case
        changed = list(pieces)
        for i, *piece in edits:
            changed[i] = tuple(piece)
        out = b"".join(
            _field(1, _field(1, text.encode()) + _field(2, score) + _field(3, kind)) for text, score, kind in changed
        )
        out += _field(2, _field(3, 2) + _field(35, 1) + b"".join(_field(n, v) for n, v in settings.items()))
        plain = {3: 0, 4: 0, 5: 1}
        return out + _field(3, b"".join(_field(n, v) for n, v in {**plain, **rules}.items()))

    made = st.tuples(st.lists(edit, max_size=3), trainer, normalizer).map(build)
    return made | damaged(sentence_piece_model())


def read_sentence_piece(data: bytes, folder: Path) -> None:
    from jaxlm.data.tokenizers import load_tokenizer

    use_tokenizer(load_tokenizer(put(folder, "m.model", data)))


TARGETS: dict[str, Target] = {
    "tokenizer_json": Target(_tokenizer_files, read_tokenizer, cost=5),
    "sentencepiece": Target(_sentence_pieces, read_sentence_piece, cost=3),
}
