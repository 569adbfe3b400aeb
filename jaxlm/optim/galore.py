"""GaLore, Natural GaLore and Fira: Adam whose moments live in a low-rank subspace of each kernel's gradient.

The subspace is replaced every `period` steps (`jaxlm.optim.projection`); the moments stay as they are then, as in the
published code. Kernels are projected; embeddings, head and everything else get plain Adam at the same learning
rate. Call them as `tx.update(gradients, state, params, step=step)`.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.core.errors import ConfigError
from jaxlm.optim import limiters, roles, wiring
from jaxlm.optim.fisher import DampingMode, scale_by_empirical_fisher
from jaxlm.optim.learning_rate import LearningRate
from jaxlm.optim.projection import Bases, Projection, Side
from jaxlm.optim.wiring import DECAYED_ROLES


class GaloreState(NamedTuple):
    bases: Bases
    inner: Any


def scale_by_galore(
    projection: Projection, inner: optax.GradientTransformation, scale: float = 0.25
) -> optax.GradientTransformationExtraArgs:
    """`scale * back(inner(project(g)))` for kernels `(leading..., in, out)`; needs `step`.

    Args:
      projection: the subspaces and when they are replaced.
      inner: what happens inside them: any transformation, such as `optax.scale_by_adam()`; its state has the shapes
        of the projected gradients, in the dtype of the parameters.
      scale: factor of the result.

    Source: GaLore (Zhao et al., 2024, arXiv 2403.03507, algorithm 2).

    Raises:
      ConfigError: at `init`, the rank is larger than a matrix; at `update`, no `step`.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> GaloreState:
        bases = projection.init(params)
        return GaloreState(bases, inner.init(projection.zeros(params)))

    def update(updates: Any, state: GaloreState, params: Any = None, *, step: Any = None, **extra_args: Any):
        del params
        step = wiring.require_step("galore", step)
        bases = projection.refreshed(state.bases, updates, step)
        _, leaves, treedef = wiring.zip_leaves(updates, *bases)
        images = treedef.unflatten([projection.project(*leaf).astype(leaf[0].dtype) for leaf in leaves])
        directions, inner_state = inner.update(images, state.inner, None, step=step, **extra_args)
        out = [
            (scale * projection.back(direction, rows, columns)).astype(g.dtype)
            for direction, (g, rows, columns) in zip(treedef.flatten_up_to(directions), leaves, strict=True)
        ]
        return treedef.unflatten(out), GaloreState(bases, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def galore(
    learning_rate: LearningRate,
    *,
    axes: Any,
    rank: int,
    period: int = 200,
    scale: float = 0.25,
    side: Side = "smaller",
    refresh: str = "svd",
    matrix_roles: roles.Predicate | Collection[str] = ("matrix",),
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    decay: roles.Predicate | Collection[str] = DECAYED_ROLES,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam on gradients projected to `rank` leading singular directions of the smaller side.

    Source: GaLore (Zhao et al., 2024, arXiv 2403.03507), in Optax's form of Adam (epsilon beside the corrected
    root; the released code has it beside the uncorrected one).

    Args:
      learning_rate: a number, a schedule of the step, or `FromHparams`. The paper's 0.01 is for embeddings and head
        too; kernels move at `scale` times it.
      axes: the tree of logical axis names of all parameters.
      rank: dimensions kept, at most the smaller side of every kernel. The paper: 128 (60M), 256, 256, 512 (1B).
      period: steps between two refreshes of the subspaces.
      scale: factor of the kernels' updates.
      side: which side of each kernel is projected: `smaller`, `larger` or `both`.
      refresh: `svd`, or `orthogonal` or `gaussian` for random subspaces.
      matrix_roles: which parameters are projected: roles, or a predicate on `(path, role)`.
      b1, b2, eps: Adam's moments and epsilon, inside and outside the subspaces.
      weight_decay: strength of the decoupled decay, times the learning rate.
      decay: which parameters decay: roles, or a predicate on `(path, role)`.
      clip_norm: scale gradients down to this global norm, before they are projected; None leaves them.

    Raises:
      ConfigError: a value out of its range, a leaf without a role, an unknown role, no kernel to project; at
        `init`, a rank larger than a kernel.
    """
    projection = Projection(rank, period, side, refresh)
    matrix = scale_by_galore(projection, wiring.adam(b1, b2, eps), scale)
    return wiring.optimizer(
        learning_rate,
        wiring.matrix_or_adam("galore", matrix, matrix_roles, wiring.adam(b1, b2, eps), axes),
        axes=axes,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
    )


def natural_galore(
    learning_rate: LearningRate,
    *,
    axes: Any,
    rank: int,
    period: int = 200,
    scale: float = 0.25,
    side: Side = "smaller",
    refresh: str = "svd",
    history: int = 20,
    damping: float = 1e-3,
    damping_mode: DampingMode = "absolute",
    matrix_roles: roles.Predicate | Collection[str] = ("matrix",),
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    decay: roles.Predicate | Collection[str] = DECAYED_ROLES,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural GaLore: projected gradients are divided by an empirical Fisher matrix before Adam sees them.

    The matrix is that of the last `history` projected gradients (`scale_by_empirical_fisher`); a history starts anew
    when its subspace is replaced (the released code keeps vectors of the old subspace). It takes `history` times the
    memory of one projected gradient, many times GaLore's moments.

    With the paper's absolute damping the gain depends on the scale of the loss: where `||g||^2` is far above
    `damping`, magnitudes are inverted; far below, it is GaLore. `damping_mode="relative"` with `damping=1` is the
    alternative that does not depend on it.

    Source: Natural GaLore (Das, 2024, arXiv 2410.16029).

    Args:
      history: gradients in the Fisher matrix, the current one included.
      damping: what is added to its diagonal, or, relative, the multiple of the mean `||g||^2` that is added.
      damping_mode: `absolute` or `relative`.
      The other arguments are those of `galore`.

    Raises:
      ConfigError: as `galore`.
    """
    projection = Projection(rank, period, side, refresh)
    inner = optax.chain(
        scale_by_empirical_fisher(history, damping, damping_mode, period=period), wiring.adam(b1, b2, eps)
    )
    return wiring.optimizer(
        learning_rate,
        wiring.matrix_or_adam(
            "natural_galore",
            scale_by_galore(projection, inner, scale),
            matrix_roles,
            wiring.adam(b1, b2, eps),
            axes,
        ),
        axes=axes,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
    )


class FiraState(NamedTuple):
    count: jax.Array
    bases: Bases
    mu: Any
    nu: Any
    norms: Any


def scale_by_fira(
    projection: Projection,
    scale: float = 0.25,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    gamma: float = 1.01,
    released_residual: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """GaLore's direction plus the part of the gradient outside the subspace; for kernels; needs `step`.

    With `R = project(g)` and `N` Adam's direction in the subspace, the residual `S = g - back(R)` is multiplied, for
    each index of the side that is not projected, by `||N_j|| / (||R_j|| + 1e-8)` (norms along the rank axis),
    limited in the growth of its norm, and added: `scale * back(N) + S`.

    Args:
      gamma: the most by which the residual's norm may grow in a step.
      released_residual: the residual of the released code, `g - scale * back(R)`, which keeps a part of the
        subspace.

    Source: Fira (Chen et al., 2024, arXiv 2410.01623, equations 6 to 9); as in the released code, norms are those
    before Adam's bias correction, which then multiplies the whole.
    """
    wiring.check_betas(b1, b2, eps)
    limiters.check_gamma(gamma)

    def init(params: Any) -> FiraState:
        bases = projection.init(params)
        mu, nu = projection.zeros(params), projection.zeros(params)
        return FiraState(jnp.zeros((), jnp.int32), bases, mu, nu, limiters.initial_norms(params))

    def update(updates: Any, state: FiraState, params: Any = None, *, step: Any = None, **extra_args: Any):
        del params, extra_args
        bases = projection.refreshed(state.bases, updates, wiring.require_step("fira", step))
        count = optax.safe_increment(state.count)

        def one(g, rows, columns, mu, nu, norm):
            r = projection.project(g, rows, columns)
            m, v, direction, correction = wiring.adam_direction(mu, nu, r, count, b1, b2, eps)
            seen = (scale if released_residual else 1.0) * projection.back(r, rows, columns)
            rank_axis = projection.sides(g.shape)[0]
            factor = wiring.norm(direction, rank_axis) / (wiring.norm(r, rank_axis) + 1e-8)
            residual, norm = limiters.limit((g.astype(jnp.float32) - seen) * factor, norm, gamma)
            out = correction * (scale * projection.back(direction, rows, columns) + residual)
            return out.astype(g.dtype), m.astype(mu.dtype), v.astype(nu.dtype), norm

        out, mu, nu, norms = wiring.map_leaves(one, updates, *bases, state.mu, state.nu, state.norms)
        return out, FiraState(count, bases, mu, nu, norms)

    return optax.GradientTransformationExtraArgs(init, update)


def fira(
    learning_rate: LearningRate,
    *,
    axes: Any,
    rank: int,
    period: int = 200,
    scale: float = 0.25,
    side: Side = "smaller",
    refresh: str = "svd",
    gamma: float = 1.01,
    released_residual: bool = False,
    matrix_roles: roles.Predicate | Collection[str] = ("matrix",),
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    decay: roles.Predicate | Collection[str] = DECAYED_ROLES,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira: GaLore plus the scaled and limited rest of the gradient, so that updates have full rank.

    Source: Fira (Chen et al., 2024, arXiv 2410.01623), whose `scale` is 0.25 (60M) to 0.0625 (1B, 7B).

    Args:
      gamma, released_residual: as in `scale_by_fira`.
      The other arguments are those of `galore`; `side` is `smaller` or `larger`.

    Raises:
      ConfigError: as `galore`.
    """
    if side == "both":
        raise ConfigError("fira: side is 'both', expected 'smaller' or 'larger': it scales along the other one")
    matrix = scale_by_fira(
        Projection(rank, period, side, refresh),
        scale,
        b1=b1,
        b2=b2,
        eps=eps,
        gamma=gamma,
        released_residual=released_residual,
    )
    return wiring.optimizer(
        learning_rate,
        wiring.matrix_or_adam("fira", matrix, matrix_roles, wiring.adam(b1, b2, eps), axes),
        axes=axes,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
    )
