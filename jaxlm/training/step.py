"""One training step as a pure function, for any objective, optimizer and way of building parameters.

The step knows no model. `build` says how parameters come from what is trained and what is frozen; `gradients` how they
are differentiated (by default: accumulated over micro-batches, exactly); the optimizer is an Optax transformation.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.core.keys import fold
from jaxlm.objectives.base import Batch, Objective, StepContext
from jaxlm.training.state import TrainState

PyTree = Any
Build = Callable[[PyTree, PyTree, Array], PyTree]
Metrics = Mapping[str, tuple[Float[Array, ""], Float[Array, ""]]]
Step = Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]


class Gradients(NamedTuple):
    """What differentiating a batch gives: the loss, its gradient, summed metrics, the new `extra`, meters' readings."""

    loss: Float[Array, ""]
    grads: PyTree
    metrics: Metrics
    extra: PyTree
    measured: PyTree = None


def make_step(
    objective: Objective,
    tx: optax.GradientTransformation,
    *,
    build: Build = trees.merge,
    gradients: Callable[..., Gradients] | None = None,
    apply_updates: Callable[..., PyTree] = optax.apply_updates,
) -> Step:
    """The pure function `step(state, frozen, batch) -> (state, metrics)`.

    Metrics are `(sum, weight)` pairs: the objective's own, and `grad_norm`, `skipped` (1 if loss or gradient was not
    finite; then parameters, optimizer state and `extra` stay as they were, while the step still counts), and with an
    optimizer that is wrapped in `jaxlm.optim.skip_spikes`, `spike_skipped`. An objective with `observe` (see
    `jaxlm.objectives.base.Observer`) has the last word on `extra`.

    The optimizer is called as `tx.update(grads, opt_state, trainable, step=, key=, loss_fn=, hparams=)`; one that
    takes no such arguments works too. `gradients` defaults to `accumulate` without micro-batches.
    `apply_updates(trainable, updates)` gets a `key` if it has an argument of that name.
    """
    tx = optax.with_extra_args_support(tx)
    observe = getattr(objective, "observe", None)
    rounds_at_random = "key" in inspect.signature(apply_updates).parameters
    gradients = gradients or accumulate

    def step(state: TrainState, frozen: PyTree, batch: Batch) -> tuple[TrainState, Metrics]:
        result = gradients(objective, build, state, frozen, batch)
        norm = optax.global_norm(result.grads)
        updates, opt_state = tx.update(
            result.grads,
            state.opt_state,
            state.trainable,
            step=state.step,
            key=fold(state.key, "optimizer", state.step),
            loss_fn=lambda trainable: _whole_loss(objective, build, state, frozen, batch, trainable),
            hparams=state.hparams,
        )
        finite = jnp.isfinite(result.loss) & jnp.isfinite(norm)
        keep = functools.partial(jnp.where, finite)
        more = {"key": fold(state.key, "apply_updates", state.step)} if rounds_at_random else {}
        new = (apply_updates(state.trainable, updates, **more), opt_state, result.extra)
        old = (state.trainable, state.opt_state, state.extra)
        trainable, opt_state, extra = jax.tree.map(keep, new, old)
        if observe is not None:
            extra = observe(extra, result.measured, finite)
        one = jnp.ones((), jnp.float32)
        metrics = {**result.metrics, "grad_norm": (norm, one), "skipped": (1.0 - finite.astype(jnp.float32), one)}
        spike = optax.tree_utils.tree_get(opt_state, "spike_skipped")
        if spike is not None:
            metrics["spike_skipped"] = (jnp.where(finite, spike, 0.0), one)
        return TrainState(state.step + 1, trainable, opt_state, extra, state.key, state.hparams), metrics

    return step


