"""The state of a training run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from jaxlm.core import sharding

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training. Frozen arrays are not in it: they are an argument of the step.

    `step`: steps taken. `trainable`: what is optimized (`None` where another tree holds the leaf). `extra`: what a
    method owns and changes. `key`: the run's random key, never changed; the step is folded in. `hparams`: numbers that
    a sweep varies.
    """

    step: Int[Array, ""]
    trainable: PyTree
    opt_state: PyTree
    extra: PyTree
    key: jax.Array
    hparams: Mapping[str, Array]


def init_state(
    trainable: PyTree,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    extra: PyTree = None,
    hparams: Mapping[str, Any] | None = None,
) -> TrainState:
    """The state before the first step."""
    hparams = {name: jnp.asarray(value, jnp.float32) for name, value in (hparams or {}).items()}
    return TrainState(jnp.zeros((), jnp.int32), trainable, tx.init(trainable), extra, key, hparams)


def state_shardings(mesh: Mesh, state: TrainState, trainable_shardings: PyTree) -> TrainState:
    """Shardings for a state (abstract or real): the optimizer's copies of parameters lie like the parameters.

    Everything else is replicated.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def whole(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda _: replicated, tree)

    return TrainState(
        step=replicated,
        trainable=trainable_shardings,
        opt_state=sharding.like_params(state.opt_state, state.trainable, trainable_shardings, mesh),
        extra=whole(state.extra),
        key=replicated,
        hparams=whole(state.hparams),
    )
