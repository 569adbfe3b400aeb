"""The inverse of an empirical Fisher matrix made of a few past gradients, applied without forming it."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.linalg import solve_positive
from jaxlm.optim import wiring

DampingMode = Literal["absolute", "relative"]
DAMPING_MODES = ("absolute", "relative")


class FisherState(NamedTuple):
    """The last gradients of every leaf `(leading..., a, b)` side by side along the shorter of its last two axes.

    Written in turn: the gradient of step `t` lies at place `t % history`.
    """

    history: Any


def scale_by_empirical_fisher(
    history: int = 20, damping: float = 1e-3, mode: DampingMode = "absolute", *, period: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """`(lam I + H H^T)^{-1} g` for each matrix; the columns of `H` are its last `history` gradients, `g` among them.

    As `g` is a column of `H`, this equals `H (lam I + H^T H)^{-1} e`, with `e` the unit vector of `g`'s place: one
    Cholesky solve of size `history` in float32, stable for any `lam`. (Woodbury's formula taken literally,
    `g/lam - H (I + H^T H/lam)^{-1} H^T g / lam^2`, subtracts nearly equal numbers and loses half of the digits.)

    Args:
      history: gradients that are kept, the current one included.
      damping: `lam`; or with mode `relative`, `lam = damping * mean of ||h||^2` over the history.
      mode: `absolute`, the paper's, or `relative`, which does not depend on the scale of the loss.
      period: gradients from before the last step that is a multiple of it are left out: those belong to another
        subspace. None keeps all.

    `update` needs `step`, and takes gradients to come step by step.

    Source: Natural GaLore (Das, 2024, arXiv 2410.16029, section 3.2).

    Raises:
      ConfigError: history or period below 1, damping <= 0, unknown mode.
    """
    wiring.check_count("history", history)
    wiring.check_positive("damping", damping)
    if period is not None:
        wiring.check_count("period", period)
    if mode not in DAMPING_MODES:
        raise ConfigError(f"damping_mode is '{mode}': {nearest(str(mode), DAMPING_MODES)}")

    def init(params: Any) -> FisherState:
        def zeros(p: Array) -> Array:
            shape = list(p.shape)
            shape[_stacked_axis(p)] *= history
            return jnp.zeros(shape, p.dtype)

        return FisherState(jax.tree.map(zeros, params))

    def update(updates: Any, state: FisherState, params: Any = None, *, step: Any = None, **extra_args: Any):
        del params, extra_args
        step = wiring.require_step("natural_galore", step)
        place = step % history
        written = step - (place - jnp.arange(history)) % history
        valid = written >= (0 if period is None else step - step % period)
        _, leaves, treedef = wiring.zip_leaves(updates, state.history)
        new = [
            jax.lax.dynamic_update_slice_in_dim(
                kept, g.astype(kept.dtype), place * g.shape[_stacked_axis(g)], g.ndim + _stacked_axis(g)
            )
            for g, kept in leaves
        ]
        out = [
            natural_gradient(_split(kept, g, history), valid, place, damping, mode).astype(g.dtype)
            for kept, (g, _) in zip(new, leaves, strict=True)
        ]
        return treedef.unflatten(out), FisherState(treedef.unflatten(new))

    return optax.GradientTransformationExtraArgs(init, update)


def natural_gradient(
    past: Float[Array, "*batch history a b"],
    valid: Any,
    place: Any,
    damping: Any,
    mode: DampingMode = "absolute",
) -> Float[Array, "*batch a b"]:
    """`(lam I + H H^T)^{-1} h` for the gradient `h` at index `place` of the axis of gradients. Float32.

    `valid` `[history]`: which gradients count; the one at `place` must.
    """
    past = past.astype(jnp.float32)
    size = past.shape[-3]
    gram = jnp.einsum("...sab,...tab->...st", past, past, precision=jax.lax.Precision.HIGHEST)
    ones = (1,) * (gram.ndim - 2)
    both = (valid[:, None] & valid[None, :]).reshape(*ones, size, size)
    gram = jnp.where(both, gram, 0.0)
    lam = jnp.asarray(damping, jnp.float32)
    if mode == "relative":
        lam = lam * jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / jnp.sum(valid)
    lam = jnp.maximum(lam, jnp.finfo(jnp.float32).tiny)
    unit = jnp.broadcast_to(jax.nn.one_hot(place, size, dtype=jnp.float32), gram.shape[:-1])
    weights = solve_positive(gram + lam * jnp.eye(size, dtype=jnp.float32).reshape(*ones, size, size), unit)
    return jnp.einsum("...s,...sab->...ab", weights, past, precision=jax.lax.Precision.HIGHEST)


def _stacked_axis(g: Array) -> int:
    # The shorter axis is the rank of a projected gradient, which is never sharded; the other keeps its sharding.
    return -2 if g.shape[-2] <= g.shape[-1] else -1


def _split(kept: Array, g: Array, history: int) -> Float[Array, "*batch history a b"]:
    *lead, a, b = g.shape
    if _stacked_axis(g) == -2:
        return kept.reshape(*lead, history, a, b)
    return jnp.moveaxis(kept.reshape(*lead, a, history, b), -2, -3)