def accumulate(
    objective: Objective, build: Build, state: TrainState, frozen: PyTree, batch: Batch, *, micro_batches: int = 1
) -> Gradients:
    """The exact gradient of a batch, cut into `micro_batches` along its axis 0 to save memory.

    The objective's totals are added over all pieces first, so terms with unequal normalizers come out exactly as
    without cutting, with one gradient buffer. Pieces are strided (rows `i, i + m, ...`): each holds rows of every
    device of a mesh. `extra` passes through the pieces in order; of what meters read the largest over pieces counts.
    """
    rows = {x.shape[0] for x in jax.tree.leaves(batch)}
    if len(rows) != 1 or rows.pop() % micro_batches:
        shapes = {name: x.shape for name, x in batch.items()}
        raise ConfigError(f"batch {shapes} cannot be cut into {micro_batches} equal micro-batches")

    meters = objective.meters(state.extra) if hasattr(objective, "meters") else None

    def context(index: Array | int, extra: PyTree) -> StepContext:
        key = fold(state.key, "objective", state.step, index)
        return StepContext(frozen, extra, state.step, key, state.hparams, meters)

    def loss(trained: tuple[PyTree, PyTree], piece: Batch, ctx: StepContext, totals: PyTree) -> tuple[Array, Any]:
        trainable, meters = trained
        ctx = dataclasses.replace(ctx, meters=meters)
        return objective.loss(build(trainable, frozen, state.step), piece, ctx, totals)

    differentiate = jax.value_and_grad(loss, has_aux=True)
    params = build(state.trainable, frozen, state.step)
    if micro_batches == 1:
        ctx = context(0, state.extra)
        totals = jax.lax.stop_gradient(objective.totals(params, batch, ctx))
        (value, aux), (grads, measured) = differentiate((state.trainable, meters), batch, ctx, totals)
        return Gradients(value, grads, aux.metrics, state.extra if aux.extra is None else aux.extra, measured)

    pieces = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), batch)
    indices = jnp.arange(micro_batches, dtype=jnp.int32)
    first = jax.tree.map(lambda x: x[0], pieces)

    def add_totals(sums: PyTree, x: tuple) -> tuple[PyTree, None]:
        index, piece = x
        return jax.tree.map(jnp.add, sums, objective.totals(params, piece, context(index, state.extra))), None

    shapes = jax.eval_shape(objective.totals, params, first, context(0, state.extra))
    totals = jax.lax.scan(add_totals, _zeros(shapes), (indices, pieces))[0]
    totals = jax.lax.stop_gradient(totals)

    def add_gradients(carry: tuple, x: tuple) -> tuple[tuple, None]:
        (value, grads, metrics), measured, extra = carry
        index, piece = x
        (more, aux), (more_grads, reading) = differentiate(
            (state.trainable, meters), piece, context(index, extra), totals
        )
        sums = jax.tree.map(jnp.add, (value, grads, metrics), (more, more_grads, dict(aux.metrics)))
        measured = jax.tree.map(jnp.maximum, measured, reading)
        return (sums, measured, extra if aux.extra is None else aux.extra), None

    (value_shape, aux_shape), (grad_shapes, _) = jax.eval_shape(
        differentiate, (state.trainable, meters), first, context(0, state.extra), totals
    )
    start = (_zeros((value_shape, grad_shapes, dict(aux_shape.metrics))), meters, state.extra)
    ((value, grads, metrics), measured, extra), _ = jax.lax.scan(add_gradients, start, (indices, pieces))
    return Gradients(value, grads, metrics, extra, measured)


def _whole_loss(objective: Objective, build: Build, state: TrainState, frozen: PyTree, batch: Batch, trainable: PyTree):
    meters = objective.meters(state.extra) if hasattr(objective, "meters") else None
    key = fold(state.key, "objective", state.step, 0)
    ctx = StepContext(frozen, state.extra, state.step, key, state.hparams, meters)
    params = build(trainable, frozen, state.step)
    return objective.loss(params, batch, ctx, jax.lax.stop_gradient(objective.totals(params, batch, ctx)))[0]


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
