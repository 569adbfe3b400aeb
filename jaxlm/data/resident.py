"""Small data sets held on the device whole, sampled inside the compiled program: for studies of many short runs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.keys import fold
from jaxlm.data.packing import count_rows, read_rows
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


def resident_rows(
    store: TokenStore, length: int, *, source: int | str = 0, max_rows: int | None = None, columns: Any = None
) -> ResidentRows:
    """The first `max_rows` rows of `length` tokens of a store's source (its documents are in a random order).

    `columns`: the arrays to keep, by default all of a token batch.

    Raises `DataError` for a source that does not exist.
    """
    index = store.source_index(source)
    count = int(count_rows(store, length)[index])
    rows = np.arange(count if max_rows is None else min(count, max_rows))
    batch = read_rows(store, index, rows, length)
    return ResidentRows({name: jnp.asarray(x) for name, x in batch.items() if columns is None or name in columns})
