"""The state machine behind all sampling: prefill, advance, and what a host may do between steps.

    generator = Generator(DecoderStepper(model))
    state = generator.prefill(params, prompts, lengths, capacity=96, max_new=64, keys=keys, stop_ids=(eos,))
    state = generator.advance(params, state, 64)        # one compiled loop; stops early when every row is done

A host that decides itself drives it a token at a time: it reads `log_probs(state)`, the distribution of each row's
next token, forces tokens with `force`, calls `advance(params, state, 1)`, and may copy, reorder and roll back rows.
Both ways run the same step. `advance`, `force`, `stop`, `insert` and `rollback` consume the state they are given (its
memory is reused).

Rows are independent: each has its own length, limit, key (folded with its number of new tokens), stop ids, temperature,
processors and queue of forced tokens, so a row gives the same tokens whatever else is in the batch.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlm.core.errors import ConfigError
from jaxlm.core.sharding import constrain
from jaxlm.decoding.processors import Appended, History, Numbers, Processor, apply_chain, init_chain, scale
from jaxlm.decoding.stepper import Carry, Params, Stepper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GenerationState:
    """Everything between two steps; axis 0 of every array outside `carry` is the batch.

    `tokens`: prompt and new tokens, the first `lengths` of each row; `logprobs`: of the new ones, under the model's
    logits over temperature, nothing truncated; `processed_logprobs`: under what they were drawn from (or `None`).
    `logits`: the model's, of the token to come. `limits`: the length at which a row ends. `stopped`: ended by a stop id
    or the host. `stop_ids`: -1 for none. `queue`: forced tokens; those from `queue_from` to `queue_to` are to come.
    """

    carry: Carry
    logits: Float[Array, "batch vocab"]
    tokens: Int[Array, "batch capacity"]
    logprobs: Float[Array, "batch capacity"]
    processed_logprobs: Float[Array, "batch capacity"] | None
    prompt_lengths: Int[Array, "batch"]
    lengths: Int[Array, "batch"]
    limits: Int[Array, "batch"]
    stopped: Bool[Array, "batch"]
    stop_ids: Int[Array, "batch stops"]
    keys: Key[Array, "batch"]
    temperature: Float[Array, "batch"]
    processors: tuple[Processor, ...]
    queue: Int[Array, "batch queue"]
    queue_from: Int[Array, "batch"]
    queue_to: Int[Array, "batch"]

    @property
    def done(self) -> Bool[Array, "batch"]:
        """Rows that generate no more; rows of padding are done from the start."""
        return self.stopped | (self.lengths >= self.limits)

    @property
    def num_new(self) -> Int[Array, "batch"]:
        return self.lengths - self.prompt_lengths

    @property
    def history(self) -> History:
        return History(self.tokens, self.lengths, self.prompt_lengths)


@dataclasses.dataclass(frozen=True)
class Generator:
    """The operations on a `GenerationState` for one kind of model; static and hashable, like its stepper."""

    stepper: Stepper
    processed_logprobs: bool = False
    """Also keep log-probabilities under the distribution that tokens were drawn from."""

    def prefill(
        self,
        params: Params,
        prompts: Int[Array, "batch length"],
        lengths: Int[Array, "batch"],
        *,
        capacity: int,
        max_new: int | Int[Array, "batch"],
        keys: Key[Array, "batch"],
        temperature: Numbers = 1.0,
        stop_ids: Sequence[int] | Int[Array, "batch stops"] = (),
        processors: Sequence[Processor] = (),
    ) -> GenerationState:
        """Runs the prompts, padded on the right, and returns the state in which each row's first token is to come.

        A row with length 0 is padding of the batch. `capacity` bounds prompt and new tokens together; a row that
        reaches it ends. Temperature 0 is greedy. Compiles once for each shape of `prompts`, capacity and structure of
        `processors`.

        Raises `ConfigError` when a prompt does not fit with at least one new token.
        """
        prompts = np.asarray(prompts, np.int32)
        lengths = np.asarray(lengths, np.int32)
        batch, length = prompts.shape
        room = capacity if self.stepper.per_row else capacity - (length - lengths)
        if self.stepper.max_length is not None:
            room = np.minimum(room, self.stepper.max_length)
        room = np.broadcast_to(np.asarray(room, np.int32), (batch,))
        if length > capacity:
            raise ConfigError(f"prompts of {length} tokens (with padding) in a cache with a capacity of {capacity}")
        if np.min(temperature) < 0:
            raise ConfigError(f"temperature is {np.min(temperature)}, expected >= 0")
        for row in np.flatnonzero((lengths >= room) & (lengths > 0)):
            raise ConfigError(
                f"prompt {row} has {lengths[row]} tokens and there is room for {room[row]}: "
                "at least one must be left for a new token"
            )
        limits = np.where(lengths > 0, np.minimum(lengths + np.asarray(max_new, np.int32), room), 0)
        stops = stop_ids if getattr(stop_ids, "ndim", 1) == 2 else np.tile(_pad_stops(stop_ids), (batch, 1))
        chain = tuple(processors)
        return _prefill(self, params, prompts, lengths, limits, keys, temperature, stops, chain, capacity=capacity)

    def advance(self, params: Params, state: GenerationState, steps: int = 1) -> GenerationState:
        """Appends up to `steps` tokens to each row that is not done, in one compiled loop.

        Forced tokens come first, then drawn ones. A stop id is kept and ends its row, forced or drawn. The number of
        steps may change from call to call without compiling again.
        """
        return _advance(self, params, state, jnp.asarray(steps, jnp.int32))

    def log_probs(self, state: GenerationState, processed: bool = False) -> Float[Array, "batch vocab"]:
        """Log-probabilities of each row's next token: the model's, over temperature, or those it is drawn from."""
        return _log_probs(state, processed=processed)

    def force(
        self, state: GenerationState, tokens: Int[Array, "batch queue"], counts: Int[Array, "batch"]
    ) -> GenerationState:
        """Makes the first `counts` of each row's `tokens` its next tokens, in place of any that were still queued."""
        tokens, counts = np.asarray(tokens, np.int32), np.asarray(counts, np.int32)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.stepper.vocab_size:
            raise ConfigError(
                f"forced tokens from {tokens.min()} to {tokens.max()}; the vocabulary has {self.stepper.vocab_size}"
            )
        return dataclasses.replace(
            state,
            queue=jnp.asarray(tokens),
            queue_from=jnp.zeros(counts.shape, jnp.int32),
            queue_to=jnp.asarray(np.minimum(counts, tokens.shape[1])),
        )

    def stop(self, state: GenerationState, rows: Bool[Array, "batch"]) -> GenerationState:
        """Ends the rows where `rows` is true."""
        return dataclasses.replace(state, stopped=state.stopped | jnp.asarray(rows))

    def repeat(self, state: GenerationState, n: int, first: int = 0) -> GenerationState:
        """Samples `first` to `first + n - 1` of each row: rows `i * n` to `i * n + n - 1` continue row `i`.

        Each gets its own key, row `i`'s folded with the number of the sample.
        """
        return _repeat(self, state, jnp.asarray(first, jnp.int32), n=n)

    def gather(self, state: GenerationState, rows: Int[Array, "rows"]) -> GenerationState:
        """A state whose row `i` is a copy of row `rows[i]`, key included."""
        return _gather(self, state, jnp.asarray(rows, jnp.int32))

    def insert(self, state: GenerationState, rows: Int[Array, "rows"], other: GenerationState) -> GenerationState:
        """Replaces row `rows[i]` by row `i` of `other`, for each `i`; rows beyond the batch are dropped.

        Both states have the same capacity, processors and widths of stop ids and queue. `state` is consumed.
        """
        return _insert(self, state, jnp.asarray(rows, jnp.int32), other)

    def rollback(self, params: Params, state: GenerationState, lengths: Int[Array, "batch"]) -> GenerationState:
        """Takes back new tokens so that row `i` has at most `lengths[i]`, as if it had never gone further.

        Prompts stay whole. Costs one step: the logits of the next token are computed again. Rows that had stopped and
        lose tokens go on; queues are emptied.
        """
        return _rollback(self, params, state, jnp.asarray(lengths, jnp.int32))


