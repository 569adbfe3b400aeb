"""What the optimizers share: parts of a chain, wiring by role, and checks of their settings.

Settings may be numbers, or arrays that `optax.inject_hyperparams` passes in; what is traced cannot be looked
at, and is not checked.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError
from jaxlm.core.trees import named_leaves
from jaxlm.optim import roles
from jaxlm.optim.learning_rate import FromHparams, LearningRate, scale_by_learning_rate, value_of
from jaxlm.optim.schedules import is_known

DECAYED_ROLES = ("matrix", "embed", "tied", "head", "router", "conv")
"""Weight decay by default: tables and kernels; not norm scales and biases, implicit filters and codebooks."""


def optimizer(
    learning_rate: LearningRate | optax.GradientTransformation,
    *directions: optax.GradientTransformation,
    axes: Any,
    weight_decay: float | FromHparams,
    decay: roles.Predicate | Collection[str],
    clip_norm: float | None,
) -> optax.GradientTransformationExtraArgs:
    """A chain: clipping by global norm, the method's own direction, decoupled weight decay, the learning rate.

    `learning_rate` may be the last link itself, where groups have rates of their own. `weight_decay` may be a number of
    the run's `hparams`, for sweeps.
    """
    rate = learning_rate
    if not isinstance(rate, optax.GradientTransformation):
        rate = scale_by_learning_rate(learning_rate)
    return optax.chain(*_clip(clip_norm), *directions, *_decay(weight_decay, decay, axes), rate)


def by_role(
    method: str,
    transforms: Mapping[str, optax.GradientTransformation],
    choose: Callable[[str, str], str],
    axes: Any,
    needed: Collection[str],
) -> optax.GradientTransformationExtraArgs:
    """Each parameter goes to `transforms[choose(path, role)]`.

    Raises:
      ConfigError: at once, or at `init` on parameters some of which are frozen, when no parameter at all goes to
        one of `needed`: the method would silently not be used.
    """

    def refuse_unless_used(labels: Any, who: str) -> None:
        found = set(jax.tree.leaves(labels))
        if not found & set(needed):
            raise ConfigError(
                f"{method}: its roles match none of the {who}: it would touch no parameter. "
                f"What there is: {_summary(axes)}"
            )

    refuse_unless_used([choose(path, role) for path, role in named_leaves(roles.roles(axes))], "parameters")

    def labels(params: Any) -> Any:
        chosen = roles.select(params, axes, choose)
        refuse_unless_used(chosen, "parameters that are trained")
        return chosen

    return optax.partition(dict(transforms), labels)


def matrix_or_adam(
    method: str,
    matrix: optax.GradientTransformation,
    matrix_roles: roles.Predicate | Collection[str],
    rest: optax.GradientTransformation,
    axes: Any,
) -> optax.GradientTransformationExtraArgs:
    """`matrix` on the parameters that `matrix_roles` choose, `rest` on all others.

    Raises:
      ConfigError: nothing is chosen, or a vector is (a stack of vectors would pass for a matrix).
    """
    takes = roles.as_predicate(matrix_roles)

    def choose(path: str, role: str) -> str:
        if not takes(path, role):
            return "rest"
        if role == "vector":
            raise ConfigError(f"{method}: {path} is chosen, but its role is 'vector', and {method} is for matrices")
        return "matrix"

    return by_role(method, {"matrix": matrix, "rest": rest}, choose, axes, needed=("matrix",))


def adam(b1: float, b2: float, eps: float, mu_dtype: Any = None) -> optax.GradientTransformation:
    """Adam's direction `m_hat / (sqrt(v_hat) + eps)`."""
    check_betas(b1, b2, eps)
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)


