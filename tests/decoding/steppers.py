"""Steppers for the tests: a model without weights whose logits are exact to the bit, and those of the library."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding import DecoderStepper, EnsembleStepper, StackedStepper, Stepper
from jaxlm.models import stack_members
from jaxlm.testing import tiny_decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HashCarry:
    hashes: jax.Array
    """[batch, capacity + 1]: the hash of each prefix of the row."""
    lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class HashStepper:
    """Logits are a fixed function of a hash of the whole history, so any slip in bookkeeping changes everything.

    `params` is the salt of the hash, an unsigned scalar.
    """

    vocab_size: int = 16
    max_length: int | None = None
    per_row: bool = True

    def init(self, params: Any, batch: int, capacity: int) -> HashCarry:
        start = jnp.broadcast_to(jnp.asarray(params, jnp.uint32), (batch, capacity + 1))
        return HashCarry(start, jnp.zeros((batch,), jnp.int32))

    def step(self, params, carry, tokens, counts=None, *, last_only=False):
        batch, length = tokens.shape
        counts = jnp.full((batch,), length, jnp.int32) if counts is None else counts
        rows, places = jnp.arange(batch), jnp.arange(length)

        def one(current, place):
            current = jnp.where(place < counts, mix(current, tokens[rows, place]), current)
            return current, current

        last, prefixes = jax.lax.scan(one, carry.hashes[rows, carry.lengths], places)
        real = places[:, None] < counts[None, :]
        slots = jnp.where(real, carry.lengths[None, :] + places[:, None] + 1, carry.hashes.shape[1])
        hashes = carry.hashes.at[jnp.broadcast_to(rows[None, :], slots.shape), slots].set(prefixes, mode="drop")
        logits = hash_logits(last if last_only else prefixes.T, self.vocab_size)
        return logits, HashCarry(hashes, carry.lengths + counts)

    def rollback(self, carry, lengths):
        return dataclasses.replace(carry, lengths=jnp.asarray(lengths, jnp.int32))

    def repeat(self, carry, n):
        return jax.tree.map(lambda x: jnp.repeat(x, n, axis=0), carry)

    def gather(self, carry, rows):
        return jax.tree.map(lambda x: x[rows], carry)

    def insert(self, carry, rows, other):
        return jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), carry, other)


def mix(current, token):
    return (current ^ (token.astype(jnp.uint32) + jnp.uint32(0x9E3779B9))) * jnp.uint32(2654435761) ^ (current >> 13)


def hash_logits(current, vocab_size):
    """[*batch, vocab] pseudo-random numbers between -4 and 4 (multiples of 1/128)."""
    tokens = jnp.arange(vocab_size, dtype=jnp.uint32)
    spread = mix(jnp.expand_dims(current, -1), jnp.expand_dims(tokens, tuple(range(current.ndim))))
    return ((spread >> 7) % 1024).astype(jnp.float32) / 128 - 4


def hash_logits_of(salt, vocab_size):
    """The same model as a function of a whole sequence, for `reference_generate`; in numpy."""

    def logits(tokens):
        current, out = np.uint32(salt), []
        with np.errstate(over="ignore"):
            for token in tokens:
                current = _mix(current, np.uint32(token))
                spread = _mix(np.broadcast_to(current, (vocab_size,)), np.arange(vocab_size, dtype=np.uint32))
                out.append(((spread >> np.uint32(7)) % np.uint32(1024)).astype(np.float32) / 128 - 4)
        return np.stack(out)

    def _mix(current, token):
        return (current ^ (token + np.uint32(0x9E3779B9))) * np.uint32(2654435761) ^ (current >> np.uint32(13))

    return logits


def stacked(family: str):
    model, one = tiny_decoder(family, num_layers=2)
    _, other = tiny_decoder(family, seed=1, num_layers=2)
    return StackedStepper(DecoderStepper(model)), stack_members([one, other])


def rows(stepper: Stepper, carry: Any) -> int:
    """How many rows a carry has."""
    return jax.tree.leaves(carry)[-1].shape[1 if isinstance(stepper, StackedStepper) else 0]


def decoder(family: str, shared: bool = False):
    model, params = tiny_decoder(family, num_layers=2)
    return DecoderStepper(model, shared), params


@functools.lru_cache
def make(name: str):
    """A registered stepper and its parameters."""
    return STEPPERS[name]()


STEPPERS = {
    "hash": lambda: (HashStepper(), jnp.uint32(7)),
    "ensemble": lambda: (EnsembleStepper((HashStepper(), HashStepper())), (jnp.uint32(7), jnp.uint32(8))),
    "stacked": lambda: (StackedStepper(HashStepper(), "probabilities"), jnp.array([7, 8], jnp.uint32)),
    "stacked-llama": lambda: stacked("llama"),
    "llama": lambda: decoder("llama"),
    "gemma3": lambda: decoder("gemma3"),  # windows and several rotations
    "gpt2": lambda: decoder("gpt2"),  # learned positions
    "gpt2-shared": lambda: decoder("gpt2", shared=True),
}
"""Every stepper here passes the contract of `test_stepper.py`; register another to have it tested."""
