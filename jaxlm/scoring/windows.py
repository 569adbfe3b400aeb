"""Long texts as windows of a model's context, in which every token is predicted exactly once."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxlm.core.errors import ConfigError


class Window(NamedTuple):
    """Token ids, of which the last `count` are to be predicted from those before them."""

    tokens: tuple[int, ...]
    count: int


def rolling_windows(tokens: Sequence[int], prefix: int, max_length: int) -> list[Window]:
    """Windows that together predict each of `tokens` once, each with at most `max_length` inputs.

    The first token is predicted from `prefix` alone (a BOS or end-of-text id). Each window but the last predicts as
    many tokens as it has inputs; the last one reaches back for a full context. With ids 0 to 9 and a length of 4 the
    inputs are `[prefix, 0, 1, 2]`, `[3, 4, 5, 6]`, `[5, 6, 7, 8]` and the targets `[0, 1, 2, 3]`, `[4, 5, 6, 7]`,
    `[8, 9]`.

    Source: `loglikelihood_rolling` of EleutherAI's lm-evaluation-harness 0.4.13, with a context of one token.
    """
    if max_length < 1:
        raise ConfigError(f"max_length is {max_length}, expected at least 1")
    if not tokens:
        return []
    first = tuple(tokens[:max_length])
    windows = [Window((prefix, *first), len(first))]
    for begin in range(len(first), len(tokens), max_length):
        end = min(begin + max_length, len(tokens))
        windows.append(Window(tuple(tokens[end - max_length - 1 : end]), end - begin))
    return windows
