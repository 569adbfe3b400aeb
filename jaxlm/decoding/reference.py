"""A slow generator that is easy to believe: for each token, the whole row alone, without cache, batch or compilation.

The tests compare the fast one with it; it is written with numpy and shares with it only the rule for keys.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

LogitsFunction = Callable[[Int[np.ndarray, "length"]], Float[np.ndarray, "length vocab"]]


class ReferenceSample(NamedTuple):
    """New tokens, their log-probabilities before truncation, and whether a stop id ended them."""

    tokens: list[int]
    logprobs: list[float]
    stopped: bool


def reference_generate(
    logits_of: LogitsFunction,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    key: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> ReferenceSample:
    """Continues one prompt. `logits_of(tokens)` gives the logits after each token of a whole sequence."""
    row, logprobs = list(prompt), []
    for count in range(max_new_tokens):
        raw = np.asarray(logits_of(np.array(row, np.int32)), np.float32)[-1]
        tempered = raw / (temperature or 1.0)
        logits = raw.copy()
        for token in set(row):
            logits[token] = logits[token] * (1 / repetition_penalty if logits[token] > 0 else repetition_penalty)
        if temperature == 0:
            token = int(np.argmax(logits))
        else:
            logits = truncate(logits / temperature, top_k, top_p, min_p)
            noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, count), logits.shape, np.float32))
            token = int(np.argmax(logits + noise))
        row.append(token)
        logprobs.append(float(tempered[token] - np.log(np.sum(np.exp(tempered - tempered.max()))) - tempered.max()))
        if token in stop_ids:
            return ReferenceSample(row[len(prompt) :], logprobs, True)
    return ReferenceSample(row[len(prompt) :], logprobs, False)


def truncate(logits: Float[np.ndarray, "vocab"], top_k: int, top_p: float, min_p: float) -> Float[np.ndarray, "vocab"]:
    """Top-k, then top-p of what is left, then min-p: by going through the tokens from the most probable on."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    kept = order[:top_k] if top_k else order
    probs = np.exp(logits[kept] - logits[kept[0]])
    probs = probs / probs.sum()
    nucleus, total = [], 0.0
    for token, prob in zip(kept, probs):
        if nucleus and total >= top_p:
            break
        nucleus.append(token)
        total += prob
    best = np.exp(logits[nucleus[0]])
    final = [token for token in nucleus if np.exp(logits[token]) >= min_p * best]
    out = np.full_like(logits, -np.inf)
    out[final] = logits[final]
    return out