def _pad_stops(stop_ids: Sequence[int]) -> Int[np.ndarray, "stops"]:
    """Ids filled up with -1 to a multiple of four, so that one or two more do not compile again."""
    ids = np.asarray(stop_ids, np.int32).reshape(-1)
    return np.pad(ids, (0, -len(ids) % 4 if len(ids) else 4), constant_values=-1)


@functools.partial(jax.jit, static_argnames=("generator", "capacity"))
def _prefill(generator, params, prompts, lengths, limits, keys, temperature, stop_ids, processors, *, capacity):
    stepper = generator.stepper
    batch, length = prompts.shape
    prompts = constrain(jnp.asarray(prompts), "batch", None)
    logits, carry = stepper.step(params, stepper.init(params, batch, capacity), prompts, lengths, last_only=True)
    tokens = constrain(jnp.pad(prompts, ((0, 0), (0, capacity - length))), "batch", None)
    zeros = jnp.zeros((batch, capacity), jnp.float32)
    history = History(tokens, lengths, lengths)
    return GenerationState(
        carry=carry,
        logits=logits,
        tokens=tokens,
        logprobs=zeros,
        processed_logprobs=zeros if generator.processed_logprobs else None,
        prompt_lengths=lengths,
        lengths=lengths,
        limits=limits,
        stopped=jnp.zeros((batch,), jnp.bool_),
        stop_ids=jnp.asarray(stop_ids, jnp.int32),
        keys=keys,
        temperature=jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (batch,)),
        processors=init_chain(processors, history, stepper.vocab_size),
        queue=jnp.zeros((batch, 0), jnp.int32),
        queue_from=jnp.zeros((batch,), jnp.int32),
        queue_to=jnp.zeros((batch,), jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("generator",), donate_argnames=("state",))
