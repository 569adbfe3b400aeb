"""What every tokenizer does, and the parts that follow from `encode` and `token_bytes` alone."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from jaxlm.core.errors import DataError

SETTINGS_FILE = "jaxlm_tokenizer.json"


class Tokenizer(Protocol):
    """Text to token ids and back, without loss.

    For any bytes x, `decode_bytes(encode(x)) == x`, and for any str s, `decode(encode(s)) == s` (a str with
    lone surrogates has no UTF-8 form and raises `DataError`). `encode` adds no special token, and no text
    yields one, not even text that spells it.

    A new tokenizer subclasses this and writes `encode`, `token_bytes`, `special_ids`, `vocab_size`,
    `fingerprint` and `save`; the rest follows.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included; ids are 0 to vocab_size - 1."""
        ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids that text never yields, by role (always `bos`, `eos`, `pad`) or by name for the others.

        Roles may share an id: models without a BOS or padding token use EOS.
        """
        ...

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Special ids by their spelling, which chat templates write; those known by role alone are not here."""
        return {name: i for name, i in self.special_ids.items() if name not in ("bos", "eos", "pad")}

    @property
    def fingerprint(self) -> str:
        """A hex digest; equal for two tokenizers exactly if they map text to ids alike."""
        ...

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of `text`, without special tokens. Bytes need not be valid UTF-8."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for; empty for special ids."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes what `load_tokenizer(folder)` needs."""
        ...

    def encode_batch(self, texts: Sequence[str | bytes]) -> list[list[int]]:
        """`encode` of each text; members override it where their engine has threads."""
        return [self.encode(text) for text in texts]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text`, and for each the half-open span of characters `text[start:end]` that it touches.

        A token that holds only some bytes of a character (byte fallback, byte-level merges) has the whole
        character in its span, so the tokens of one character share it. Spans never decrease and cover the
        text.
        """
        ids = self.encode(text)
        return ids, byte_spans_to_characters(text, [len(self.token_bytes(i)) for i in ids])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids, joined; special ids contribute nothing."""
        return b"".join(self.token_bytes(int(i)) for i in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """`decode_bytes` as text; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """int32 `[vocab_size]`: bytes per id, 0 for special ids; sums of it over targets give bits per byte."""
    lengths = [len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    return np.asarray(lengths, dtype=np.int32)


# Below: what members share.


def utf8(text: str | bytes) -> bytes:
    """The UTF-8 bytes of `text` (bytes pass through); `DataError` for a str with lone surrogates."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} is the lone surrogate {text[error.start]!r}: it has no UTF-8 form"
        ) from error


def byte_spans_to_characters(text: str, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Character spans of consecutive tokens that hold `lengths` bytes of `text` each."""
    raw = np.frombuffer(utf8(text), dtype=np.uint8)
    # A byte belongs to the character that the latest non-continuation byte began.
    character = np.append(np.cumsum((raw & 0xC0) != 0x80) - 1, len(text))
    sizes = np.asarray(lengths, dtype=np.int64)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    first = character[starts]
    last = np.where(ends > starts, character[np.maximum(ends, 1) - 1] + 1, first)
    return list(zip(first.tolist(), last.tolist()))


def encode_around(
    text: str | bytes,
    encode: Callable[[str], list[int]],
    encode_byte: Callable[[int], int],
    reserved: str = "",
) -> list[int]:
    """`encode` of the valid stretches of `text`; invalid bytes, and `reserved` characters, byte by byte."""
    if isinstance(text, str) and not (reserved and reserved in text):
        utf8(text)
        return encode(text)
    raw = utf8(text)
    ids: list[int] = []
    while raw:
        try:
            valid, invalid, raw = raw.decode(), b"", b""
        except UnicodeDecodeError as error:
            valid, invalid = raw[: error.start].decode(), raw[error.start : error.end]
            raw = raw[error.end :]
        for stretch in re.split(f"({re.escape(reserved)})", valid) if reserved else [valid]:
            if stretch == reserved:
                ids.extend(encode_byte(b) for b in stretch.encode())
            elif stretch:
                ids.extend(encode(stretch))
        ids.extend(encode_byte(b) for b in invalid)
    return ids
