"""Training towards N:M sparsity: CAST's optimizer, and the decay of SR-STE.

CAST's is Adam whose gradient fades, for the weights that the mask will remove, into a pull to zero. The paper calls it
AdamS, which is also another optimizer's name.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.core.errors import ConfigError
from jaxlm.core.sparsity import nm_mask
from jaxlm.optim import roles, wiring
from jaxlm.optim.learning_rate import LearningRate
from jaxlm.optim.wiring import zip_leaves


class CastState(NamedTuple):
    """`mask`: true where a weight is kept, by the magnitudes at the last refresh."""

    count: jax.Array
    mu: Any
    nu: Any
    mask: Any


def scale_by_cast(
    total_steps: int,
    *,
    strength: float = 4e-7,
    n: int = 2,
    m: int = 4,
    refresh: int = 10,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction with decay mixed in for the masked weights of kernels `(..., in, out)`; needs `step`, `params`.

    With `a = step / total_steps` the first moment of a masked weight is replaced by `(1 - a) * mu + a * strength *
    sign(w)` in the direction and in the second moment; `mu` itself averages the gradient alone. Masks keep the `n`
    largest of every `m` inputs and are drawn anew every `refresh` steps. Where there is no gradient the step does not
    depend on `strength`: that says when decay outweighs a gradient, so choose it near the gradients' size, and see
    `decay_budget` for how far a weight can travel. Moments have the dtype of the parameter; in bfloat16 the published
    strength vanishes beside the gradient.

    Source: CAST (Huang et al., 2025, arXiv 2509.25996), algorithm 1 and equations 3 to 13 as others report them; the
    betas are those of Adam, where the paper names none.

    Raises:
      ConfigError: a mask that does not divide a kernel (named), a period or run below 1, strength < 0.
    """
    wiring.check_count("total_steps", total_steps)
    wiring.check_count("refresh", refresh)
    wiring.check_betas(b1, b2, eps)
    if wiring.is_known(strength) and not strength >= 0:
        raise ConfigError(f"strength is {strength}, expected >= 0")

    def init(params: Any) -> CastState:
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return CastState(jnp.zeros((), jnp.int32), mu, nu, _masks(params, n, m))

    def update(updates: Any, state: CastState, params: Any = None, *, step: Any = None, **extra_args: Any):
        del extra_args
        step = wiring.require_step("cast", step)
        if params is None:
            raise ConfigError("cast needs the parameters: call update(updates, state, params, step=...)")
        mask = jax.lax.cond(step % refresh == 0, lambda: _masks(params, n, m), lambda: state.mask)
        a = jnp.clip(step.astype(jnp.float32) / total_steps, 0.0, 1.0)
        count = optax.safe_increment(state.count)
        t = count.astype(jnp.float32)
        first, second = 1 - jnp.asarray(b1, jnp.float32) ** t, 1 - jnp.asarray(b2, jnp.float32) ** t

        def one(g, mu, nu, kept, w):
            m1 = b1 * mu.astype(jnp.float32) + (1 - b1) * g.astype(jnp.float32)
            pull = (1 - a) * m1 + a * strength * jnp.sign(w).astype(jnp.float32)
            mixed = jnp.where(kept, m1, pull)
            m2 = b2 * nu.astype(jnp.float32) + (1 - b2) * mixed * mixed
            direction = (mixed / first) / (jnp.sqrt(m2 / second) + eps)
            return direction.astype(g.dtype), m1.astype(mu.dtype), m2.astype(nu.dtype)

        out, mu, nu = wiring.map_leaves(one, updates, state.mu, state.nu, mask, params)
        return out, CastState(count, mu, nu, mask)

    return optax.GradientTransformationExtraArgs(init, update)


def cast(
    learning_rate: LearningRate,
    total_steps: int,
    *,
    axes: Any,
    strength: float = 4e-7,
    n: int = 2,
    m: int = 4,
    refresh: int = 10,
    matrix_roles: roles.Predicate | Collection[str] = ("matrix",),
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: roles.Predicate | Collection[str] = wiring.DECAYED_ROLES,
    clip_norm: float | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_cast` on the kernels of the blocks, Adam on all other parameters, decoupled decay, the learning rate.

    Raises `ConfigError` as `scale_by_cast`, and when no parameter has one of `matrix_roles`.
    """
    matrix = scale_by_cast(total_steps, strength=strength, n=n, m=m, refresh=refresh, b1=b1, b2=b2, eps=eps)
    return wiring.optimizer(
        learning_rate,
        wiring.matrix_or_adam("cast", matrix, matrix_roles, wiring.adam(b1, b2, eps), axes),
        axes=axes,
        weight_decay=weight_decay,
        decay=decay,
        clip_norm=clip_norm,
    )


def add_masked_decay(strength: float, n: int = 2, m: int = 4) -> optax.GradientTransformation:
    """Adds `strength * w` to the gradient where `w` is not among the `n` largest of its `m` inputs; needs `params`.

    SR-STE (Zhou et al. 2021, arXiv 2102.04010) is this, for the kernels that are pruned, before any optimizer, with
    gradients from `jaxlm.compression.straight_through`; its strength for SGD is 2e-4. Wrap it in `optax.masked` for
    parameters that hold more than those kernels.
    """
    if wiring.is_known(strength) and not strength >= 0:
        raise ConfigError(f"strength is {strength}, expected >= 0")

    def update(updates: Any, state: Any, params: Any = None):
        if params is None:
            raise ConfigError("masked decay needs the parameters: call update(updates, state, params)")
        mask = _masks(params, n, m)
        return jax.tree.map(lambda g, w, kept: g + strength * jnp.where(kept, 0, w), updates, params, mask), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_budget(learning_rate: float | Callable[[int], Any], total_steps: int) -> float:
    """`sum_t lr_t * t / total_steps`: about how far CAST moves a masked weight that has no gradient.

    A run prunes without loss only if this is several times the typical magnitude of the kernels' weights.
    """
    wiring.check_count("total_steps", total_steps)
    steps = np.arange(total_steps)
    rates = [float(learning_rate(int(t))) for t in steps] if callable(learning_rate) else learning_rate
    return float(np.sum(rates * (steps / total_steps)))


def _masks(params: Any, n: int, m: int) -> Any:
    paths, leaves, treedef = zip_leaves(params)
    return treedef.unflatten([nm_mask(jnp.abs(w), n, m, path) for path, (w,) in zip(paths, leaves, strict=True)])
