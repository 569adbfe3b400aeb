"""APOLLO and APOLLO-Mini: SGD whose step sizes are learned by Adam in a random low-rank image of the gradient."""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.optim import limiters, roles, wiring
from jaxlm.optim.learning_rate import LearningRate
from jaxlm.optim.projection import Projection
from jaxlm.optim.wiring import DECAYED_ROLES

Scaling = Literal["channel", "tensor"]
SCALINGS = ("channel", "tensor")


class ApolloState(NamedTuple):
    count: jax.Array
    mu: Any
    nu: Any
    norms: Any


def scale_by_apollo(
    projection: Projection,
    scale: float = 1.0,
    *,
    scaling: Scaling = "channel",
    scale_front: bool = False,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    gamma: float = 1.01,
) -> optax.GradientTransformationExtraArgs:
    """The full gradient times `sqrt(scale) * ||N|| / (||R|| + 1e-8)`; for kernels; needs `step`.

    `R = project(g)` by a random matrix and `N` Adam's direction for it. Norms are along the rank axis, one factor
    for each index of the side that is not projected (`channel`), or one for each matrix (`tensor`). The norm of
    the result may grow by `gamma` a step; `scale_front` applies `sqrt(scale)` before that limit.

    The random matrices are made anew in every step from the seed and the number of the period, and not kept.

    Source: APOLLO (Zhu et al., 2024, arXiv 2412.05270, algorithm 1); as in the released code, norms are those before
    Adam's bias correction, which then multiplies the whole.
    """
    wiring.check_betas(b1, b2, eps)
    limiters.check_gamma(gamma)
    wiring.check_positive("scale", scale)
    if scaling not in SCALINGS:
        raise ConfigError(f"scaling is '{scaling}': {nearest(str(scaling), SCALINGS)}")

    def init(params: Any) -> ApolloState:
        projection.check(params)
        mu, nu = projection.zeros(params), projection.zeros(params)
        return ApolloState(jnp.zeros((), jnp.int32), mu, nu, limiters.initial_norms(params))

    def update(updates: Any, state: ApolloState, params: Any = None, *, step: Any = None, **extra_args: Any):
        del params, extra_args
        bases = projection.draw(updates, wiring.require_step("apollo", step))
        count = optax.safe_increment(state.count)
        root = jnp.sqrt(jnp.asarray(scale, jnp.float32))

        def one(g, rows, columns, mu, nu, norm):
            r = projection.project(g, rows, columns)
            m, v, direction, correction = wiring.adam_direction(mu, nu, r, count, b1, b2, eps)
            axis = projection.sides(g.shape)[0] if scaling == "channel" else (-2, -1)
            scaled = g.astype(jnp.float32) * (wiring.norm(direction, axis) / (wiring.norm(r, axis) + 1e-8))
            scaled, norm = limiters.limit(scaled * root if scale_front else scaled, norm, gamma)
            out = correction * (scaled if scale_front else scaled * root)
            return out.astype(g.dtype), m.astype(mu.dtype), v.astype(nu.dtype), norm

        out, mu, nu, norms = wiring.map_leaves(one, updates, *bases, state.mu, state.nu, state.norms)
        return out, ApolloState(count, mu, nu, norms)

    return optax.GradientTransformationExtraArgs(init, update)


def apollo(
    learning_rate: LearningRate,
    *,
    axes: Any,
    rank: int,
    period: int = 200,
    scale: float = 1.0,
    scaling: Scaling = "channel",
    scale_front: bool = False,
    gamma: float = 1.01,
    seed: int = 0,
    matrix_roles: roles.Predicate | Collection[str] = ("matrix",),
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    decay: roles.Predicate | Collection[str] = DECAYED_ROLES,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO on the kernels (`scale_by_apollo`), Adam on embeddings, head and everything else.

    Source: APOLLO (Zhu et al., 2024, arXiv 2412.05270).

    Args:
      learning_rate: a number, a schedule of the step, or `FromHparams`; the paper's is 0.01.
      axes: the tree of logical axis names of all parameters.
      rank: of the random image; the paper: 128 (60M), 256 (1B, 7B).
      period: steps after which the random matrices change.
      scale, scaling, scale_front, gamma: as in `scale_by_apollo`.
      seed: of the random matrices.
      matrix_roles: which parameters APOLLO takes: roles, or a predicate on `(path, role)`.
      b1, b2, eps: Adam's moments and epsilon, in the image and for the rest.
      weight_decay, decay, clip_norm: as in `adamw`.

    Raises:
      ConfigError: a value out of its range, a leaf without a role, an unknown role, no kernel to project; at
        `init`, a rank larger than a kernel.
    """
    matrix = scale_by_apollo(
        Projection(rank, period, refresh="gaussian", seed=seed),
        scale,
        scaling=scaling,
        scale_front=scale_front,
        b1=b1,
        b2=b2,
        eps=eps,
        gamma=gamma,
    )
    return wiring.optimizer(
        learning_rate,
        wiring.matrix_or_adam("apollo", matrix, matrix_roles, wiring.adam(b1, b2, eps), axes),
        axes=axes,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
    )


def apollo_mini(
    learning_rate: LearningRate,
    *,
    axes: Any,
    period: int = 200,
    scale: float = 128.0,
    scale_front: bool = False,
    gamma: float = 1.01,
    seed: int = 0,
    matrix_roles: roles.Predicate | Collection[str] = ("matrix",),
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    decay: roles.Predicate | Collection[str] = DECAYED_ROLES,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO with rank 1 and one step size for each matrix: about the memory of SGD for the kernels.

    Source: Zhu et al., 2024, arXiv 2412.05270; the released scripts have `scale_front=True` for 60M and 130M.
    Arguments and errors are those of `apollo`.
    """
    return apollo(
        learning_rate,
        axes=axes,
        rank=1,
        period=period,
        scale=scale,
        scaling="tensor",
        scale_front=scale_front,
        gamma=gamma,
        seed=seed,
        matrix_roles=matrix_roles,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
    )