def _advance(generator: Generator, params: Params, state: GenerationState, steps: Int[Array, ""]) -> GenerationState:
    def unfinished(loop):
        step, state = loop
        return (step < steps) & ~jnp.all(state.done)

    def body(loop):
        step, state = loop
        return step + 1, _step(generator, params, state)

    return jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state))[1]


def _step(generator: Generator, params: Params, state: GenerationState) -> GenerationState:
    active = ~state.done
    processors, logits = apply_chain(state.processors, state.temperature, state.logits, state.history)
    token = _draw(logits, state)
    forced = state.queue_from < state.queue_to
    if state.queue.shape[1]:
        place = jnp.minimum(state.queue_from, state.queue.shape[1] - 1)
        token = jnp.where(forced, jnp.take_along_axis(state.queue, place[:, None], axis=1)[:, 0], token)
    token = jnp.where(active, token, 0)

    logprob = _log_prob(scale(state.logits, state.temperature), token)
    appended = Appended(token, logprob, active)
    rows = jnp.arange(token.shape[0], dtype=jnp.int32)

    def append(buffer: Array, value: Array) -> Array:
        # A row that is done writes beyond its end, where nobody reads.
        return buffer.at[rows, state.lengths].set(value, mode="drop", unique_indices=True)

    processed = state.processed_logprobs
    # The model reads the new token at once, so that what comes next is known between steps.
    feed = constrain(token[:, None], "batch", None)
    new_logits, carry = generator.stepper.step(params, state.carry, feed, active.astype(jnp.int32), last_only=True)
    return dataclasses.replace(
        state,
        carry=carry,
        logits=jnp.where(active[:, None], new_logits, state.logits),
        tokens=append(state.tokens, token),
        logprobs=append(state.logprobs, logprob),
        processed_logprobs=None if processed is None else append(processed, _log_prob(logits, token)),
        lengths=state.lengths + active,
        stopped=state.stopped | (active & jnp.any(token[:, None] == state.stop_ids, axis=1)),
        processors=tuple(p.update(appended) for p in processors),
        queue_from=state.queue_from + (forced & active),
    )


