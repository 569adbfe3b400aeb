"""Log-likelihoods of tokens under a model, for host sequences of any length, in few compiled programs.

    scores = score_tokens(model, params, [ids, other_ids], counts=[3, 1])
    scores[0].log_likelihoods        # of the last three tokens of `ids`

Sequences are sorted by length and cut into groups of fixed size; a group's arrays have a power of two as length, so
that a data set of short items compiles a program for each of a few shapes. Logits are computed only where a token is
scored, in chunks, and stay on the device.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.sharding import constrain
from jaxlm.objectives.causal_lm import cut_chunks, default_chunk, join_chunks
from jaxlm.scoring.windows import rolling_windows

_SHORTEST = 64
_NARROW = 16
# Tokens that go in at once: the memory of long rows does not grow with `batch_size`.
_MOST_TOKENS = 1 << 14

Progress = Callable[[int, int], None]
"""Called with the number of sequences done and the number of all."""


class TokenScores(NamedTuple):
    """`log_likelihoods` (natural) of scored tokens, and whether each was the model's first choice."""

    log_likelihoods: Float[np.ndarray, "count"]
    greedy: Bool[np.ndarray, "count"]

    @property
    def total(self) -> float:
        """The log-likelihood of all of them together."""
        return float(np.sum(self.log_likelihoods, dtype=np.float64))

    @property
    def all_greedy(self) -> bool:
        return bool(self.greedy.all())