def adam_direction(
    m: Array, v: Array, g: Array, count: Array, b1: Any, b2: Any, eps: Any
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."], Float[Array, ""]]:
    """`(m, v, direction, correction)` of one Adam step in float32, the `count`-th; `correction * direction` is Adam's.

    Methods that measure the direction before its bias correction need the two apart. `eps` is scaled so that the
    product is exactly `m_hat / (sqrt(v_hat) + eps)`.
    """
    m, v, g = (x.astype(jnp.float32) for x in (m, v, g))
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g * g
    t = count.astype(jnp.float32)
    root = jnp.sqrt(1 - jnp.asarray(b2, jnp.float32) ** t)
    direction = m / (jnp.sqrt(v) + eps * root)
    return m, v, direction, root / (1 - jnp.asarray(b1, jnp.float32) ** t)


def zip_leaves(tree: Any, *others: Any) -> tuple[list[str], list[tuple], Any]:
    """Paths, tuples of leaves and the structure of `tree`; `others` may hold None where `tree` has an array."""
    named, treedef = list(named_leaves(tree)), jax.tree.structure(tree)
    rest = [treedef.flatten_up_to(other) for other in others]
    leaves = [leaf for _, leaf in named]
    return [path for path, _ in named], list(zip(leaves, *rest, strict=True)), treedef


def map_leaves(one: Callable[..., tuple], tree: Any, *others: Any) -> list[Any]:
    """The trees of what `one(leaf, *other_leaves) -> tuple` returns, in the structure of `tree` (see `zip_leaves`)."""
    _, leaves, treedef = zip_leaves(tree, *others)
    return [treedef.unflatten(list(x)) for x in zip(*(one(*leaf) for leaf in leaves), strict=True)]


def norm(x: Array, axis: int | tuple[int, ...] = (-2, -1)) -> Float[Array, "..."]:
    """Euclidean norms along `axis`, which stays with size 1."""
    return jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True))


def require_step(method: str, step: Any) -> Array:
    if step is None:
        raise ConfigError(f"{method} follows the step: call update(..., step=...)")
    return jnp.asarray(step)


def check_fraction(name: str, value: Any) -> None:
    if is_known(value) and not 0 <= value < 1:
        raise ConfigError(f"{name} is {value}, expected 0 <= {name} < 1")


def check_positive(name: str, value: Any) -> None:
    if is_known(value) and not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name} is {value}, expected a finite number > 0")


def check_count(name: str, value: Any) -> None:
    """For ranks, periods and other numbers that shape the program: plain whole numbers from 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ConfigError(
            f"{name} is {value!r}, expected a whole number that is fixed while tracing "
            f"(under optax.inject_hyperparams name it in static_args)"
        )
    if value < 1:
        raise ConfigError(f"{name} is {value}, expected >= 1")


def check_betas(b1: Any, b2: Any, eps: Any) -> None:
    check_fraction("b1", b1)
    check_fraction("b2", b2)
    if is_known(eps) and not eps >= 0:
        raise ConfigError(f"eps is {eps}, expected >= 0")


def _clip(clip_norm: float | None) -> list[optax.GradientTransformation]:
    if clip_norm is None:
        return []
    if is_known(clip_norm) and not clip_norm > 0:
        raise ConfigError(f"clip_norm is {clip_norm}, expected > 0, or None not to clip")
    return [optax.clip_by_global_norm(clip_norm)]


def _decay(
    weight_decay: float | FromHparams, decay: roles.Predicate | Collection[str], axes: Any
) -> list[optax.GradientTransformation]:
    roles.roles(axes)  # a leaf without a role is an error before any compute
    chosen = roles.as_predicate(decay)
    if isinstance(weight_decay, FromHparams):
        return [_decay_from_hparams(weight_decay, lambda params: roles.mask(params, axes, chosen))]
    if is_known(weight_decay) and not weight_decay >= 0:
        raise ConfigError(f"weight_decay is {weight_decay}, expected >= 0")
    # A plain 0 leaves the link out; an injected one may change, and the chain may not.
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return []
    return [optax.add_decayed_weights(weight_decay, mask=lambda params: roles.mask(params, axes, chosen))]


def _decay_from_hparams(weight_decay: FromHparams, mask: Callable[[Any], Any]) -> optax.GradientTransformation:
    def update(updates, state, params=None, *, step=None, hparams=None, **extra_args):
        del extra_args
        strength = jnp.asarray(value_of(weight_decay, step, hparams))

        def add(decayed: bool, u: Array, p: Array) -> Array:
            return u + strength.astype(u.dtype) * p if decayed else u

        return jax.tree.map(add, mask(params), updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _summary(axes: Any) -> str:
    by_role: dict[str, list[str]] = {}
    for path, role in named_leaves(roles.roles(axes)):
        by_role.setdefault(role, []).append(path)
    return "; ".join(
        f"{role}: {', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}" for role, paths in by_role.items()
    )
