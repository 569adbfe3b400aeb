"""The optimizers of a training run, wired to roles: AdamW, and Muon on the kernels with Adam on the rest.

Both are chains of Optax's own pieces. What is added is that they know which leaf is what (`roles`), that
kernels are `(leading..., in, out)` with independent matrices along the leading axes, and that the learning
rate follows the caller's `step`. Call them as `tx.update(gradients, state, params, step=step)`; the extra
arguments `key`, `loss_fn` and `hparams` may be given too.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import optax
from optax import contrib

from jaxlm.optim import roles, wiring
from jaxlm.optim.learning_rate import LearningRate, scale_by_learning_rate
from jaxlm.optim.wiring import DECAYED_ROLES


def adamw(
    learning_rate: LearningRate,
    *,
    axes: Any,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay: roles.Predicate | Collection[str] = DECAYED_ROLES,
    clip_norm: float | None = None,
    mu_dtype: Any = None,
    rate_factor: Callable[[str, str], float] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW: `p -= lr(step) * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)`.

    Source: Decoupled Weight Decay Regularization (Loshchilov and Hutter, 2019, arXiv 1711.05101), in the
    form of Optax and PyTorch, where the decay is multiplied by the learning rate.

    Args:
      learning_rate: a number, a schedule of the step, or `FromHparams`.
      axes: the tree of logical axis names of all parameters.
      b1, b2: decay rates of the first and second moments.
      eps: added to the root of the second moment.
      weight_decay: strength of the decoupled decay.
      decay: which parameters decay: roles, or a predicate on `(path, role)`.
      clip_norm: scale gradients down to this global norm first; None leaves them.
      mu_dtype: dtype of the first moment; None is that of the parameter.
      rate_factor: of each parameter's learning rate, by `(path, role)`, as `ScalingRules.rate_factor` gives it. The
        decay is not multiplied: in models of any width parameters shrink alike.

    Raises:
      ConfigError: a value out of its range, a leaf without a role, an unknown role in `decay`.
    """
    factors = [] if rate_factor is None else [scale_by_factors(rate_factor, axes)]
    return wiring.optimizer(
        learning_rate,
        wiring.adam(b1, b2, eps, mu_dtype),
        *factors,
        axes=axes,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
    )


def muon(
    learning_rate: LearningRate,
    *,
    axes: Any,
    beta: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    consistent_rms: float | None = 0.2,
    muon_roles: roles.Predicate | Collection[str] = ("matrix",),
    adam_learning_rate: LearningRate | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay: roles.Predicate | Collection[str] = DECAYED_ROLES,
    clip_norm: float | None = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon on every layer's and expert's matrix of role `matrix`, one by one; Adam on everything else.

    A kernel's update is its momentum made nearly orthogonal by Newton-Schulz iterations.
    `optax.contrib.muon` left to itself takes every two-dimensional array for a matrix: with stacked kernels
    that is the embedding, and the kernels silently get Adam.

    Source: Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon); `consistent_rms` from
    Muon is Scalable for LLM Training (Liu et al., 2025, arXiv 2502.16982, section 2.2).

    Args:
      learning_rate: a number, a schedule of the step, or `FromHparams`.
      axes: the tree of logical axis names of all parameters.
      beta: decay rate of the momentum.
      nesterov: whether the update looks one step ahead.
      ns_steps: Newton-Schulz iterations.
      consistent_rms: scale updates to this root mean square, `sqrt(max(in, out)) * consistent_rms` times the
        orthogonal matrix, so that one learning rate and weight decay serve Muon and Adam; None scales by
        `sqrt(max(1, out / in))` instead, and then Muon wants a rate of its own.
      muon_roles: which parameters Muon takes: roles, or a predicate on `(path, role)`. Their last two axes
        are `(in, out)`.
      adam_learning_rate: the rate of the rest; None is `learning_rate`.
      adam_b1, adam_b2, adam_eps: Adam's moments and epsilon for the rest.
      weight_decay: strength of the decoupled decay, times the learning rate of each group.
      decay: which parameters decay: roles, or a predicate on `(path, role)`.
      clip_norm: scale gradients down to this global norm first; None leaves them.
      mu_dtype: dtype of the momentum and of Adam's first moment; None is that of the parameter.

    Raises:
      ConfigError: a value out of its range, a leaf without a role, an unknown role, no parameter for Muon.
    """
    wiring.check_fraction("beta", beta)
    wiring.check_count("ns_steps", ns_steps)

    def dimensions(params):
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), params)

    orthogonalize = optax.chain(
        contrib.scale_by_muon(
            beta=beta,
            nesterov=nesterov,
            ns_steps=ns_steps,
            mu_dtype=mu_dtype,
            weight_dimension_numbers=dimensions,
        ),
        optax.stateless_with_tree_map(lambda update, _: update * _shape_scale(update.shape, consistent_rms)),
    )
    rate = scale_by_learning_rate(learning_rate)
    if adam_learning_rate is not None:
        rate = wiring.matrix_or_adam("muon", rate, muon_roles, scale_by_learning_rate(adam_learning_rate), axes)
    return wiring.optimizer(
        rate,
        wiring.matrix_or_adam(
            "muon", orthogonalize, muon_roles, wiring.adam(adam_b1, adam_b2, adam_eps, mu_dtype), axes
        ),
        axes=axes,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
    )


def scale_by_factors(factor: Callable[[str, str], float], axes: Any) -> optax.GradientTransformation:
    """Multiplies the update of every parameter by `factor(path, role)`. Stateless."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda u, f: u * f, updates, roles.select(updates, axes, factor)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _shape_scale(shape: tuple[int, ...], consistent_rms: float | None) -> float:
    fan_in, fan_out = shape[-2:]
    if consistent_rms is None:
        return max(1.0, fan_out / fan_in) ** 0.5
    return max(fan_in, fan_out) ** 0.5 * consistent_rms
