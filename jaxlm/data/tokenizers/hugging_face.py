"""A `tokenizer.json` of the Hugging Face `tokenizers` package, byte-level or with byte fallback.

Facts about the format: `tokenizers` documentation (components), and for the byte alphabet GPT-2's encoder
(Radford et al. 2019, section 2.2).
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.core.configs import fingerprint
from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.json_files import read_object, read_text
from jaxlm.data.tokenizers.protocol import (
    SETTINGS_FILE,
    Tokenizer,
    byte_spans_to_characters,
    encode_around,
    utf8,
)

_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Where the file does not say which token plays a role, the first of these that it has.
_USUAL = {
    "bos": ("<|begin_of_text|>", "<s>", "<bos>", "<|im_start|>", "<|startoftext|>"),
    "eos": ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "<|im_end|>"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>"),
}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer from the text of its `tokenizer.json`.

    Lossless where the file is: a normalizer (Qwen's NFC) or an added prefix (Llama 2) changes the text that
    `decode` gives back, and then spans are those of the `tokenizers` package. Special tokens that occur in
    text are encoded as the characters they are.

    Args:
      definition: the JSON text.
      bos, eos, pad: the tokens that play these roles; by default the usual names. A missing BOS or padding
        token falls back to EOS.

    Raises `ConfigError` for a file that is not a tokenizer, whose tokens have no fixed bytes (WordPiece), or
    that lacks a named token or any EOS.
    """

    kind = "hugging_face"

    def __init__(self, definition: str, *, bos: str | None = None, eos: str | None = None, pad: str | None = None):
        import tokenizers

        with _engine_errors("not a tokenizer.json"):
            self._engine = engine = tokenizers.Tokenizer.from_str(definition)
            engine.encode_special_tokens = True
            engine.no_truncation()
            engine.no_padding()
            parts = json.loads(engine.to_str())
        self._definition = definition
        self._names = {"bos": bos, "eos": eos, "pad": pad}
        added = {token["id"]: token for token in parts["added_tokens"]}
        roles = self._roles({t["content"]: i for i, t in added.items()})
        named = {t["content"]: i for i, t in added.items() if t["special"] and i not in roles.values()}
        self._special_ids = {**roles, **named}
        self._special_text = {i: engine.id_to_token(i) for i in self._special_ids.values()}
        self._byte_level = "ByteLevel" in _component_types(parts)
        if not self._byte_level and not parts["model"].get("byte_fallback"):
            raise ConfigError(
                f"tokenizer.json has a {parts['model']['type']} model, neither byte-level nor with byte "
                "fallback: its tokens have no fixed bytes"
            )
        self._token_bytes = [self._spell(i, added) for i in range(engine.get_vocab_size())]
        self._byte_ids: dict[int, int] = {}
        for i, spelled in enumerate(self._token_bytes):
            fallback = self._byte_level or _BYTE.fullmatch(engine.id_to_token(i) or "")
            if len(spelled) == 1 and i not in added and fallback:
                self._byte_ids[spelled[0]] = i

    @property
    def vocab_size(self) -> int:
        return len(self._token_bytes)

    @property
    def special_ids(self) -> Mapping[str, int]:
        return self._special_ids

    @property
    def control_tokens(self) -> Mapping[str, int]:
        return {text: i for i, text in self._special_text.items()}

    @property
    def adds_bos(self) -> bool:
        """Whether the file puts BOS before a text (its post-processor does; `encode` here never does)."""
        with _engine_errors("the tokenizer.json cannot encode"):
            return self._engine.encode("a").ids[:1] == [self.special_ids["bos"]]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._definition.encode()).hexdigest()
        return fingerprint([self.kind, digest, self._special_ids])

    def encode(self, text: str | bytes) -> list[int]:
        reserved = "" if self._byte_level else _SPACE
        return encode_around(text, self._encode_text, self._byte_id, reserved)

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        plain = [isinstance(t, str) and (self._byte_level or _SPACE not in t) for t in texts]
        chosen = [t for t, p in zip(texts, plain) if p]
        for text in chosen:
            utf8(text)
        with _engine_errors("the tokenizer.json cannot encode"):
            encodings = iter(self._engine.encode_batch_fast(chosen, add_special_tokens=False))
        return [
            self._spell_out_special(next(encodings).ids) if is_plain else self.encode(text)
            for text, is_plain in zip(texts, plain)
        ]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids = self.encode(text)
        if self.decode_bytes(ids) == utf8(text):
            return ids, byte_spans_to_characters(text, [len(self._token_bytes[i]) for i in ids])
        with _engine_errors("the tokenizer.json cannot encode"):
            encoding = self._engine.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def token_bytes(self, token: int) -> bytes:
        return self._token_bytes[token]

    def save(self, folder: str | Path) -> None:
        Path(folder, "tokenizer.json").write_text(self._definition, encoding="utf-8")
        Path(folder, SETTINGS_FILE).write_text(json.dumps({"kind": self.kind, **self._names}))

    @classmethod
    def load(cls, folder: str | Path) -> "HuggingFaceTokenizer":
        """From a folder with `tokenizer.json`, and what `save` or a `tokenizer_config.json` says of roles."""
        names: dict[str, Any] = {}
        if Path(folder, SETTINGS_FILE).exists():
            names = read_object(Path(folder, SETTINGS_FILE))
        elif Path(folder, "tokenizer_config.json").exists():
            theirs = read_object(Path(folder, "tokenizer_config.json"))
            for role in ("bos", "eos", "pad"):
                token = theirs.get(f"{role}_token")
                names[role] = token.get("content") if isinstance(token, dict) else token
        roles = {role: names.get(role) for role in ("bos", "eos", "pad")}
        if odd := {role: name for role, name in roles.items() if not isinstance(name, str | None)}:
            raise ConfigError(f"{folder}: the tokens of the roles {odd!r}: expected text")
        return cls(read_text(Path(folder, "tokenizer.json")), **roles)

    def __reduce__(self):
        return _rebuild, (self._definition, self._names)

    def _roles(self, added: Mapping[str, int]) -> dict[str, int]:
        found: dict[str, int] = {}
        for role, name in self._names.items():
            if name is not None and (i := self._engine.token_to_id(name)) is not None:
                found[role] = i
            elif name is not None:
                raise ConfigError(f"tokenizer.json has no token {name!r} for the role '{role}'")
            elif usual := [u for u in _USUAL[role] if u in added]:
                found[role] = added[usual[0]]
        if "eos" not in found:
            raise ConfigError(f"tokenizer.json does not say what ends a text: pass eos= one of {list(added)}")
        return {role: found.get(role, found["eos"]) for role in ("bos", "eos", "pad")}

    def _spell(self, token: int, added: Mapping[int, Mapping]) -> bytes:
        text = self._engine.id_to_token(token)
        if token in self._special_text or text is None:
            return b""
        if token in added:
            return text.encode()
        if self._byte_level:
            return bytes(_BYTE_OF[c] for c in text) if all(c in _BYTE_OF for c in text) else text.encode()
        if byte := _BYTE.fullmatch(text):
            return bytes([int(byte[1], 16)])
        return text.replace(_SPACE, " ").encode()

    def _encode_text(self, text: str) -> list[int]:
        with _engine_errors("the tokenizer.json cannot encode"):
            ids = self._engine.encode(text, add_special_tokens=False).ids
        return self._spell_out_special(ids)

    def _spell_out_special(self, ids: list[int]) -> list[int]:
        # For role tokens that the file does not mark as special, and models that look whole words up.
        if self._special_text.keys().isdisjoint(ids):
            return ids
        spelled: list[int] = []
        for i in ids:
            text = self._special_text.get(i)
            spelled.extend([i] if text is None else [self._byte_id(b) for b in text.encode()])
        return spelled

    def _byte_id(self, byte: int) -> int:
        if byte not in self._byte_ids:
            raise DataError(f"the tokenizer has no token for the byte 0x{byte:02X}")
        return self._byte_ids[byte]


@contextlib.contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    """`ConfigError` for what the `tokenizers` package raises: bare exceptions, and its panics, which are none."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{what}: {str(error)[:300]}") from error


def _rebuild(definition: str, names: Mapping[str, str | None]) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(definition, **names)


def _component_types(parts: Mapping[str, Any]) -> set[str]:
    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield node.get("type", "")
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    return {t for key in ("pre_tokenizer", "decoder") for t in walk(parts[key])}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable ones are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
