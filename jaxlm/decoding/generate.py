"""Sampling from prompts of token ids: bucketed shapes, several samples a prompt, results as host arrays.

Shapes are rounded up (prompts and new tokens to powers of two from 32, the batch to powers of two), so that a bucket
compiles once whatever the parameters, prompts, lengths, seeds and numeric settings.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from jaxlm.core.errors import ConfigError
from jaxlm.core.sharding import to_host
from jaxlm.decoding.generator import GenerationState, Generator
from jaxlm.decoding.processors import MinP, Processor, RepetitionPenalty, TopK, TopP
from jaxlm.decoding.stepper import Params, Stepper


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How to sample. The defaults draw from the model's own distribution."""

    max_new_tokens: int = 128
    """The most tokens to append to each prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the most probable token."""
    top_k: int = 0
    """Draw only from the so many most probable tokens; 0 is off."""
    top_p: float = 1.0
    """Draw only from the most probable tokens that together have this probability; 1 is off."""
    min_p: float = 0.0
    """Draw only from tokens at least this times as probable as the most probable one; 0 is off."""
    repetition_penalty: float = 1.0
    """Makes tokens that already occurred less likely; 1 is off, 1.1 to 1.3 is usual."""
    seed: int = 0
    """Same seed, same samples, whatever else is in the batch."""
    num_samples: int = 1
    """Independent samples of each prompt; the prompt is computed once."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample; they are not part of the result."""

    def __post_init__(self):
        finite = all(math.isfinite(getattr(self, f)) for f in ("temperature", "top_p", "min_p", "repetition_penalty"))
        for field, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", finite and self.temperature >= 0, "a number >= 0"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", finite and 0 < self.top_p <= 1, "a number above 0 and up to 1"),
            ("min_p", finite and 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", finite and self.repetition_penalty > 0, "a number above 0"),
            ("num_samples", self.num_samples >= 1, "at least 1"),
            ("stop", all(self.stop), "texts that are not empty"),
        ):
            if not good:
                raise ConfigError(f"generation.{field} is {getattr(self, field)!r}, expected {expected}")

    def processors(self) -> tuple[Processor, ...]:
        """The processors that these settings ask for; none that would change nothing."""
        chain: list[Processor] = []
        if self.repetition_penalty != 1:
            chain.append(RepetitionPenalty(self.repetition_penalty))
        if self.temperature == 0:  # The most probable token survives every truncation.
            return tuple(chain)
        most = bucket(self.top_k, 1) if self.top_k else None
        if most is not None:
            chain.append(TopK(self.top_k, most))
        if self.top_p < 1:
            chain.append(TopP(self.top_p, most))
        if self.min_p > 0:
            chain.append(MinP(self.min_p))
        return tuple(chain)


@dataclasses.dataclass(frozen=True)
class GenerationOutput:
    """Samples as numpy arrays, `[prompts, samples, ...]`; new tokens only.

    The first `lengths` of `tokens` are real (a stop id is the last of them), the rest is 0. `logprobs` are natural
    logarithms under the model's distribution at the sampling temperature (1 if that is 0), before truncation;
    `processed_logprobs`, if asked for, under the distribution that was drawn from. `stopped`: ended by a stop id (else
    by its length).
    """

    tokens: Int[np.ndarray, "prompts samples new"]
    logprobs: Float[np.ndarray, "prompts samples new"]
    lengths: Int[np.ndarray, "prompts samples"]
    stopped: Bool[np.ndarray, "prompts samples"]
    processed_logprobs: Float[np.ndarray, "prompts samples new"] | None = None

    @property
    def mask(self) -> Bool[np.ndarray, "prompts samples new"]:
        """Which tokens are real."""
        return np.arange(self.tokens.shape[2])[None, None, :] < self.lengths[:, :, None]


def generate(
    stepper: Stepper,
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    stop_ids: Sequence[int] = (),
    processors: Sequence[Processor] = (),
    keys: Key[jax.Array, "prompts"] | None = None,
    capacity: int | None = None,
    processed_logprobs: bool = False,
) -> GenerationOutput:
    """Samples continuations of token ids.

    `processors` join those of `config`, each at its stage. `keys`, one for each prompt, replace those made from
    `config.seed` and the prompt's index. `capacity` bounds the tokens of a row, prompt and new ones together; by
    default there is room for all. A model with a fixed context bounds them too; a row that reaches a bound ends.

    Raises `ConfigError` for an empty or too long prompt and for ids outside of the vocabulary.
    """
    if config.stop:
        raise ConfigError(f"generation.stop is {config.stop!r}: texts need a tokenizer, so use generate_text")
    generator = Generator(stepper, processed_logprobs)
    state = start(
        generator, params, prompts, config, stop_ids=stop_ids, processors=processors, keys=keys, capacity=capacity
    )
    state = generator.advance(params, state, config.max_new_tokens)
    return collect(state, len(prompts), config)


