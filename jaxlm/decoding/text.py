"""Sampling from text to text: stop strings, and pieces of text as soon as they are final."""

import codecs
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Key

from jaxlm.core.errors import ConfigError
from jaxlm.core.sharding import to_host
from jaxlm.decoding.generate import GenerationConfig, start
from jaxlm.decoding.generator import GenerationState, Generator
from jaxlm.decoding.processors import Forbid
from jaxlm.decoding.stepper import Params, Stepper


class Tokenizer(Protocol):
    """What is needed of a tokenizer here; those of `jaxlm.data.tokenizers` have it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids by role; `bos` begins a prompt and `eos` ends a sample, if they are there."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that an id stands for, empty for special ids."""
        ...


Prompt = str | Sequence[int]
"""A text, whose ids come after the BOS id, or ids, taken as they are (a chat with its control tokens)."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sample. `text` ends before a stop string; `tokens` and `logprobs` include what ended it.

    `finish_reason`: `stop` (a stop id or stop string) or `length`.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def generate_text(
    stepper: Stepper,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    stop_ids: Sequence[int] | None = None,
    keys: Key[jax.Array, "prompts"] | None = None,
) -> list[list[Completion]]:
    """`config.num_samples` continuations of each prompt.

    Stop strings are looked for in the bytes of the new tokens, so they may begin and end inside of tokens; whichever is
    complete first ends the sample. `stop_ids` end it too; by default the tokenizer's EOS. `keys` are those of
    `generate`.
    """
    generator, begun = _start(stepper, params, tokenizer, prompts, config, stop_ids=stop_ids, keys=keys)
    texts = [_Text(tokenizer, config.stop) for _ in range(len(prompts) * config.num_samples)]
    chunk = 16 if config.stop else config.max_new_tokens
    *_, (state, _) = _run(generator, params, begun, texts, chunk, config)
    begin, tokens, logprobs = (to_host(x) for x in (state.prompt_lengths, state.tokens, state.logprobs))
    stopped = to_host(state.stopped)
    completions = []
    for row, text in enumerate(texts):
        new = slice(begin[row], begin[row] + text.num_tokens)
        reason = "stop" if stopped[row] or text.stopped else "length"
        completions.append(
            Completion(text.final(), tuple(tokens[row, new].tolist()), tuple(logprobs[row, new].tolist()), reason)
        )
    n = config.num_samples
    return [completions[i : i + n] for i in range(0, len(completions), n)]


def stream_text(
    stepper: Stepper,
    params: Params,
    tokenizer: Tokenizer,
    prompt: Prompt,
    config: GenerationConfig,
    *,
    sample: int = 0,
    chunk: int = 4,
    stop_ids: Sequence[int] | None = None,
) -> Iterator[str]:
    """Yields the text of one sample piece by piece, `chunk` tokens at a time.

    Held back until they are decided: bytes of an incomplete character, and what may be the beginning of a stop string.
    The pieces joined are the text of sample number `sample` that `generate_text` gives for this prompt.
    """
    config = dataclasses.replace(config, num_samples=1)
    generator, state = _start(stepper, params, tokenizer, [prompt], config, first_sample=sample, stop_ids=stop_ids)
    text = _Text(tokenizer, config.stop)
    for _, (piece,) in _run(generator, params, state, [text], chunk, config):
        if piece:
            yield piece
    if tail := text.flush():
        yield tail


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The ids that a prompt stands for."""
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    begin = [tokenizer.special_ids["bos"]] if "bos" in tokenizer.special_ids else []
    return begin + list(tokenizer.encode(prompt))


def _start(
    stepper: Stepper,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    config: GenerationConfig,
    *,
    first_sample: int = 0,
    stop_ids: Sequence[int] | None = None,
    keys: jax.Array | None = None,
) -> tuple[Generator, GenerationState]:
    known, modeled = tokenizer.vocab_size, stepper.vocab_size
    if known > modeled:
        raise ConfigError(f"a tokenizer with {known} ids for a model with {modeled}")
    # Models round their vocabulary up; what is beyond the tokenizer's stands for nothing.
    surplus = (Forbid(jnp.arange(modeled) >= known),) if known < modeled else ()
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    if stop_ids is None:
        stop_ids = [tokenizer.special_ids["eos"]] if "eos" in tokenizer.special_ids else []
    generator = Generator(stepper)
    options = {"stop_ids": stop_ids, "processors": surplus, "keys": keys, "first_sample": first_sample}
    return generator, start(generator, params, ids, config, **options)


def _run(
    generator: Generator,
    params: Params,
    state: GenerationState,
    texts: Sequence["_Text"],
    chunk: int,
    config: GenerationConfig,
) -> Iterator[tuple[GenerationState, list[str]]]:
    """Advances by `chunk` tokens at a time, feeds them to `texts`, and yields each text's new piece."""
    begin = np.array(to_host(state.prompt_lengths))
    batch = len(begin)
    for _ in range(0, config.max_new_tokens, chunk):
        state = generator.advance(params, state, chunk)
        lengths, tokens = np.array(to_host(state.lengths)), np.array(to_host(state.tokens))
        for row, text in enumerate(texts):
            text.feed(tokens[row, begin[row] + text.num_tokens : lengths[row]])
        ended = np.zeros((batch,), bool)
        ended[: len(texts)] = [text.stopped for text in texts]
        if ended.any():
            state = generator.stop(state, ended)
        yield state, [text.piece() for text in texts]
        if to_host(state.done).all():
            return


class _Text:
    """The bytes of one sample, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self.tokenizer = tokenizer
        self.stop = [s.encode() for s in stop]
        self.raw = bytearray()
        self.num_tokens = 0
        self.stopped = False
        self._given = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Sequence[int]) -> None:
        """Appends tokens, up to the one that completes a stop string; its text and what follows are dropped."""
        for token in tokens:
            if self.stopped:
                return
            before = len(self.raw)
            self.raw += self.tokenizer.token_bytes(int(token))
            self.num_tokens += 1
            found = []
            for stop in self.stop:
                at = self.raw.find(stop, max(0, before - len(stop) + 1))
                if at >= 0:
                    found.append((at + len(stop), at))
            if found:
                del self.raw[min(found)[1] :]
                self.stopped = True

    def piece(self) -> str:
        """The text that has become final since the last call."""
        end = len(self.raw) if self.stopped else len(self.raw) - self._undecided()
        piece = self._decoder.decode(bytes(self.raw[self._given : end]))
        self._given = max(end, self._given)
        return piece

    def flush(self) -> str:
        """The rest, when nothing more will come."""
        return self._decoder.decode(bytes(self.raw[self._given :]), final=True)

    def final(self) -> str:
        """The whole text."""
        return self.raw.decode("utf-8", errors="replace")

    def _undecided(self) -> int:
        """The length of the longest end of `raw` with which a stop string may begin."""
        for size in range(max((len(s) for s in self.stop), default=1) - 1, 0, -1):
            if any(len(s) > size and self.raw.endswith(s[:size]) for s in self.stop):
                return size
        return 0
