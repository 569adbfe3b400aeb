"""Text completions of any number of prompts, in batches of like lengths."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.core.errors import ConfigError
from jaxlm.decoding.generate import GenerationConfig, prompt_keys
from jaxlm.decoding.stepper import Params, Stepper
from jaxlm.decoding.text import Completion, Prompt, Tokenizer, generate_text, prompt_ids


def complete(
    stepper: Stepper,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    stop_ids: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Completion]]:
    """`config.num_samples` continuations of each prompt, in the order of `prompts`.

    Each is the one that `generate_text` gives with all prompts in one batch, whatever `batch_size` (prompts a batch).
    With `max_length`, a prompt that leaves no room for `config.max_new_tokens` in a context of this length loses its
    beginning. `progress` is called with the number of prompts done and of all.

    Raises `ConfigError` when the new tokens alone fill `max_length`, and as `generate_text` does.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    if max_length is not None:
        room = max_length - config.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"generation.max_new_tokens is {config.max_new_tokens}, expected less than the context of {max_length}"
            )
        ids = [prompt[-room:] for prompt in ids]
    # The longest first: what does not fit into memory shows at once.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    keys = prompt_keys(config.seed, len(ids)) if ids else None
    results: list[list[Completion]] = [[] for _ in ids]
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        # A short last batch is filled up, so that it compiles nothing new.
        filled = chosen + chosen[-1:] * (batch_size - len(chosen) if begin else 0)
        batch = [ids[i] for i in filled]
        found = generate_text(stepper, params, tokenizer, batch, config, stop_ids=stop_ids, keys=keys[np.array(filled)])
        for i, completions in zip(chosen, found):
            results[i] = completions
        if progress is not None:
            progress(begin + len(chosen), len(order))
    return results
