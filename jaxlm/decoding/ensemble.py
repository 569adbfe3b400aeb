"""Sampling from ensembles: steppers made of steppers, whose logits are combined at every token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxlm.core.errors import ConfigError
from jaxlm.decoding.stepper import Carry, Params, Stepper
from jaxlm.models.ensemble import check_combine, ensemble_logits


@dataclasses.dataclass(frozen=True)
class EnsembleStepper:
    """Several models of any kind with one vocabulary. Parameters and carry are tuples, one a member.

    `combine`: `logits`, or `probabilities` (`jaxlm.models.ensemble_logits`).
    """

    members: tuple[Stepper, ...]
    combine: str = "logits"

    def __post_init__(self):
        check_combine(self.combine)
        sizes = [m.vocab_size for m in self.members]
        if len(set(sizes)) != 1:
            raise ConfigError(f"an ensemble of members with vocabularies of sizes {sizes}, expected one size")

    @property
    def vocab_size(self) -> int:
        return self.members[0].vocab_size

    @property
    def max_length(self) -> int | None:
        return min((m.max_length for m in self.members if m.max_length is not None), default=None)

    @property
    def per_row(self) -> bool:
        return all(m.per_row for m in self.members)

    def init(self, params: Params, batch: int, capacity: int) -> Carry:
        return tuple(m.init(p, batch, capacity) for m, p in zip(self.members, params, strict=True))

    def step(
        self,
        params: Params,
        carry: Carry,
        tokens: Int[Array, "batch length"],
        counts: Int[Array, "batch"] | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[Array, Carry]:
        found = [
            m.step(p, c, tokens, counts, last_only=last_only)
            for m, p, c in zip(self.members, params, carry, strict=True)
        ]
        logits = jnp.stack([logits for logits, _ in found])
        return ensemble_logits(logits, self.combine), tuple(c for _, c in found)

    def rollback(self, carry: Carry, lengths: Int[Array, "batch"]) -> Carry:
        return tuple(m.rollback(c, lengths) for m, c in zip(self.members, carry))

    def repeat(self, carry: Carry, n: int) -> Carry:
        return tuple(m.repeat(c, n) for m, c in zip(self.members, carry))

    def gather(self, carry: Carry, rows: Int[Array, "rows"]) -> Carry:
        return tuple(m.gather(c, rows) for m, c in zip(self.members, carry))

    def insert(self, carry: Carry, rows: Int[Array, "rows"], other: Carry) -> Carry:
        return tuple(m.insert(c, rows, o) for m, c, o in zip(self.members, carry, other))


@dataclasses.dataclass(frozen=True)
class StackedStepper:
    """Members of one shape, mapped: parameters (`jaxlm.models.stack_members`) and carry have a leading axis of them.

    `member` steps one of them. One program whatever their number, where `EnsembleStepper` has each member's.
    """

    member: Stepper
    combine: str = "logits"

    def __post_init__(self):
        check_combine(self.combine)

    @property
    def vocab_size(self) -> int:
        return self.member.vocab_size

    @property
    def max_length(self) -> int | None:
        return self.member.max_length

    @property
    def per_row(self) -> bool:
        return self.member.per_row

    def init(self, params: Params, batch: int, capacity: int) -> Carry:
        return jax.vmap(lambda p: self.member.init(p, batch, capacity))(params)

    def step(
        self,
        params: Params,
        carry: Carry,
        tokens: Int[Array, "batch length"],
        counts: Int[Array, "batch"] | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[Array, Carry]:
        def one(p: Any, c: Any) -> tuple[Array, Any]:
            return self.member.step(p, c, tokens, counts, last_only=last_only)

        logits, carry = jax.vmap(one)(params, carry)
        return ensemble_logits(logits, self.combine), carry

    def rollback(self, carry: Carry, lengths: Int[Array, "batch"]) -> Carry:
        return jax.vmap(lambda c: self.member.rollback(c, lengths))(carry)

    def repeat(self, carry: Carry, n: int) -> Carry:
        return jax.vmap(lambda c: self.member.repeat(c, n))(carry)

    def gather(self, carry: Carry, rows: Int[Array, "rows"]) -> Carry:
        return jax.vmap(lambda c: self.member.gather(c, rows))(carry)

    def insert(self, carry: Carry, rows: Int[Array, "rows"], other: Carry) -> Carry:
        return jax.vmap(lambda c, o: self.member.insert(c, rows, o))(carry, other)
