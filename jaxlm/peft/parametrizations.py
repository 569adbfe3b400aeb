"""Pretraining in fewer parameters: the kernels of all blocks as low-rank products, SLTrain's sums, or LoRA's.

    how = Parametrization("low_rank", rank=128)
    params = parametrize(key, params, how)
    trainable, frozen = trees.partition(params, how.is_trained, label(params, axes))

Between steps, `restart` is what the method does from time to time; `jaxlm.training.change_every` does it inside a step.
"""

import dataclasses
from typing import Any

import jax

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.keys import fold
from jaxlm.peft.lora import LoraConfig, add_lora, kernel_name
from jaxlm.weights import (
    LowRank,
    Weight,
    factored_kernel,
    merge_and_restart,
    refactorize,
    sparse_low_rank_kernel,
)

PARAMETRIZATIONS = ("dense", "low_rank", "sltrain", "lora", "relora")


@dataclasses.dataclass(frozen=True)
class Parametrization:
    """What the kernels of the blocks are made of; embeddings, head and norms stay dense."""

    name: str = "dense"
    """`dense`; `low_rank` (a product of two factors); `sltrain` (that and a sparse matrix); `lora` (factors beside
    frozen random kernels); `relora` (the same, merged into the kernels from time to time)."""
    rank: int = 128
    alpha: float = 32.0
    """Products are multiplied by `alpha / rank`."""
    density: float = 0.03
    """Share of places of `sltrain` that are not zero; 0.03 as published, 0.01 in arXiv 2505.22922."""

    def __post_init__(self):
        if self.name not in PARAMETRIZATIONS:
            raise ConfigError(f"parametrization '{self.name}': {nearest(self.name, PARAMETRIZATIONS)}")
        if self.rank < 1:
            raise ConfigError(f"parametrization.rank is {self.rank}, expected at least 1")

    def is_trained(self, path: str, role: str = "") -> bool:
        """Whether a leaf is trained: places of sparse kernels are not, and neither are kernels below adapters.

        ReLoRA's kernels change where adapters are merged into them, so they are part of what a step returns; see
        `stop_bases` and `is_base`.
        """
        if path.endswith("/indices"):
            return False
        return not (self.name == "lora" and is_base(path))


def is_base(path: str) -> bool:
    """Whether a leaf is the kernel below an adapter."""
    return path.endswith("/kernel/base")


def parametrize(key: jax.Array, params: Any, how: Parametrization) -> Any:
    """The parameters of a model with the kernels of all blocks drawn anew in that form (of LoRA's: the same kernels).

    Raises `ConfigError` for a rank larger than a kernel, or a density that leaves no place, naming the kernel.
    """
    if how.name == "dense":
        return params
    if how.name in ("lora", "relora"):
        return add_lora(key, params, LoraConfig(how.rank, how.alpha))

    def one(path: str, w: Any) -> Any:
        if not path.startswith("blocks/") or kernel_name(path) is None:
            return w
        try:
            if how.name == "low_rank":
                return factored_kernel(fold(key, path), w.shape, how.rank, how.alpha, w.dtype)
            return sparse_low_rank_kernel(fold(key, path), w.shape, how.rank, how.density, how.alpha, w.dtype)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    return trees.map_named(one, params, is_leaf=lambda x: isinstance(x, Weight))


def stop_bases(params: Any) -> Any:
    """The same parameters; kernels below adapters have no gradient, and its computation is left out."""

    def one(w: Any) -> Any:
        return dataclasses.replace(w, base=jax.lax.stop_gradient(w.base)) if isinstance(w, LowRank) else w

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, Weight))


def restart(key: jax.Array, params: Any, how: Parametrization) -> Any:
    """What a method does to its parameters when the optimizer starts anew; their function stays the same.

    `low_rank` and `sltrain` balance their factors (`refactorize`), `relora` merges its adapters and begins others,
    the rest change nothing.
    """
    if how.name in ("low_rank", "sltrain"):
        return refactorize(params)
    return merge_and_restart(key, params) if how.name == "relora" else params
