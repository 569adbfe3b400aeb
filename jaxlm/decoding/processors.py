"""Changes to the logits before a token is drawn: penalties, masks, temperature, truncation.

A processor is a dataclass registered as a pytree. Its numbers are leaves, one for all rows or one per row, so other
numbers never compile again; what changes the program (how many tokens a top-k may keep) is static. `init` gives every
leaf a leading batch axis and adds what the processor remembers of each row. Then, at every step, `__call__` changes the
logits and `update` sees which tokens were appended. The order of a chain is fixed by the `stage`s:

    penalties -> bias and masks -> temperature -> top-k -> top-p -> min-p

A removed token has logit -inf. Everything is float32, and a setting at its neutral value changes no bit.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core.errors import ConfigError

PENALTY, MASK, TEMPERATURE, TRUNCATION = range(4)
"""Stages of a chain. The generator itself applies the temperature, so processors have one of the others."""

Numbers = float | int | Array


class History(NamedTuple):
    """The rows so far: the first `lengths` of each row's `tokens`, of which `prompt_lengths` are prompt."""

    tokens: Int[Array, "batch capacity"]
    lengths: Int[Array, "batch"]
    prompt_lengths: Int[Array, "batch"]


class Appended(NamedTuple):
    """What a step appended: a token to each `active` row, and its log-probability under the model."""

    tokens: Int[Array, "batch"]
    logprobs: Float[Array, "batch"]
    active: Bool[Array, "batch"]


class Processor(Protocol):
    """One change of the logits. All methods are pure; all leaves after `init` are `[batch, ...]`."""

    stage: ClassVar[int]

    def init(self, history: History, vocab_size: int) -> Self:
        """The processor for these rows. Also called on its own result, when rows were rolled back to `history`."""
        ...

    def __call__(
        self, logits: Float[Array, "batch vocab"], history: History
    ) -> tuple[Self, Float[Array, "batch vocab"]]: ...

    def update(self, appended: Appended) -> Self: ...