def score_tokens(
    model: Any,
    params: Any,
    sequences: Sequence[Sequence[int]],
    *,
    counts: Sequence[int] | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[TokenScores]:
    """Scores the last `counts[i]` tokens of each sequence given what precedes them; by default all but the first.

    `model` is a `Decoder` (anything hashable with `embed`, `trunk`, `head`, `head_params`, `gather_head` and `config`).
    At most `max_length` tokens (by default the model's) go in at once: what is too far left is cut off. Results are in
    the order of `sequences`, and do not depend on what else is scored, nor on `batch_size` beyond rounding. Sequences
    that differ only in their last token, the one to be scored, share a row. Of rows so long that `batch_size` of them
    have more than 16,384 tokens, fewer go in at once. Under `use_mesh` rows are divided among devices, and their
    number is rounded up to a multiple of the devices'.

    Raises:
      ConfigError: a `max_length` or `batch_size` below 1, or a `max_length` beyond learned positions.
      DataError: by index, a sequence with an id outside of the vocabulary, or with a count that leaves nothing to
        predict from or does not fit into `max_length` (use `score_rolling` for longer texts).
    """
    max_length = _check_sizes(model, max_length, batch_size)
    counts = [len(s) - 1 for s in sequences] if counts is None else counts
    if len(counts) != len(sequences):
        raise ConfigError(f"{len(counts)} counts for {len(sequences)} sequences, expected one each")
    vocab_size = model.config.vocab_size
    for index, (tokens, count) in enumerate(zip(sequences, counts)):
        _check_sequence(index, tokens, count, vocab_size, max_length)

    parts = sharding.axis_size("data") * sharding.axis_size("fsdp")
    rows = _rows(sequences, counts, max_length)
    results: list[TokenScores | None] = [None] * len(sequences)
    done, waiting = 0, None

    def collect(group: list["_Row"], log_likelihoods: Array, greedy: Array) -> int:
        values, flags = np.asarray(log_likelihoods), np.asarray(greedy)
        finished = 0
        for row, item in enumerate(group):
            for member, begin, count in item.members:
                chosen = np.s_[row, begin : begin + count]
                results[member] = TokenScores(values[chosen].copy(), flags[chosen].copy())
                finished += 1
        return finished

    for group, shape in _groups(rows, batch_size, max_length, parts):
        part = (group, *_score(model, params, *_arrays(group, *shape)))
        if waiting is not None:  # read one group late: the device always has work
            done += collect(*waiting)
            if progress is not None:
                progress(done, len(sequences))
        waiting = part
    if waiting is not None:
        done += collect(*waiting)
        if progress is not None:
            progress(done, len(sequences))
    return results


def score_rolling(
    model: Any,
    params: Any,
    texts: Sequence[Sequence[int]],
    *,
    prefix: int,
    max_length: int | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[TokenScores]:
    """Scores every token of each text once, in windows of `max_length` (see `rolling_windows`).

    The first token of a text is predicted from the id `prefix`. An empty text has empty scores. Arguments, errors and
    order are those of `score_tokens`; indices in errors, and the progress, count windows.
    """
    max_length = _check_sizes(model, max_length, batch_size)
    windows = [rolling_windows(tokens, prefix, max_length) for tokens in texts]
    flat = [window for group in windows for window in group]
    scores = iter(
        score_tokens(
            model,
            params,
            [window.tokens for window in flat],
            counts=[window.count for window in flat],
            max_length=max_length,
            batch_size=batch_size,
            progress=progress,
        )
    )
    results = []
    for group in windows:
        parts = [next(scores) for _ in group]
        values = [p.log_likelihoods for p in parts] or [np.zeros(0, np.float32)]
        flags = [p.greedy for p in parts] or [np.zeros(0, np.bool_)]
        results.append(TokenScores(np.concatenate(values), np.concatenate(flags)))
    return results


class _Row(NamedTuple):
    """Inputs of one row; where its scored tokens are predicted, and which they are.

    `members`: `(sequence, begin, count)`: whose the scored tokens `begin` to `begin + count - 1` are.
    """

    inputs: tuple[int, ...]
    places: list[int]
    targets: list[int]
    members: list[tuple[int, int, int]]

    @property
    def is_narrow(self) -> bool:
        return len(self.places) <= _NARROW


def _check_sizes(model: Any, max_length: int | None, batch_size: int) -> int:
    known = model.config.max_length
    max_length = known if max_length is None else max_length
    for name, value in (("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")
    if model.config.position == "learned" and max_length > known:
        raise ConfigError(f"max_length is {max_length}; the model has {known} learned positions")
    return max_length


def _check_sequence(index: int, tokens: Sequence[int], count: int, vocab_size: int, max_length: int) -> None:
    if not 1 <= count < len(tokens):
        raise DataError(
            f"sequence {index} has {len(tokens)} tokens and {count} to be scored, "
            "expected at least one of these, and one before them"
        )
    if count > max_length:
        raise DataError(f"sequence {index} has {count} tokens to be scored, more than the context of {max_length}")
    for token in (min(tokens), max(tokens)):
        if not 0 <= token < vocab_size:
            raise DataError(f"sequence {index} holds token {token}; the vocabulary has ids 0 to {vocab_size - 1}")


def _rows(sequences: Sequence[Sequence[int]], counts: Sequence[int], max_length: int) -> list[_Row]:
    rows, shared = [], {}
    for index, (tokens, count) in enumerate(zip(sequences, counts)):
        kept = tuple(int(t) for t in tokens[-(max_length + 1) :])
        inputs = kept[:-1]
        row = shared.get(inputs) if count == 1 else None
        if row is None or len(row.places) == _NARROW:
            row = _Row(inputs, [], [], [])
            rows.append(row)
            if count == 1:
                shared[inputs] = row
        row.members.append((index, len(row.places), count))
        row.places.extend(range(len(inputs) - count, len(inputs)))
        row.targets.extend(kept[-count:])
    return rows


def _groups(
    rows: list[_Row], batch_size: int, max_length: int, parts: int
) -> Iterator[tuple[list[_Row], tuple[int, int]]]:
    """Rows of like lengths with the shape of their inputs; the longest first, so that what does not fit into memory
    shows at once."""
    for narrow in (False, True):
        chosen = sorted((r for r in rows if r.is_narrow is narrow), key=lambda row: -len(row.inputs))
        start = 0
        while start < len(chosen):
            longest = len(chosen[start].inputs)
            length = min(max(_SHORTEST, 1 << (longest - 1).bit_length()), max_length)
            size = min(batch_size, max(_MOST_TOKENS // length, 1))
            size = -(-size // parts) * parts
            yield chosen[start : start + size], (size, length)
            start += size


def _arrays(group: list[_Row], batch_size: int, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, places and targets, padded on the right to the group's shape: the causal mask hides padding."""
    width = _NARROW if group[0].is_narrow else length
    inputs = np.zeros((batch_size, length), np.int32)
    places, targets = np.zeros((2, batch_size, width), np.int32)
    for i, row in enumerate(group):
        inputs[i, : len(row.inputs)] = row.inputs
        places[i, : len(row.places)] = row.places
        targets[i, : len(row.targets)] = row.targets
    return inputs, places, targets


@functools.partial(jax.jit, static_argnames=("model",))
def _score(
    model: Any,
    params: Any,
    inputs: Int[Array, "batch length"],
    places: Int[Array, "batch width"],
    targets: Int[Array, "batch width"],
) -> tuple[Float[Array, "batch width"], Bool[Array, "batch width"]]:
    inputs = constrain(inputs, "batch", None)
    hidden = model.trunk(params, model.embed(params, inputs)).hidden
    hidden = jnp.take_along_axis(hidden, places[:, :, None], axis=1)
    batch, width, _ = hidden.shape
    chunk_length = default_chunk(batch, width, model.config.vocab_size)
    pad = -width % chunk_length
    hidden, padded = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))), jnp.pad(targets, ((0, 0), (0, pad)))
    piece = functools.partial(_chunk_scores, model.head, model.gather_head(model.head_params(params)))
    found = jax.lax.map(
        lambda chunk: piece(*chunk), (cut_chunks(hidden, chunk_length), cut_chunks(padded, chunk_length))
    )
    # Every process reads the results of all rows.
    values, greedy = (constrain(join_chunks(x)[:, :width], None, None) for x in found)
    return values, greedy


def _chunk_scores(head: Callable, head_params: Any, hidden: Array, targets: Array) -> tuple[Array, Array]:
    logits = constrain(head(head_params, hidden), "batch", "length", "act_vocab")
    # Masked reductions, not gathers: they stay local when the vocabulary is sharded.
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    picked = jnp.sum(jnp.where(columns == targets[..., None], logits, 0.0), axis=-1)
    top = jnp.max(logits, axis=-1, keepdims=True)
    # As argmax: among equals the first.
    first = jnp.min(jnp.where(logits == top, columns, logits.shape[2]), axis=-1)
    return picked - jax.nn.logsumexp(logits, axis=-1), first == targets
