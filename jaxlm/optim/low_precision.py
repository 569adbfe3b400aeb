"""Weights and optimizer states that are kept in few bits from step to step.

Rounded to nearest, an update smaller than half the distance between neighbors is lost, every time; rounded at random
it arrives with the probability that makes the mean right. Eight-bit moments are `adamw_8bit`'s.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.core.errors import ConfigError
from jaxlm.core.formats import number_format
from jaxlm.core.keys import fold
from jaxlm.core.trees import map_named


def apply_rounded_updates(
    params: Any, updates: Any, *, key: jax.Array | None = None, to: str = "bfloat16", rounding: str = "stochastic"
) -> Any:
    """`params + updates`, added in float32 and rounded to a number format; dtypes stay those of `params`.

    For the `apply_updates` of `jaxlm.training.make_step`, which gives the key.

    Source: Revisiting BFloat16 Training (Zamirai et al., 2020, arXiv 2010.06192); for fixed point Gupta et al., 2015,
    arXiv 1502.02551.

    Raises:
      ConfigError: rounding at random without a key.
    """
    if rounding == "stochastic" and key is None:
        raise ConfigError(f"weights are rounded to {to} at random, and that needs a key")

    def one(path: str, p: jax.Array, u: jax.Array) -> jax.Array:
        total = p.astype(jnp.float32) + u.astype(jnp.float32)
        random = fold(key, path) if rounding == "stochastic" else None
        return number_format(to).round(total, random).astype(p.dtype)

    return map_named(one, params, updates)


class KeptState(NamedTuple):
    """The inner optimizer's state, its arrays in the format they are kept in."""

    inner: Any


def keep_state_in(
    inner: optax.GradientTransformation, dtype: str, *, wide: bool = False
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with float32 arithmetic and its state kept in `dtype`: `float32` or `bfloat16`.

    bfloat16 is rounded to at random (with the `key` given to `update`): a second moment that changes by a thousandth a
    step would stand still otherwise. Scalars and whole numbers stay as they are. With `wide`, gradients and parameters
    of narrow formats are float32 to the optimizer, and so then is its state.

    Raises:
      ConfigError: another format.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"optimizer_state is '{dtype}', expected float32 or bfloat16; for 8 bits take adamw_8bit")
    if dtype == "float32" and not wide:
        return optax.with_extra_args_support(inner)
    inner = optax.with_extra_args_support(inner)

    def is_kept(x: Any) -> bool:
        return jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 0

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32) if is_kept(x) else x, tree)

    def narrow(tree: Any, key: jax.Array | None) -> Any:
        if dtype == "float32":
            return tree
        if key is None:
            raise ConfigError("an optimizer state in bfloat16 is rounded at random: call update(..., key=...)")

        def one(path: str, x: jax.Array) -> jax.Array:
            return number_format(dtype).round(x, fold(key, path)).astype(dtype) if is_kept(x) else x

        return map_named(one, tree)

    def init(params: Any) -> KeptState:
        state = inner.init(widen(params))
        return KeptState(jax.tree.map(lambda x: x.astype(dtype) if is_kept(x) else x, state))

    def update(updates: Any, state: KeptState, params: Any = None, **extra: Any) -> tuple[Any, KeptState]:
        params = None if params is None else widen(params)
        updates, new = inner.update(widen(updates), widen(state.inner), params, **extra)
        key = extra.get("key")
        return updates, KeptState(narrow(new, None if key is None else fold(key, "state")))

    return optax.GradientTransformationExtraArgs(init, update)