class _Stateless:
    """A processor whose only memory is its settings, a number a row each."""

    def init(self, history: History, vocab_size: int) -> Self:
        return _per_row(self, history.lengths.shape[0])

    def __call__(self, logits: Array, history: History) -> tuple[Self, Array]:
        return self, self.change(logits)

    def update(self, appended: Appended) -> Self:
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    """Divides positive and multiplies negative logits of tokens seen in prompt or output by `penalty`.

    Keskar et al. 2019 (CTRL, arXiv 1909.05858), section 4.1, in the form in use that handles both signs. Neutral: 1.
    """

    stage: ClassVar[int] = PENALTY
    penalty: Numbers = 1.0
    seen: Bool[Array, "batch vocab"] | None = None

    def init(self, history: History, vocab_size: int) -> Self:
        places = jnp.arange(history.tokens.shape[1], dtype=jnp.int32)[None, :]
        seen = _count(history, places < history.lengths[:, None], vocab_size) > 0
        return RepetitionPenalty(_rows(self.penalty, seen.shape[0]), seen)

    def __call__(self, logits: Array, history: History) -> tuple[Self, Array]:
        penalty = self.penalty[:, None]
        return self, jnp.where(self.seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)

    def update(self, appended: Appended) -> Self:
        rows = jnp.arange(self.seen.shape[0], dtype=jnp.int32)
        # Only ever sets: a row that did not move writes back what it holds.
        value = self.seen[rows, appended.tokens] | appended.active
        return dataclasses.replace(self, seen=self.seen.at[rows, appended.tokens].set(value))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CountPenalty:
    """Subtracts `frequency` for each earlier occurrence of a token in the output, and `presence` if there is any.

    The penalties of the OpenAI completions interface. The prompt does not count. Neutral: 0.
    """

    stage: ClassVar[int] = PENALTY
    frequency: Numbers = 0.0
    presence: Numbers = 0.0
    counts: Float[Array, "batch vocab"] | None = None

    def init(self, history: History, vocab_size: int) -> Self:
        places = jnp.arange(history.tokens.shape[1], dtype=jnp.int32)[None, :]
        output = (places >= history.prompt_lengths[:, None]) & (places < history.lengths[:, None])
        counts = _count(history, output, vocab_size)
        batch = counts.shape[0]
        return CountPenalty(_rows(self.frequency, batch), _rows(self.presence, batch), counts)

    def __call__(self, logits: Array, history: History) -> tuple[Self, Array]:
        present = (self.counts > 0).astype(jnp.float32)
        return self, logits - self.frequency[:, None] * self.counts - self.presence[:, None] * present

    def update(self, appended: Appended) -> Self:
        rows = jnp.arange(self.counts.shape[0], dtype=jnp.int32)
        counts = self.counts.at[rows, appended.tokens].add(appended.active.astype(jnp.float32))
        return dataclasses.replace(self, counts=counts)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bias(_Stateless):
    """Adds `bias` to the logits; `[vocab]` for all rows or `[batch, vocab]`."""

    stage: ClassVar[int] = MASK
    bias: Array

    def init(self, history: History, vocab_size: int) -> Self:
        return Bias(_vectors("bias", self.bias, history, vocab_size))

    def change(self, logits: Array) -> Array:
        return logits + self.bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forbid(_Stateless):
    """Removes the tokens that `mask` marks; `[vocab]` for all rows or `[batch, vocab]`. Some token must be left."""

    stage: ClassVar[int] = MASK
    mask: Array

    def init(self, history: History, vocab_size: int) -> Self:
        return Forbid(_vectors("mask", self.mask, history, vocab_size))

    def change(self, logits: Array) -> Array:
        return jnp.where(self.mask, -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK(_Stateless):
    """Keeps the `k` tokens with the highest logits, and those that tie with the last of them. Neutral: 0.

    `most` is static: no row's `k` is larger. A partial sort of so many is all it costs.
    """

    stage: ClassVar[int] = TRUNCATION
    k: Numbers
    most: int = dataclasses.field(metadata={"static": True})

    def change(self, logits: Array) -> Array:
        most = min(self.most, logits.shape[-1])
        top = jax.lax.top_k(logits, most)[0]
        k = self.k.astype(jnp.int32)[:, None]
        last = jnp.take_along_axis(top, jnp.clip(k, 1, most) - 1, axis=1)
        return jnp.where((k <= 0) | (k >= logits.shape[-1]) | (logits >= last), logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopP(_Stateless):
    """Keeps the most probable tokens until their sum reaches `p` (and what ties with the last). Neutral: 1.

    Nucleus sampling, Holtzman et al. 2020 (arXiv 1904.09751): a token stays if those above it sum to less than `p`; the
    first always does. `most` is static: after a top-k at most so many tokens (ties aside) are left to sort.
    """

    stage: ClassVar[int] = TRUNCATION
    p: Numbers
    most: int | None = dataclasses.field(default=None, metadata={"static": True})

    def change(self, logits: Array) -> Array:
        size = logits.shape[-1]
        top = jax.lax.top_k(logits, size if self.most is None else min(self.most, size))[0]
        probs = jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        above = jnp.cumsum(probs, axis=-1) - probs
        p = self.p[:, None]
        kept = jnp.maximum(jnp.sum(above < p, axis=-1, keepdims=True), 1)
        last = jnp.take_along_axis(top, kept - 1, axis=1)
        return jnp.where((p >= 1) | (logits >= last), logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MinP(_Stateless):
    """Keeps tokens at least `min_p` times as probable as the most probable one (arXiv 2407.01082). Neutral: 0."""

    stage: ClassVar[int] = TRUNCATION
    min_p: Numbers

    def change(self, logits: Array) -> Array:
        # log 0 is -inf, which keeps every token.
        threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(self.min_p[:, None])
        return jnp.where(logits >= threshold, logits, -jnp.inf)


def init_chain(processors: Sequence[Processor], history: History, vocab_size: int) -> tuple[Processor, ...]:
    """The chain for these rows. Raises `ConfigError` if its order is not that of the stages."""
    for before, after in zip(processors, processors[1:]):
        if before.stage > after.stage:
            raise ConfigError(
                f"processor {type(before).__name__} comes before {type(after).__name__}; the order is penalties, bias "
                "and masks, truncation"
            )
    return tuple(p.init(history, vocab_size) for p in processors)


def apply_chain(
    processors: Sequence[Processor],
    temperature: Float[Array, "batch"],
    logits: Float[Array, "batch vocab"],
    history: History,
) -> tuple[tuple[Processor, ...], Float[Array, "batch vocab"]]:
    """The chain after one step, and the logits to draw from: scaled by each row's temperature, cut by truncation."""
    done: list[Processor] = []
    scaled = False
    for processor in processors:
        if processor.stage > TEMPERATURE and not scaled:
            logits, scaled = scale(logits, temperature), True
        processor, logits = processor(logits, history)
        done.append(processor)
    return tuple(done), logits if scaled else scale(logits, temperature)


def scale(logits: Float[Array, "batch vocab"], temperature: Float[Array, "batch"]) -> Float[Array, "batch vocab"]:
    """Logits over temperature; rows with temperature 0 (greedy) stay as they are."""
    return logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]


def _count(history: History, where: Bool[Array, "batch capacity"], vocab_size: int) -> Float[Array, "batch vocab"]:
    batch = history.tokens.shape[0]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    return jnp.zeros((batch, vocab_size), jnp.float32).at[rows, history.tokens].add(where.astype(jnp.float32))


def _rows(number: Numbers, batch: int) -> Float[Array, "batch"]:
    return jnp.broadcast_to(jnp.asarray(number, jnp.float32), (batch,))


def _per_row(processor: Any, batch: int) -> Any:
    return jax.tree.map(lambda x: _rows(x, batch), processor)


def _vectors(name: str, x: Array, history: History, vocab_size: int) -> Float[Array, "batch vocab"]:
    batch = history.lengths.shape[0]
    x = jnp.asarray(x)
    if x.shape not in ((vocab_size,), (batch, vocab_size)):
        raise ConfigError(f"{name} has shape {x.shape}, expected ({vocab_size},) or ({batch}, {vocab_size})")
    return jnp.broadcast_to(x if x.ndim == 2 else x[None, :], (batch, vocab_size))
