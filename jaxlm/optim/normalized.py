"""SGD whose gradients are normalized, matrix by matrix: SCALE, its ablations, and SWAN.

None of these keeps a second moment. A kernel is `(leading..., in, out)`; "column" means output unit, whose
weights lie along the input axis. Call them as `tx.update(gradients, state, params, step=step)`.
"""

from collections.abc import Collection
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.linalg import CONVERGENT, QUINTIC, orthogonalize
from jaxlm.optim import roles, wiring
from jaxlm.optim.learning_rate import LearningRate, scale_by_learning_rate
from jaxlm.optim.wiring import DECAYED_ROLES

Normalization = Literal["column", "row", "sign", "singular", "none"]
NORMALIZATIONS = ("column", "row", "sign", "singular", "none")

HEAD_ROLES = ("head", "tied")
NORMALIZED_ROLES = ("matrix", "embed", "head", "tied")


def scale_by_axis_rms(axis: int = -2, eps: float = 1e-8) -> optax.GradientTransformation:
    """Divides by the root mean square along one axis, so that it becomes 1. Stateless; keeps dtypes.

    `x / max(sqrt(mean(x**2, axis)), eps)`, computed in float32; what is zero stays zero. On kernels
    `(..., in, out)`, axis -2 is SCALE's column normalization: one statistic for each output unit.

    Source: A Minimalist Optimizer Design for LLM Pretraining (Glentis et al., 2025, arXiv 2506.16659). The paper
    writes the Euclidean norm; the released code, and its learning rates, use the root mean square.
    """

    def one(x: Array, _: Any) -> Array:
        wide = x.astype(jnp.float32)
        rms = jnp.sqrt(jnp.mean(wide * wide, axis=axis, keepdims=True))
        return (wide / jnp.maximum(rms, eps)).astype(x.dtype)

    return optax.stateless_with_tree_map(one)


def scale_by_orthogonalization(ns_steps: int = 5) -> optax.GradientTransformation:
    """`sqrt(max(in, out)) U V^T` of each matrix `U S V^T`, by Newton-Schulz: all singular values (nearly) equal.

    The factor makes the root mean square of a full-rank result about 1, as the other normalizations do, so that
    one grid of learning rates serves all.
    """
    wiring.check_count("ns_steps", ns_steps)

    def one(x: Array, _: Any) -> Array:
        return orthogonalize(x, QUINTIC[:1] * ns_steps) * max(x.shape[-2:]) ** 0.5

    return optax.stateless_with_tree_map(one)


def normalize_gradients(mode: Normalization, *, transposed: bool = False) -> optax.GradientTransformation:
    """One of SCALE's five normalizations: `column`, `row`, `sign`, `singular` or `none`. Stateless.

    `transposed` is for matrices `(..., out, in)`: a tied table `(vocab, embed)` used as a head.
    """
    if mode not in NORMALIZATIONS:
        raise ConfigError(f"normalization is '{mode}': {nearest(str(mode), NORMALIZATIONS)}")
    if mode in ("column", "row"):
        return scale_by_axis_rms(-2 if (mode == "column") != transposed else -1)
    if mode == "sign":
        return optax.scale_by_sign()
    return scale_by_orthogonalization() if mode == "singular" else optax.identity()


