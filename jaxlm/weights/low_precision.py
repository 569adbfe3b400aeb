"""Kernels whose products follow a precision policy.

A policy is a kind of weight, not a setting of layers: `matmul(x, w)` is the only door to a kernel, the weight brings
along what its products need (a random key, scales, a meter), the layer scan cuts that like any weight, remat and
`vmap` treat it like any array, and models, losses and optimizers stay as they are. A context around `matmul` would
have had to hand each layer its part of that state by name, and get amaxes back out of a scan's backward pass.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.core.formats import number_format
from jaxlm.core.keys import fold
from jaxlm.core.policies import PrecisionPolicy
from jaxlm.weights import base as weights
from jaxlm.weights.base import OverBase, Weight, check_kernels
from jaxlm.weights.fake_quantized import LearnedStep, straight_through
from jaxlm.weights.low_rank import LowRank
from jaxlm.weights.quantized_dot import quantized_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowPrecision(OverBase):
    """A kernel `base` `(..., in, out)` multiplied as `policy` says (see `jaxlm.weights.quantized_matmul`).

    `scales` and `meter`: `(..., 3)`, of the input, the kernel and the gradient; `key`: `(...)`; each `None` where the
    policy has no use for it. What `base` is (dense, or `LearnedStep`) is what gets rounded.
    """

    base: Any
    scales: Float[Array, "*batch 3"] | None
    meter: Float[Array, "*batch 3"] | None
    key: jax.Array | None
    policy: PrecisionPolicy = dataclasses.field(metadata={"static": True})

    def dense(self) -> Array:
        return weights.dense(self.base)

    def matmul(self, x: Array, dtype: Any = None) -> Array:
        if self.policy.is_plain:
            return weights.matmul(x, self.base, dtype=dtype)
        return self._product(x, self._stored(), dtype)

    def matmul_transposed(self, x: Array, dtype: Any = None) -> Array:
        if self.policy.is_plain:
            return weights.matmul_transposed(x, self.base, dtype=dtype)
        return self._product(x, self._stored().mT, dtype)

    def grouped_matmul(self, x: Array, sizes: Array, dtype: Any = None) -> Array:
        if not self.policy.is_plain:
            raise ConfigError(f"precision policy '{self.policy.name}' has no grouped products: leave experts out of it")
        return weights.grouped_matmul(x, self.base, sizes, dtype=dtype)

    def child_axes(self, axes: tuple) -> "LowPrecision":
        leading = tuple(axes[:-2])
        own = [None if x is None else (*leading, None) for x in (self.scales, self.meter)]
        key = None if self.key is None else leading
        return LowPrecision(weights.child_axes(self.base, axes), *own, key, self.policy)

    def _stored(self) -> Array:
        w, kept = self.dense(), self.policy.weights
        return w if kept == self.policy.master else straight_through(w, number_format(kept).round(w))

    def _product(self, x: Array, w: Array, dtype: Any) -> Array:
        options = {"scales": self.scales, "meter": self.meter, "key": self.key}
        return quantized_matmul(x, w, self.policy, dtype=dtype, **options)


def under_policy(
    params: Any,
    kernels: Collection[str],
    policy: PrecisionPolicy,
    *,
    scales: Mapping[str, Array] | None = None,
    meters: Mapping[str, Array] | None = None,
    key: jax.Array | None = None,
) -> Any:
    """The parameters with the kernels of these paths (`blocks/0/mlp/up/kernel`) under a policy.

    `scales` and `meters`, by path, are `(..., 3)`. Of an adapter (`LowRank`) the base is what follows the policy.

    Raises:
      ConfigError: a path that there is not; a weight that is neither dense nor one of those two.
    """
    check_kernels(params, kernels)

    def one(path: str, w: Any) -> Any:
        if path not in kernels:
            return w
        if isinstance(w, LowRank):
            return dataclasses.replace(w, base=one(path, w.base))
        if isinstance(w, Weight) and not isinstance(w, LearnedStep):
            raise ConfigError(f"{path} is {type(w).__name__}: precision policy '{policy.name}' takes dense kernels")
        keys = jax.random.split(fold(key, path), w.shape[:-2]) if policy.is_random and key is not None else None
        own = [None if state is None else state[path] for state in (scales, meters)]
        return LowPrecision(w, *own, keys, policy)

    return trees.map_named(one, params, is_leaf=lambda x: isinstance(x, Weight))
