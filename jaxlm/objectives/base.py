"""The contract between a training step and what it minimizes.

An objective is split in two so that a loss over a whole batch stays exact however the batch is cut: `totals` gives the
sums that couple its pieces (each term's normalizer), `loss` one piece's additive share, divided by the totals of the
whole. The step adds totals over micro-batches first, then accumulates gradients with one buffer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from jaxtyping import Array, Bool, Float, Int

PyTree = Any
Batch = Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepContext:
    """What an objective gets beside parameters and data.

    `frozen`: arrays that are neither trained nor changed (base, teacher, reference). `extra`: what a method owns and
    changes. `key`: of this step and micro-batch. `hparams`: numbers that a sweep varies. `meters`: of an `Observer`.
    """

    frozen: PyTree = None
    extra: PyTree = None
    step: Int[Array, ""] | int = 0
    key: jax.Array | None = None
    hparams: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    meters: PyTree = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
    """What a loss returns beside its value.

    `metrics`: `name -> (sum, weight)`, added over pieces and divided once. `extra`: the new `extra`, or `None` if it
    did not change; micro-batches hand it on in order.
    """

    metrics: Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]] = dataclasses.field(default_factory=dict)
    extra: PyTree = None


class Objective(Protocol):
    """Anything with these two functions. It closes over models' functions, never over weights."""

    def totals(self, params: PyTree, batch: Batch, ctx: StepContext) -> PyTree:
        """Sums over a piece of a batch that the loss of the whole batch needs, each additive. No gradient flows."""

    def loss(self, params: PyTree, batch: Batch, ctx: StepContext, totals: PyTree) -> tuple[Float[Array, ""], Aux]:
        """This piece's share of the loss of the whole batch, of which `totals` are the sums."""


class Observer(Objective, Protocol):
    """An objective that learns something from every step, its backward pass included.

    A meter is an array of zeros whose gradient is a reading: an op with a derivative of its own returns there what it
    saw. Readings are not negative; over micro-batches the largest counts. They reach no optimizer.
    """

    def meters(self, extra: PyTree) -> PyTree:
        """Zeros, found again in `ctx.meters`; `None` for none."""

    def observe(self, extra: PyTree, measured: PyTree, finite: Bool[Array, ""]) -> PyTree:
        """The new `extra`, once a step, also of one that is skipped because loss or gradient are not `finite`."""