def scale_optimizer(
    learning_rate: LearningRate,
    *,
    axes: Any,
    normalization: Normalization = "column",
    momentum: float = 0.9,
    momentum_roles: roles.Predicate | Collection[str] = HEAD_ROLES,
    adam_learning_rate: LearningRate | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
    adam_eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: roles.Predicate | Collection[str] = DECAYED_ROLES,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SCALE: SGD with column-normalized gradients, and momentum for the language-model head alone.

    Head: `m = momentum * m + (1 - momentum) * g` (no bias correction: the normalization cancels it), then
    `m` normalized; kernels and embeddings: `g` normalized, no state; everything else (norm scales, biases,
    routers, convolutions, filters, codebooks): Adam. The embedding `(vocab, embed)` has one statistic for each
    feature, the head `(embed, vocab)` one for each token. A tied table, which the paper does not treat, is handled
    as the head that it also is: momentum, and one statistic for each token.

    The ablations are `normalization` (`row`, `sign`, `singular`, `none`) and `momentum_roles` (`()` for no momentum
    at all, all of `NORMALIZED_ROLES` for momentum everywhere).

    The update of an output unit has root mean square 1 however small its gradient is: also that of a token that
    never occurs. In bfloat16 weights steps of 1e-3 are mostly lost to rounding: keep float32 weights.

    Source: A Minimalist Optimizer Design for LLM Pretraining (Glentis et al., 2025, arXiv 2506.16659; released
    code), which uses no weight decay and no clipping, 1e-3 (60M to 350M parameters) to 1e-4 (7B) as
    `learning_rate`, and 2e-2 (1B and more: 1e-3) as Adam's.

    Args:
      learning_rate: a number, a schedule of the step, or `FromHparams`.
      axes: the tree of logical axis names of all parameters.
      normalization: what is done to every matrix.
      momentum: decay rate of the momentum, in [0, 1).
      momentum_roles: which of the normalized parameters have momentum: roles, or a predicate on `(path, role)`.
      adam_learning_rate: the rate of what Adam takes; None is `learning_rate`.
      adam_b1, adam_b2, adam_eps: Adam's moments and epsilon.
      weight_decay: strength of the decoupled decay, times the learning rate.
      decay: which parameters decay: roles, or a predicate on `(path, role)`.
      clip_norm: scale gradients down to this global norm first; None leaves them.

    Raises:
      ConfigError: a value out of its range, a leaf without a role, an unknown role, no matrix to normalize.
    """
    wiring.check_fraction("momentum", momentum)
    with_momentum = roles.as_predicate(momentum_roles)

    def choose(path: str, role: str) -> str:
        if role not in NORMALIZED_ROLES:
            return "adam"
        stored = "momentum" if with_momentum(path, role) else "plain"
        return f"{stored}_transposed" if role == "tied" else stored

    plain, transposed = normalize_gradients(normalization), normalize_gradients(normalization, transposed=True)
    ema = optax.ema(momentum, debias=False)
    transforms = {
        "plain": plain,
        "plain_transposed": transposed,
        "momentum": optax.chain(ema, plain),
        "momentum_transposed": optax.chain(ema, transposed),
        "adam": wiring.adam(adam_b1, adam_b2, adam_eps),
    }
    normalized = tuple(name for name in transforms if name != "adam")
    rate = scale_by_learning_rate(learning_rate)
    if adam_learning_rate is not None:
        rates = {**dict.fromkeys(normalized, rate), "adam": scale_by_learning_rate(adam_learning_rate)}
        rate = wiring.by_role("scale", rates, choose, axes, normalized)
    return wiring.optimizer(
        rate,
        wiring.by_role("scale", transforms, choose, axes, normalized),
        axes=axes,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
    )


def scale_by_swan(eps: float = 1e-8) -> optax.GradientTransformation:
    """SWAN's direction for kernels `(..., in, out)`: standardize, whiten, restore the norm. Stateless.

    Each output unit's gradient is standardized over its inputs, `z = (g - mean) / std`. With `Z` the matrix
    `(out, in)` of these, the direction is `(Z Z^T)^(-1/2) Z` (in general: `U V^T` of `Z = U S V^T`) times
    `||Z||_F / ||U V^T||_F`. The whitening is by Newton-Schulz iterations that converge.

    Source: SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training (Ma et al., 2024, arXiv
    2412.13148, algorithms 1 to 3); its own iteration (ten steps, beta 0.8) does not settle at singular values of 1.
    """

    def one(g: Array, _: Any) -> Float[Array, "*batch in out"]:
        x = g.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-2, keepdims=True)
        z = x / jnp.maximum(jnp.sqrt(jnp.mean(x * x, axis=-2, keepdims=True)), eps)
        white = orthogonalize(z, CONVERGENT)
        return (white * (wiring.norm(z) / jnp.maximum(wiring.norm(white), eps))).astype(g.dtype)

    return optax.stateless_with_tree_map(one)


def swan(
    learning_rate: LearningRate,
    *,
    axes: Any,
    matrix_roles: roles.Predicate | Collection[str] = ("matrix",),
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: roles.Predicate | Collection[str] = DECAYED_ROLES,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SWAN on the kernels, without any state (`scale_by_swan`); Adam on embeddings, head and everything else.

    Source: Ma et al., 2024, arXiv 2412.13148.

    Args:
      matrix_roles: which parameters SWAN takes: roles, or a predicate on `(path, role)`.
      b1, b2, eps: Adam's moments and epsilon, for the rest.
      The other arguments are those of `adamw`.

    Raises:
      ConfigError: a value out of its range, a leaf without a role, an unknown role, no parameter for SWAN.
    """
    return wiring.optimizer(
        learning_rate,
        wiring.matrix_or_adam("swan", scale_by_swan(), matrix_roles, wiring.adam(b1, b2, eps), axes),
        axes=axes,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
    )
