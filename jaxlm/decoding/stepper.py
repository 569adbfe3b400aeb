"""How a model enters decoding: an object that feeds tokens and can go back, copy and reorder rows.

Everything that decodes (sampling, speculation, beams, particles) uses these operations alone, so an ensemble of models
is a stepper whose carry is a tuple of its members' carries.
"""

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import ConfigError
from jaxlm.layers import kv_cache
from jaxlm.layers.kv_cache import KVCache
from jaxlm.models import Decoder

Params = Any
Carry = Any


class Stepper(Protocol):
    """A static object: hashable, without arrays. Parameters are an argument and the carry is any pytree.

    Each row of a carry stands for a history of tokens, empty after `init`. What a row gives depends on its own history
    alone, not on the other rows.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_length(self) -> int | None:
        """The most tokens a row may have, `None` for no limit but the capacity."""
        ...

    @property
    def per_row(self) -> bool:
        """Whether rows have lengths of their own: padding takes no room, rows can be rolled back and replaced."""
        ...

    def init(self, params: Params, batch: int, capacity: int) -> Carry:
        """`batch` empty rows with room for `capacity` tokens each."""
        ...

    def step(
        self,
        params: Params,
        carry: Carry,
        tokens: Int[Array, "batch length"],
        counts: Int[Array, "batch"] | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[Array, Carry]:
        """Appends the first `counts` (default: all) of each row's tokens; what is right of them is padding.

        Returns float32 logits of the token after each of them, `[batch, length, vocab]`, or with `last_only` after the
        last real one of each row, `[batch, vocab]`. Logits of padding, and of rows with a count of 0, mean nothing.
        """
        ...

    def rollback(self, carry: Carry, lengths: Int[Array, "batch"]) -> Carry:
        """The rows with only the first `lengths` tokens of their histories."""
        ...

    def repeat(self, carry: Carry, n: int) -> Carry:
        """Each row `n` times: rows `i * n` to `i * n + n - 1` are row `i`."""
        ...

    def gather(self, carry: Carry, rows: Int[Array, "rows"]) -> Carry:
        """A carry whose row `i` is row `rows[i]` of this one."""
        ...

    def insert(self, carry: Carry, rows: Int[Array, "rows"], other: Carry) -> Carry:
        """The carry with its row `rows[i]` replaced by row `i` of `other`, for each `i`; rows out of range are dropped.

        `other` has the same capacity.
        """
        ...


@dataclasses.dataclass(frozen=True)
class DecoderStepper:
    """A `Decoder` with its key/value cache.

    With `shared` the rows write their cache at one common index: prompts are moved to the right end of the first call's
    tokens, and every later call appends all its tokens to every row. Such rows cannot be rolled back or replaced, and a
    row whose count is 0 in a later call is spoiled (the caller has finished with it). The default, an index per row,
    has none of these limits.
    """

    model: Decoder
    shared: bool = False

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    @property
    def max_length(self) -> int | None:
        """Learned positions end; rotary ones go on (with less and less quality beyond what was trained)."""
        return self.model.config.max_length if self.model.config.position == "learned" else None

    @property
    def per_row(self) -> bool:
        return not self.shared

    def init(self, params: Params, batch: int, capacity: int) -> KVCache:
        return self.model.init_cache(batch, capacity, shared=self.shared)

    def step(
        self,
        params: Params,
        carry: KVCache,
        tokens: Int[Array, "batch length"],
        counts: Int[Array, "batch"] | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[Float[Array, "batch length vocab"] | Float[Array, "batch vocab"], KVCache]:
        batch, length = tokens.shape
        counts = jnp.full((batch,), length, jnp.int32) if counts is None else counts
        if self.shared:
            return self._step_shared(params, carry, tokens, counts, last_only)
        positions = kv_cache.positions(carry, length)
        hidden, cache = self._hidden(params, carry, tokens, positions)
        cache = kv_cache.rollback(cache, carry.index + counts)
        if last_only:
            hidden = _pick(hidden, counts - 1)
        logits = self.model.head(params, hidden)
        return (logits[:, 0] if last_only else logits), cache

    def rollback(self, carry: KVCache, lengths: Int[Array, "batch"]) -> KVCache:
        if self.shared:
            raise ConfigError("a shared cache cannot be rolled back: use DecoderStepper(model), with an index per row")
        return kv_cache.rollback(carry, lengths)

    def repeat(self, carry: KVCache, n: int) -> KVCache:
        return kv_cache.repeat(carry, n)

    def gather(self, carry: KVCache, rows: Int[Array, "rows"]) -> KVCache:
        return kv_cache.gather(carry, rows)

    def insert(self, carry: KVCache, rows: Int[Array, "rows"], other: KVCache) -> KVCache:
        if self.shared:
            raise ConfigError("rows of a shared cache cannot be replaced: use DecoderStepper(model)")
        return kv_cache.insert(carry, rows, other)

    def _hidden(self, params: Params, cache: KVCache, tokens: Array, positions: Array) -> tuple[Array, KVCache]:
        hidden = self.model.embed(params, tokens, positions)
        output = self.model.trunk(params, hidden, positions=positions, cache=cache)
        return output.hidden, output.cache

    def _step_shared(self, params: Params, carry: KVCache, tokens: Array, counts: Array, last_only: bool):
        length = tokens.shape[1]
        places = jnp.arange(length, dtype=jnp.int32)[None, :]
        if carry.empty:
            padding = (length - counts)[:, None]
            tokens = jnp.take_along_axis(tokens, (places - padding) % length, axis=1)
            carry = dataclasses.replace(carry, start=padding[:, 0])
        hidden, cache = self._hidden(params, carry, tokens, kv_cache.positions(carry, length))
        if last_only:
            return self.model.head(params, hidden[:, -1:])[:, 0], cache
        if carry.empty:
            hidden = jnp.take_along_axis(hidden, ((places + padding) % length)[:, :, None], axis=1)
        return self.model.head(params, hidden), cache


def _pick(hidden: Float[Array, "batch length embed"], places: Int[Array, "batch"]) -> Float[Array, "batch 1 embed"]:
    return jnp.take_along_axis(hidden, jnp.maximum(places, 0)[:, None, None], axis=1)
