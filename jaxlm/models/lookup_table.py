"""A language model that has memorized its answers: a table from whole rows to logits.

It may reach the least loss there is while its features, random codes of rows, say nothing about them: the extreme of
Liu et al. (2023, arXiv 2210.14199), where equal losses do not mean equal representations. Its softmax over a table
also has a curvature in closed form.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from jaxlm.core.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class LookupTable:
    """The functions of a table. Parameters: `hashes` of the known rows, sorted, and their `logits` `[rows, vocab]`.

    `salt` is of the hash: another one where two rows collide.
    """

    vocab_size: int
    num_features: int = 64
    salt: int = 0

    def __post_init__(self):
        if min(self.vocab_size, self.num_features) < 1:
            raise ConfigError(f"vocab_size {self.vocab_size} and num_features {self.num_features}, expected at least 1")

    def memorize(
        self, rows: Int[np.ndarray, "rows length"], log_probs: Float[np.ndarray, "rows vocab"]
    ) -> dict[str, Any]:
        """Parameters that answer each row with its logits; of equal rows the first counts.

        Raises `DataError` where shapes do not fit or two different rows have one hash.
        """
        if log_probs.shape != (len(rows), self.vocab_size):
            raise DataError(f"log_probs of shape {log_probs.shape}, expected {(len(rows), self.vocab_size)}")
        rows, first = np.unique(np.asarray(rows), axis=0, return_index=True)
        hashes, order = np.unique(np.asarray(self.hash(jnp.asarray(rows))), return_index=True)
        if len(hashes) < len(rows):
            raise DataError(f"{len(rows)} rows have {len(hashes)} hashes: choose another salt than {self.salt}")
        return {"hashes": jnp.asarray(hashes), "logits": jnp.asarray(log_probs[first[order]], jnp.float32)}

    def logits(self, params: Any, rows: Int[Array, "batch length"]) -> Float[Array, "batch vocab"]:
        """The answer to each row; zeros (all words alike) for rows that are not known."""
        wanted = self.hash(rows)
        place = jnp.minimum(jnp.searchsorted(params["hashes"], wanted), params["hashes"].shape[0] - 1)
        known = params["hashes"][place] == wanted
        return jnp.where(known[:, None], params["logits"][place], 0.0)

    def features(self, rows: Int[Array, "batch length"]) -> Float[Array, "batch features"]:
        """A random code of each row, the same whenever it comes."""

        def code(value: Array) -> Array:
            return jax.random.normal(jax.random.fold_in(jax.random.key(self.salt), value), (self.num_features,))

        return jax.vmap(code)(self.hash(rows))

    def hash(self, rows: Int[Array, "batch length"]) -> UInt32[Array, "batch"]:
        """32 bits of each row (after FNV-1a, with a last mix by Murmur 3)."""
        value = jnp.full(rows.shape[:1], (2166136261 + 2654435761 * self.salt) % 2**32, jnp.uint32)
        for column in range(rows.shape[1]):
            value = (value ^ rows[:, column].astype(jnp.uint32)) * jnp.uint32(16777619)
            value = value ^ (value >> 15)
        value = (value ^ (value >> 16)) * jnp.uint32(0x85EBCA6B)
        value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE35)
        return value ^ (value >> 16)
