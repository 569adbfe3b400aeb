"""Bytes as tokens: no training, no unknown text, one id per byte (as in ByT5, arXiv 2105.13626)."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from jaxlm.core import configs
from jaxlm.data.tokenizers.protocol import SETTINGS_FILE, Tokenizer, utf8


class ByteTokenizer(Tokenizer):
    """Id b is byte b for b < 256; then `bos` 256, `eos` 257, `pad` 258."""

    kind = "byte"
    vocab_size = 259
    special_ids: Mapping[str, int] = MappingProxyType({"bos": 256, "eos": 257, "pad": 258})
    fingerprint = configs.fingerprint([kind, vocab_size])

    def encode(self, text: str | bytes) -> list[int]:
        return list(utf8(text))

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def save(self, folder: str | Path) -> None:
        Path(folder, SETTINGS_FILE).write_text(json.dumps({"kind": self.kind}))

    @classmethod
    def load(cls, folder: str | Path) -> "ByteTokenizer":
        return cls()