def start(
    generator: Generator,
    params: Params,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    stop_ids: Sequence[int] = (),
    processors: Sequence[Processor] = (),
    keys: Key[jax.Array, "prompts"] | None = None,
    capacity: int | None = None,
    first_sample: int = 0,
) -> GenerationState:
    """The state after `prompts`, padded to a bucket of them and repeated `config.num_samples` times.

    Arguments and errors are those of `generate`. `first_sample` numbers the samples of each prompt.
    """
    lengths = check_prompts(prompts, generator.stepper.vocab_size)
    needed = bucket(max(lengths))
    room = needed + bucket(config.max_new_tokens) if capacity is None else capacity
    for index, length in enumerate(lengths):
        if length >= room:
            raise ConfigError(f"prompt {index} has {length} tokens, which leaves none of a capacity of {room} free")
    padded, real = pad(prompts, min(needed, room), bucket(len(prompts), 1))
    if keys is None:
        keys = prompt_keys(config.seed, padded.shape[0])
    elif len(keys) != len(prompts):
        raise ConfigError(f"{len(keys)} keys for {len(prompts)} prompts, expected one each")
    else:
        keys = keys[np.minimum(np.arange(padded.shape[0]), len(keys) - 1)]
    state = generator.prefill(
        params,
        padded,
        real,
        capacity=room,
        max_new=config.max_new_tokens,
        keys=keys,
        temperature=config.temperature,
        stop_ids=stop_ids,
        processors=sorted((*config.processors(), *processors), key=lambda p: p.stage),
    )
    return generator.repeat(state, config.num_samples, first_sample)


def collect(state: GenerationState, num_prompts: int, config: GenerationConfig) -> GenerationOutput:
    """The new tokens of a state that `start` made, on the host."""
    rows = num_prompts * config.num_samples
    begin = to_host(state.prompt_lengths)[:rows]
    lengths = to_host(state.lengths)[:rows] - begin
    new = np.arange(config.max_new_tokens)[None, :]
    real = new < lengths[:, None]
    places = np.where(real, begin[:, None] + new, 0)

    def shaped(x: np.ndarray) -> np.ndarray:
        return x.reshape(num_prompts, config.num_samples, *x.shape[1:])

    def cut(buffer: jax.Array | None) -> np.ndarray | None:
        if buffer is None:
            return None
        values = np.take_along_axis(to_host(buffer)[:rows], places, axis=1)
        return shaped(np.where(real, values, values.dtype.type(0)))

    return GenerationOutput(
        cut(state.tokens),
        cut(state.logprobs),
        shaped(lengths),
        shaped(to_host(state.stopped)[:rows]),
        cut(state.processed_logprobs),
    )


def bucket(size: int, smallest: int = 32) -> int:
    """`size` rounded up to a power of two, at least `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())


def prompt_keys(seed: int, count: int, first: int = 0) -> Key[jax.Array, "count"]:
    """The keys of prompts `first` to `first + count - 1`; each depends on the seed and its own index."""
    return _prompt_keys(jnp.asarray(seed, jnp.uint32), jnp.arange(first, first + count, dtype=jnp.uint32))


@jax.jit
def _prompt_keys(seed: jax.Array, indices: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), indices)


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> list[int]:
    """The prompts' lengths. Raises `ConfigError`, by index, for one that cannot be continued."""
    if not prompts:
        raise ConfigError("no prompts to continue, expected at least one")
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"prompt {index} is empty, expected at least one token (such as the BOS id)")
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < vocab_size:
                raise ConfigError(f"prompt {index} holds token {token}; the vocabulary has ids 0 to {vocab_size - 1}")
    return [len(prompt) for prompt in prompts]


def pad(
    prompts: Sequence[Sequence[int]], length: int, batch: int
) -> tuple[Int[np.ndarray, "batch length"], Int[np.ndarray, "batch"]]:
    """Prompts padded on the right to `length`, rows of padding after them to `batch`; and the real lengths."""
    tokens, lengths = np.zeros((batch, length), np.int32), np.zeros((batch,), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = np.asarray(prompt, np.int32)
        lengths[row] = len(prompt)
    return tokens, lengths
