"""What is fuzzed: each reader of files with inputs made from valid ones. A target is a strategy and a function.

The function reads one input as users' code would. It may return, or raise an error of `jaxlm.core.errors`; anything
else is a finding.
"""

from tests.fuzz import checkpoints, gguf, language, runs, texts, tokenizers
from tests.fuzz.target import Target

TARGETS: dict[str, Target] = {}
for room in (checkpoints, gguf, texts, tokenizers, runs, language):
    TARGETS |= room.TARGETS
