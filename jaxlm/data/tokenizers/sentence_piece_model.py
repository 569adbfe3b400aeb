"""The bytes of a SentencePiece model, checked before SentencePiece's own code sees them.

That is C++ written for models of its own trainer: where one breaks its assumptions it may end the whole process. So
the protocol buffer (`sentencepiece_model.proto` of google/sentencepiece; wire format: protobuf.dev) is read here
first, as far as it matters.
"""

import math
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from jaxlm.core.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_CHARSMAP = 2
_MODEL_TYPE, _ROLE_IDS = 3, (40, 41, 42, 43)
_MOST_PIECES, _LONGEST = 1 << 22, 4096
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


class Piece(NamedTuple):
    """An entry of the vocabulary."""

    text: str
    score: float
    kind: int


def check(model: bytes) -> list[Piece]:
    """The vocabulary of a serialized model.

    Raises `ConfigError` for bytes that are not such a model; for pieces that are empty, very long, twice there, not
    text, of an unknown kind, or whose score is not a number; for other than one unknown piece; for byte pieces that
    are not spelled as such; for roles (BOS, EOS, ...) outside the vocabulary; and for a normalization table, which a
    lossless model has not.
    """
    pieces: list[Piece] = []
    unknown_fields = 0
    for number, value in _fields(model, "the model"):
        if number == _PIECES:
            pieces.append(_piece(_message(value, "piece"), len(pieces)))
            _require(len(pieces) <= _MOST_PIECES, f"it has more than {_MOST_PIECES} pieces")
        elif number == _TRAINER:
            _check_trainer(_message(value, "trainer_spec"))
        elif number in (_NORMALIZER, _DENORMALIZER):
            for field, table in _fields(_message(value, "normalizer_spec"), "normalizer_spec"):
                _require(field != _CHARSMAP or not table, "it normalizes text, expected identity normalization")
        else:
            unknown_fields += 1
    _require(bool(pieces), "it has no pieces")
    _require(unknown_fields <= 100, "it is made of unknown fields")
    texts = {piece.text for piece in pieces}
    _require(len(texts) == len(pieces), "it has a piece twice")
    _require(sum(piece.kind == UNKNOWN for piece in pieces) == 1, "it has no unknown piece, or several")
    return pieces


def _piece(message: bytes, index: int) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(message, f"piece {index}"):
        if number == 1:
            try:
                text = _message(value, f"piece {index}").decode()
            except UnicodeDecodeError as error:
                raise ConfigError(f"not a SentencePiece model: piece {index} is not UTF-8") from error
        elif number == 2:
            _require(isinstance(value, float), f"the score of piece {index} is not a number")
            score = value
        elif number == 3:
            kind = value
    _require(0 < len(text) <= _LONGEST, f"piece {index} has {len(text)} characters")
    _require("\0" not in text, f"piece {index} has a null character")
    _require(math.isfinite(score), f"the score of piece {index} is {score}")
    _require(kind in range(NORMAL, BYTE + 1), f"piece {index} is of the unknown kind {kind}")
    _require(kind != BYTE or bool(_BYTE_PIECE.fullmatch(text)), f"the byte piece {index} is {text!r}")
    return Piece(text, score, kind)


def _check_trainer(message: bytes) -> None:
    for number, value in _fields(message, "trainer_spec"):
        if number == _MODEL_TYPE:
            _require(value in (1, 2), f"its type is {value}, expected unigram (1) or BPE (2)")
        elif number in _ROLE_IDS:  # negative ones, which are absent, have ten bytes
            is_id = isinstance(value, int) and (value < _MOST_PIECES or value >= 1 << 63)
            _require(is_id, f"a role has the id {value}")


def _fields(message: bytes, where: str) -> Iterator[tuple[int, int | float | bytes]]:
    """The numbers and values of a message's fields, in order."""
    at, size = 0, len(message)

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            _require(at < size and shift < 70, f"{where} is cut short")
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < size:
        key = varint()
        number, kind = key >> 3, key & 7
        _require(0 < number < 1 << 29, f"{where} has field {number}")
        if kind == 0:
            yield number, varint()
            continue
        _require(kind in (1, 2, 5), f"{where} has a field of wire type {kind}")
        count = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        _require(count <= size - at, f"{where} is cut short")
        raw = message[at : at + count]
        at += count
        yield number, raw if kind == 2 else struct.unpack("<d" if kind == 1 else "<f", raw)[0]


def _message(value: int | float | bytes, where: str) -> bytes:
    _require(isinstance(value, bytes), f"{where} is no message")
    return value


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ConfigError(f"not a SentencePiece model that can be used: {what}")
