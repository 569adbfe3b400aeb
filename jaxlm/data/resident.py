"""Small data sets held on the device whole, sampled inside the compiled program: for studies of many short runs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.keys import fold
from jaxlm.data.packing import Batch, Piece, count_rows, fill_rows, pack_best_fit_decreasing, read_rows
from jaxlm.data.store import TokenStore


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResidentRows:
    """Arrays `[rows, ...]` by name, axis 0 alone being the rows."""

    arrays: dict[str, Array]

    @property
    def count(self) -> int:
        return next(iter(self.arrays.values())).shape[0]

    def take(self, rows: Int[Array, "batch"]) -> dict[str, Array]:
        """The batch of these rows."""
        return {name: x[rows] for name, x in self.arrays.items()}

    def sample(self, key: jax.Array, step: Int[Array, ""], batch_size: int) -> dict[str, Array]:
        """The batch at a step: every row once an epoch, in an order of the key and the epoch.

        Rows that do not fill a last batch wait for another epoch. Traceable in `key` and `step`.

        Raises `ConfigError` for a batch larger than the data.
        """
        if batch_size > self.count:
            raise ConfigError(f"a batch of {batch_size} rows of {self.count}")
        epoch, place = jnp.divmod(step, self.count // batch_size)
        order = jax.random.permutation(fold(key, "epoch", epoch), self.count)
        return self.take(jax.lax.dynamic_slice_in_dim(order, place * batch_size, batch_size))

    def spread(self, count: int) -> "ResidentRows":
        """`count` of these rows at equal distances. Raises `DataError` for more than there are."""
        if not 1 <= count <= self.count:
            raise DataError(f"{count} rows are wanted of {self.count}")
        return ResidentRows(self.take(np.arange(count) * self.count // count))

    def cut(self, *shares: float) -> tuple["ResidentRows", ...]:
        """Disjoint parts of these rows, interleaved, so that each is a fair sample: `validation.cut(0.5, 0.5)`."""
        if not all(share > 0 for share in shares) or sum(shares) > 1 + 1e-9:
            raise ConfigError(f"shares {shares}: expected positive numbers that add up to 1 at most")
        # The golden ratio's multiples spread every stretch of rows over all parts.
        place = (np.arange(self.count) * 0.6180339887498949) % 1.0
        edges = np.concatenate([[0.0], np.cumsum(shares)])
        parts = []
        for low, high in zip(edges, edges[1:]):
            rows = np.flatnonzero((place >= low) & (place < high))
            if not len(rows):
                raise DataError(f"{self.count} rows are too few to cut into shares {shares}")
            parts.append(ResidentRows(self.take(rows)))
        return tuple(parts)


Sample = Callable[[jax.Array, Int[Array, ""]], dict[str, Array]]
"""`(key, step) -> batch`, traceable: what `Population` takes."""


def mix_rows(parts: Sequence[ResidentRows], counts: Sequence[int]) -> Sample:
    """A sample whose every batch has `counts[i]` rows of `parts[i]`, each part in its own order and epochs.

    Raises `ConfigError` for unequal numbers of both, a negative count, or a batch without rows.
    """
    if len(parts) != len(counts) or min(counts, default=-1) < 0 or not sum(counts):
        raise ConfigError(f"counts are {tuple(counts)} for {len(parts)} parts, expected one >= 0 each, not all 0")

    def sample(key: jax.Array, step: Int[Array, ""]) -> dict[str, Array]:
        taken = [(i, rows, n) for i, (rows, n) in enumerate(zip(parts, counts, strict=True)) if n]
        batches = [rows.sample(fold(key, "part", i), step, n) for i, rows, n in taken]
        return {name: jnp.concatenate([b[name] for b in batches]) for name in batches[0]}

    return sample


def switch_samples(stages: Sequence[tuple[int, Sample]]) -> Sample:
    """The samples of several stages, each from its step on: `[(0, web), (9000, web_and_instructions)]`.

    Each still gets the step of the run. Batches have the same shapes in all stages.

    Raises `ConfigError` unless the first stage starts at 0 and each later than the one before.
    """
    starts = [start for start, _ in stages]
    if not starts or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:])):
        raise ConfigError(f"stages start at steps {starts}, expected 0 first and then later ones")

    def sample(key: jax.Array, step: Int[Array, ""]) -> dict[str, Array]:
        stage = jnp.sum(step >= jnp.asarray(starts)) - 1
        return jax.lax.switch(stage, [s for _, s in stages], key, step)

    return sample


def resident_rows(
    store: TokenStore,
    length: int,
    *,
    source: int | str = 0,
    max_rows: int | None = None,
    columns: Any = None,
    spread: bool = False,
) -> ResidentRows:
    """The first `max_rows` rows of `length` tokens of a store's source (its documents are in a random order).

    `columns`: the arrays to keep, by default all of a token batch. `spread`: not the first rows, but as many at equal
    distances: a small corpus that is a sample of all documents, where the first rows might be of one alone.

    Raises `DataError` for a source that does not exist.
    """
    index = store.source_index(source)
    count = int(count_rows(store, length)[index])
    taken = count if max_rows is None else min(count, max_rows)
    rows = np.arange(taken) * count // max(taken, 1) if spread else np.arange(taken)
    batch = read_rows(store, index, rows, length)
    return ResidentRows({name: jnp.asarray(x) for name, x in batch.items() if columns is None or name in columns})


def from_start(rows: ResidentRows, start_id: int) -> ResidentRows:
    """The rows that are a stretch of one document, as texts of their own that begin with `start_id`.

    Each predicts its `inputs` from the start token on: a model of such rows can write one without a prompt
    (`jaxlm.decoding.sample_rows`). The arrays are `inputs`, `targets` and `loss_weights`. Rows with padding or several
    documents are left out.

    Raises `DataError` if there is no other.
    """
    segments, tokens = np.asarray(rows.arrays["segment_ids"]), np.asarray(rows.arrays["inputs"])
    whole = (segments == 1).all(axis=1)
    if not whole.any():
        raise DataError(f"none of {rows.count} rows of {tokens.shape[1]} tokens lies in one document")
    tokens = tokens[whole]
    inputs = np.concatenate([np.full((len(tokens), 1), start_id, tokens.dtype), tokens[:, :-1]], axis=1)
    found = {"inputs": inputs, "targets": tokens, "loss_weights": np.ones(tokens.shape, np.float32)}
    return ResidentRows({name: jnp.asarray(x) for name, x in found.items()})


def resident_examples(examples: Sequence[Batch], length: int, *, pack: bool = False) -> ResidentRows:
    """Rows of `length` pairs of examples in memory: each in a row of its own, so that a batch of n rows has n samples,
    or with `pack` as many in a row as fit.

    Raises `DataError` for an example that is longer than a row, or none at all.
    """
    if not examples:
        raise DataError("no examples to make rows of")
    lengths = [len(example["inputs"]) for example in examples]
    if max(lengths) > length:
        i = lengths.index(max(lengths))
        raise DataError(f"example {i} has {lengths[i]} pairs, but rows hold {length}")
    whole = [[Piece(i, 0, n)] for i, n in enumerate(lengths)]
    rows = fill_rows(examples, pack_best_fit_decreasing(lengths, length) if pack else whole, length)
    return ResidentRows({name: jnp.asarray(x) for name, x in rows.items()})


def join_rows(parts: Sequence[ResidentRows]) -> ResidentRows:
    """The union of several sets of rows, in order. Raises `DataError` for none, or other arrays than the first has."""
    if not parts:
        raise DataError("no rows to join")
    shapes = [{name: (x.shape[1:], x.dtype) for name, x in part.arrays.items()} for part in parts]
    for i, found in enumerate(shapes):
        if found != shapes[0]:
            raise DataError(f"rows {i} have arrays {found}, and those they are joined to {shapes[0]}")
    return ResidentRows({name: jnp.concatenate([p.arrays[name] for p in parts]) for name in parts[0].arrays})
