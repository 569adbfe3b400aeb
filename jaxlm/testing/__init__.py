"""Tiny models with every family's switches, for tests (yours and ours)."""

from jaxlm.testing.models import FAMILIES, randomize, tiny_config, tiny_decoder

__all__ = ["FAMILIES", "randomize", "tiny_config", "tiny_decoder"]
