"""Sampling many prompts through a fixed number of rows: a row that ends is given the next prompt.

A plain batch runs until its longest row ends. Here the compiled loop stops every few steps, finished rows are taken
out, and waiting prompts are prefilled into their places.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from jaxlm.core.errors import ConfigError
from jaxlm.decoding.generate import (
    GenerationConfig,
    GenerationOutput,
    bucket,
    check_prompts,
    pad,
    prompt_keys,
)
from jaxlm.decoding.generator import GenerationState, Generator
from jaxlm.decoding.processors import Processor
from jaxlm.decoding.stepper import Params, Stepper


class Sample(NamedTuple):
    """One finished sample: of which prompt, which of its samples, its new tokens."""

    prompt: int
    number: int
    tokens: Int[np.ndarray, "new"]
    logprobs: Float[np.ndarray, "new"]
    stopped: bool


def generate_refilled(
    stepper: Stepper,
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    **options: Any,
) -> GenerationOutput:
    """What `generate` gives, in the same order, computed with refill. `options` are those of `refilled`."""
    n = config.num_samples
    shape = (len(prompts), n, config.max_new_tokens)
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    lengths, stopped = np.zeros(shape[:2], np.int32), np.zeros(shape[:2], bool)
    for sample in refilled(stepper, params, prompts, config, **options):
        at, length = (sample.prompt, sample.number), len(sample.tokens)
        tokens[at][:length], logprobs[at][:length] = sample.tokens, sample.logprobs
        lengths[at], stopped[at] = length, sample.stopped
    return GenerationOutput(tokens, logprobs, lengths, stopped)


def refilled(
    stepper: Stepper,
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    slots: int = 16,
    chunk: int = 16,
    stop_ids: Sequence[int] = (),
    processors: Sequence[Processor] = (),
    keys: Key[jax.Array, "prompts"] | None = None,
) -> Iterator[Sample]:
    """Yields samples as they finish; `prompt` and `number` say which they are.

    Each equals the sample that `generate` gives, whatever `slots` and `chunk`. Every `chunk` steps finished rows are
    exchanged, so a row waits at most that long. Prompts enter a few rows at a time, in order, which compiles one
    prefill for each bucket of prompt lengths. Raises `ConfigError` as `generate` does.
    """
    if not stepper.per_row:
        raise ConfigError("refilling rows needs a cache with an index per row, such as DecoderStepper(model)")
    if config.stop:
        raise ConfigError(f"generation.stop is {config.stop!r}: texts need a tokenizer, so use generate_text")
    lengths = check_prompts(prompts, stepper.vocab_size)
    generator = Generator(stepper)
    keys = prompt_keys(config.seed, len(prompts)) if keys is None else keys
    chain = sorted((*config.processors(), *processors), key=lambda p: p.stage)
    waiting = [(prompt, number) for prompt in range(len(prompts)) for number in range(config.num_samples)][::-1]
    slots = min(slots, len(waiting))
    width = min(slots, 4)
    capacity = bucket(max(lengths)) + bucket(config.max_new_tokens)

    def enter(items: Sequence[tuple[int, int]]) -> GenerationState:
        """A state of `width` rows, the first of them for these prompts and samples."""
        chosen = [prompts[prompt] for prompt, _ in items]
        padded, real = pad(chosen, bucket(max(map(len, chosen))), width)
        which = np.array([*items, *[(0, 0)] * (width - len(items))], np.int32)
        return generator.prefill(
            params,
            padded,
            real,
            capacity=capacity,
            max_new=config.max_new_tokens,
            keys=_sample_keys(keys, which[:, 0], which[:, 1]),
            temperature=config.temperature,
            stop_ids=stop_ids,
            processors=chain,
        )

    rows: list[tuple[int, int] | None] = [None] * slots
    state = None
    while waiting or any(rows):
        free = [row for row, item in enumerate(rows) if item is None]
        while waiting and free:
            count = min(width, len(free), len(waiting))
            places, items = [free.pop(0) for _ in range(count)], [waiting.pop() for _ in range(count)]
            entering = enter(items)
            if state is None:  # All rows exist from here on; those not yet entered are copies that count as done.
                state = generator.gather(entering, np.arange(slots) % width)
                state = generator.stop(state, np.ones((slots,), bool))
            state = generator.insert(state, np.array([*places, *[slots] * (width - count)]), entering)
            for row, item in zip(places, items):
                rows[row] = item
        state = generator.advance(params, state, chunk)
        done, begin, end = (np.array(x) for x in (state.done, state.prompt_lengths, state.lengths))
        if not any(done[row] for row, item in enumerate(rows) if item is not None):
            continue
        tokens, logprobs, stopped = (np.array(x) for x in (state.tokens, state.logprobs, state.stopped))
        for row, item in enumerate(rows):
            if item is not None and done[row]:
                new = slice(begin[row], end[row])
                yield Sample(*item, tokens[row, new], logprobs[row, new], bool(stopped[row]))
                rows[row] = None


@jax.jit
def _sample_keys(keys: jax.Array, prompts: jax.Array, numbers: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in)(keys[jnp.asarray(prompts)], jnp.asarray(numbers))
