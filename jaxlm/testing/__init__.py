"""Tiny models with every family's switches, and toy tokenizers: for tests (yours and ours)."""

from jaxlm.testing.models import FAMILIES, randomize, tiny_config, tiny_decoder
from jaxlm.testing.tokenizers import DigitGroupTokenizer, GreedyTokenizer

__all__ = ["FAMILIES", "DigitGroupTokenizer", "GreedyTokenizer", "randomize", "tiny_config", "tiny_decoder"]