def _draw(logits: Float[Array, "batch vocab"], state: GenerationState) -> Int[Array, "batch"]:
    """One token a row by the Gumbel-max trick, which needs no sum over a sharded vocabulary."""

    def gumbel(key: Array, count: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, count), logits.shape[1:], jnp.float32)

    def sample(logits: Array) -> Array:
        noise = jax.vmap(gumbel)(state.keys, state.num_new)
        return _argmax(jnp.where(state.temperature[:, None] > 0, logits + noise, logits))

    return jax.lax.cond(jnp.any(state.temperature > 0), sample, _argmax, logits)


def _argmax(logits: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _log_prob(logits: Float[Array, "batch vocab"], token: Int[Array, "batch"]) -> Float[Array, "batch"]:
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("processed",))
def _log_probs(state: GenerationState, *, processed: bool) -> Array:
    if processed:
        logits = apply_chain(state.processors, state.temperature, state.logits, state.history)[1]
    else:
        logits = scale(state.logits, state.temperature)
    return jax.nn.log_softmax(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("generator", "n"))
def _repeat(generator: Generator, state: GenerationState, first: Int[Array, ""], *, n: int) -> GenerationState:
    carry = generator.stepper.repeat(state.carry, n)
    rest = jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), dataclasses.replace(state, carry=None))
    samples = jnp.tile(first + jnp.arange(n, dtype=jnp.int32), state.lengths.shape[0])
    return dataclasses.replace(rest, carry=carry, keys=jax.vmap(jax.random.fold_in)(rest.keys, samples))


@functools.partial(jax.jit, static_argnames=("generator",))
def _gather(generator: Generator, state: GenerationState, rows: Int[Array, "rows"]) -> GenerationState:
    carry = generator.stepper.gather(state.carry, rows)
    rest = jax.tree.map(lambda x: x[rows], dataclasses.replace(state, carry=None))
    return dataclasses.replace(rest, carry=carry)


@functools.partial(jax.jit, static_argnames=("generator",), donate_argnames=("state",))
def _insert(generator: Generator, state: GenerationState, rows: Array, other: GenerationState) -> GenerationState:
    carry = generator.stepper.insert(state.carry, rows, other.carry)
    here, there = dataclasses.replace(state, carry=None), dataclasses.replace(other, carry=None)
    rest = jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), here, there)
    return dataclasses.replace(rest, carry=carry)


@functools.partial(jax.jit, static_argnames=("generator",), donate_argnames=("state",))
def _rollback(generator: Generator, params: Params, state: GenerationState, lengths: Array) -> GenerationState:
    lengths = jnp.clip(lengths, state.prompt_lengths, state.lengths)
    last = jnp.maximum(lengths - 1, 0)
    carry = generator.stepper.rollback(state.carry, last)
    token = jnp.take_along_axis(state.tokens, last[:, None], axis=1)
    real = (lengths > 0).astype(jnp.int32)
    logits, carry = generator.stepper.step(params, carry, token, real, last_only=True)
    history = History(state.tokens, lengths, state.prompt_lengths)
    return dataclasses.replace(
        state,
        carry=carry,
        logits=logits,
        lengths=lengths,
        stopped=state.stopped & (lengths == state.lengths),
        processors=init_chain(state.processors, history, generator.stepper.vocab_size),
        queue_to=state.queue_from,
    )
