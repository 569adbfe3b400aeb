"""Tiny models with every family's switches, toy tokenizers and chats: for tests (yours and ours)."""

from jaxlm.testing.chats import tiny_checkpoint, toy_records
from jaxlm.testing.models import FAMILIES, randomize, tiny_config, tiny_decoder
from jaxlm.testing.tokenizers import DigitGroupTokenizer, GreedyTokenizer

__all__ = [
    "FAMILIES",
    "DigitGroupTokenizer",
    "GreedyTokenizer",
    "randomize",
    "tiny_checkpoint",
    "tiny_config",
    "tiny_decoder",
    "toy_records",
]
