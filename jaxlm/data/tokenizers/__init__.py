"""Tokenizers behind one protocol: bytes, SentencePiece, Hugging Face `tokenizer.json`."""

from pathlib import Path

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.json_files import read_object, read_text
from jaxlm.data.tokenizers.byte import ByteTokenizer
from jaxlm.data.tokenizers.hugging_face import HuggingFaceTokenizer
from jaxlm.data.tokenizers.protocol import SETTINGS_FILE, Tokenizer, token_byte_lengths
from jaxlm.data.tokenizers.sentence_piece import SentencePieceTokenizer, train_sentencepiece

__all__ = [
    "ByteTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "token_byte_lengths",
    "train_sentencepiece",
]

KINDS = {cls.kind: cls for cls in (ByteTokenizer, SentencePieceTokenizer, HuggingFaceTokenizer)}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder that `save` wrote, a Hugging Face folder, or a `.json` or `.model` file.

    Raises `ConfigError` where there is none, or one that is damaged or not supported, `DataError` for files that are
    not text or not JSON.
    """
    path = Path(path)
    settings = path / SETTINGS_FILE
    if settings.exists():
        kind = read_object(settings).get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ConfigError(f"{settings}: unknown kind of tokenizer {kind!r}: {nearest(str(kind), KINDS)}")
        return KINDS[kind].load(path)
    if path.name == "tokenizer.json":
        path = path.parent
    if (path / "tokenizer.json").exists():
        return HuggingFaceTokenizer.load(path)
    if path.suffix == ".json" and path.is_file():
        return HuggingFaceTokenizer(read_text(path))
    if path.suffix == ".model" and path.is_file():
        return SentencePieceTokenizer(path.read_bytes())
    raise ConfigError(
        f"no tokenizer at {path}: expected a folder with {SETTINGS_FILE} or tokenizer.json, a .json or a .model file"
    )
