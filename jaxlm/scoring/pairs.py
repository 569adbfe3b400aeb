"""Log-likelihoods of texts: of a continuation given a context, and of whole documents.

The rules of tokenization are those of EleutherAI's lm-evaluation-harness 0.4.13 (`TemplateLM`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from jaxlm.core.errors import DataError
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.scoring.tokens import score_rolling, score_tokens


class Encoding(Protocol):
    """What is needed of a tokenizer to score texts."""

    @property
    def prefix(self) -> int:
        """The id from which the first token of a text is predicted."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a context, alone or with its continuation."""
        ...

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text that stands after `prefix`, which begins with none of its own."""
        ...


@dataclasses.dataclass(frozen=True)
class TokenizerEncoding:
    """An `Encoding` by a tokenizer of `jaxlm.data.tokenizers`.

    With `add_bos` contexts begin with the BOS id, as the Hugging Face tokenizers of Llama and Gemma have it; those of
    SmolLM2, Qwen, GPT-2 and Pythia do not. An empty context is the BOS id (EOS where there is none) either way.
    """

    tokenizer: Tokenizer
    add_bos: bool = False

    @property
    def prefix(self) -> int:
        special = self.tokenizer.special_ids
        return special["bos"] if "bos" in special else special["eos"]

    def encode(self, text: str) -> list[int]:
        return ([self.prefix] if self.add_bos else []) + list(self.tokenizer.encode(text))

    def encode_plain(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text))


class PairScore(NamedTuple):
    """Of a continuation: its log-likelihood, whether greedy decoding would give it, its number of tokens."""

    log_likelihood: float
    greedy: bool
    num_tokens: int


class TextScore(NamedTuple):
    """Of a whole text: its log-likelihood, and its tokens, UTF-8 bytes, and words (split at white space)."""

    log_likelihood: float
    num_tokens: int
    num_bytes: int
    num_words: int


def encode_pair(encoding: Encoding, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The ids of a context, and of what follows it in the ids of both together.

    Spaces at the end of the context are moved to the continuation, and merges across the boundary stay as they are in
    the whole text. An empty context is the id `prefix`; a continuation that begins with that id lends it.
    """
    if not context:
        ids = encoding.encode_plain(continuation)
        return (ids[:1], ids[1:]) if ids[:1] == [encoding.prefix] else ([encoding.prefix], ids)
    moved = len(context) - len(context.rstrip())
    if moved:
        context, continuation = context[:-moved], context[-moved:] + continuation
    whole, ids = encoding.encode(context + continuation), encoding.encode(context)
    return ids or [encoding.prefix], whole[len(ids) :]


def score_pairs(
    model: Any, params: Any, encoding: Encoding, pairs: Sequence[tuple[str, str]], **options: Any
) -> list[PairScore]:
    """Scores each `(context, continuation)`; `options` are those of `score_tokens`.

    Raises `DataError`, by index, for a continuation that adds no token, or more than the model's context holds.
    """
    encoded = [encode_pair(encoding, *pair) for pair in pairs]
    for index, (_, ids) in enumerate(encoded):
        if not ids:
            raise DataError(f"pair {index}: the continuation {pairs[index][1]!r} adds no token to its context")
    sequences, counts = [c + t for c, t in encoded], [len(t) for _, t in encoded]
    scores = score_tokens(model, params, sequences, counts=counts, **options)
    return [PairScore(s.total, s.all_greedy, len(s.greedy)) for s in scores]


def score_texts(model: Any, params: Any, encoding: Encoding, texts: Sequence[str], **options: Any) -> list[TextScore]:
    """Scores all of each text, every token once; `options` are those of `score_rolling`."""
    encoded = [encoding.encode_plain(text) for text in texts]
    scores = score_rolling(model, params, encoded, prefix=encoding.prefix, **options)
    return [
        TextScore(score.total, len(ids), len(text.encode()), len(text.split()))
        for text, ids, score in zip(texts, encoded, scores)
    ]
