"""A GGUF file's vocabulary as a tokenizer.

The two kinds of most models: `gpt2`, byte-level BPE with its merges and the name of its pre-tokenizer, and `llama`,
SentencePiece's BPE, whose merges follow from the scores of pieces. Both become the definition of a `tokenizer.json`.
Pre-tokenizers: the tokenizer.json files that the models' publishers ship (SmolLM2, Llama 3, Qwen 2, GPT-2).
"""

import collections
import json
from typing import Any

from jaxlm.core.errors import CheckpointError, ConfigError, nearest
from jaxlm.data.tokenizers import HuggingFaceTokenizer
from jaxlm.interop.gguf.reader import File

_LONGEST = 4096  # Merges are looked for at every place of every token.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# Qwen's normalizer (NFC) is left out, as it is by llama.cpp: with it text would not come back as it was.
_PRE_TOKENIZERS = {
    "gpt-2": [_byte_level(True)],
    "default": [_byte_level(True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    "llama-bpe": [_split(_WORDS + r"|\p{N}{1,3}" + _REST), _byte_level(False)],
    "qwen2": [_split(_WORDS + r"|\p{N}" + _REST), _byte_level(False)],
}
# What ends a turn in the usual chat formats, where the metadata name one such token at most.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")


def tokenizer(file: File) -> HuggingFaceTokenizer | None:
    """The tokenizer, or `None` if the file has no vocabulary. `ConfigError` for kinds that are not known, by name.

    A `llama` vocabulary that adds a space before text (Llama 2's does, Gemma's does not) gives it back on decoding.
    """
    kind = file.metadata.get("tokenizer.ggml.model", "no_vocab")
    if kind == "no_vocab":
        return None
    definitions = {"gpt2": _byte_level_definition, "llama": _sentence_piece_definition}
    if not isinstance(kind, str) or kind not in definitions:
        raise ConfigError(f"{file.path}: tokenizer.ggml.model '{kind}': {nearest(str(kind), definitions)}")
    tokens: list[str] = _need(file, "tokens", str)
    if long := [i for i, token in enumerate(tokens) if len(token) > _LONGEST]:
        raise CheckpointError(f"{file.path}: tokens of more than {_LONGEST} characters: {long[:10]}")
    if twice := [token for token, times in collections.Counter(tokens).items() if times > 1]:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens has some more than once: {twice[:10]}")
    types = _types(file) or [1] * len(tokens)
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{file.path}: {len(tokens)} tokens, but {len(types)} entries in tokenizer.ggml.token_type"
        )
    ids = {role: _id(file, key) for role, key in _ROLES.items()}
    named = {role: tokens[i] for role, i in ids.items() if i is not None and i < len(tokens)}
    added = [
        {
            "id": i,
            "content": token,
            "special": kind_of_token != _USER_DEFINED,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, (token, kind_of_token) in enumerate(zip(tokens, types, strict=True))
        if token and (kind_of_token in (_UNKNOWN, _CONTROL, _USER_DEFINED) or token in named.values())
    ]
    for token in added:
        token["special"] = token["special"] or token["content"] in named.values()
    definition = {"version": "1.0", "added_tokens": added, **definitions[kind](file, tokens)}
    if "bos" in named and file.metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(file, kind)):
        definition["post_processor"] = _begin_with(named["bos"], ids["bos"])
    return HuggingFaceTokenizer(json.dumps(definition), **named)


def _adds_bos(file: File, kind: str) -> bool:
    """Where the metadata say nothing, what llama.cpp takes for granted."""
    return kind == "llama" or file.metadata.get("tokenizer.ggml.pre") == "llama-bpe"


def _begin_with(token: str, token_id: int) -> dict[str, Any]:
    """A post-processor that puts a token before each text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}


def stop_ids(file: File) -> tuple[int, ...]:
    """The tokens that end a generation: end of text and end of turn, as the metadata or their usual names say."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    named = [_id(file, role) for role in ("eos", "eot", "eom")]
    usual = [i for i, (kind, token) in enumerate(zip(_types(file), tokens)) if kind == _CONTROL and token in _ENDS]
    return tuple(dict.fromkeys(i for i in (*named, *usual) if i is not None))


def _byte_level_definition(file: File, tokens: list[str]) -> dict[str, Any]:
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in _PRE_TOKENIZERS:
        raise ConfigError(f"{file.path}: tokenizer.ggml.pre '{pre}': {nearest(str(pre), _PRE_TOKENIZERS)}")
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [merge.split(" ", 1) for merge in _need(file, "merges", str)],
        "ignore_merges": pre == "llama-bpe",
    }
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": {**_BPE, **model},
    }


def _sentence_piece_definition(file: File, tokens: list[str]) -> dict[str, Any]:
    scores = _need(file, "scores", float)
    if len(scores) != len(tokens):
        raise CheckpointError(f"{file.path}: {len(tokens)} tokens, {len(scores)} entries in tokenizer.ggml.scores")
    space = "\u2581"
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": space}]
    if file.metadata.get("tokenizer.ggml.add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": space})
    decoders = [
        {"type": "Replace", "pattern": {"String": space}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    unknown = _id(file, "unknown")
    if unknown is not None and unknown >= len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.unknown_token_id is {unknown} of {len(tokens)} tokens")
    model = {
        "type": "BPE",
        "unk_token": None if unknown is None else tokens[unknown],
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": _merges(tokens, scores, _types(file) or [1] * len(tokens)),
    }
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**_BPE, **model},
    }


_BPE: dict[str, Any] = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def _merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to put a normal piece together from two others, the best-scored piece first.

    SentencePiece joins whichever neighbors make the piece with the best score; this order of merges does the same.
    """
    pieces = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind == 1}
    found: list[tuple[float, int, str, str]] = []
    for piece, i in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-scores[i], i, left, right))
    found.sort(key=lambda merge: merge[:2])
    return [(left, right) for _, _, left, right in found]


def _need(file: File, name: str, kind: type) -> list:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, list) or not all(type(x) is kind for x in value):
        raise CheckpointError(f"{file.path}: no list 'tokenizer.ggml.{name}' of {kind.__name__} in the metadata")
    return value


def _types(file: File) -> list[int]:
    """The kinds of the tokens; empty where the file does not say."""
    return _need(file, "token_type", int) if file.metadata.get("tokenizer.ggml.token_type") else []


def _id(file: File, role: str) -> int | None:
    """The id of the token in a role, if the file names one."""
    value = file.metadata.get(f"tokenizer.ggml.{role}_token_id")
    if value is not None and (type(value) is not int or not 0 <= value < 1 << 32):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{role}_token_id is {str(value)[:60]}, expected an id")
    return value
