"""LoRA on a model (Hu et al. 2021, arXiv 2106.09685): put on chosen kernels, trained alone, taken off, merged.

    params = add_lora(key, params, LoraConfig(rank=16))
    axes = adapted_axes(params, model.axes())
    trainable, frozen = trees.partition(params, is_lora, label(params, axes))

Over quantized kernels this is QLoRA (Dettmers et al. 2023, arXiv 2305.14314): what is frozen stays packed.
"""

import dataclasses
from typing import Any

import jax

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.keys import fold
from jaxlm.weights import LowRank, Weight, add_low_rank, child_axes

KERNELS = ("query", "key", "value", "out", "gate", "up", "down")
"""The kernels of a block: attention's projections and those of the MLP (`gate` where it is gated)."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels get an update `alpha / rank * a @ b`."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = KERNELS
    """Kernels of every block; by default all of them, which QLoRA found to matter more than the rank."""

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"lora.rank is {self.rank}, expected at least 1")
        if not self.targets:
            raise ConfigError("lora.targets is empty, so nothing would be trained")
        for name in self.targets:
            if name not in KERNELS:
                raise ConfigError(f"lora.targets: no kernel '{name}': {nearest(name, KERNELS)}")


def add_lora(key: jax.Array, params: Any, config: LoraConfig) -> Any:
    """The parameters with `LowRank` weights over the targeted kernels of all blocks; at first nothing changes.

    Kernels may be dense or packed. Raises `ConfigError` for a model that has adapters already, or no such kernel.
    """
    wrapped = 0

    def wrap(path: str, w: Any) -> Any:
        nonlocal wrapped
        if not path.startswith("blocks/") or kernel_name(path) not in config.targets:
            return w
        if isinstance(w, LowRank):
            raise ConfigError(f"{path} has an adapter already: merge or remove it first")
        wrapped += 1
        return add_low_rank(fold(key, path), w, config.rank, config.alpha)

    params = trees.map_named(wrap, params, is_leaf=_is_weight)
    if not wrapped:
        raise ConfigError(f"the model has none of the kernels {', '.join(config.targets)}")
    return params


def adapted_axes(params: Any, axes: Any) -> Any:
    """The tree of logical axis names of parameters that hold weights which are no arrays, or several runs of blocks.

    `axes`: those of the plain model, `Decoder.axes()`.
    """
    axes = {**axes, "blocks": list(axes["blocks"]) * len(params["blocks"])}
    return jax.tree.map(child_axes, params, axes, is_leaf=_is_weight)


def is_lora(path: str, role: str = "") -> bool:
    """Whether a leaf is one of the two factors of an adapter: the predicate of a partition that trains these alone."""
    whole, _, last = path.rpartition("/")
    return last in ("a", "b") and kernel_name(whole) is not None


def remove_lora(params: Any) -> Any:
    """The parameters below the adapters: the reference policy of preference objectives."""
    return jax.tree.map(lambda w: w.base if isinstance(w, LowRank) else w, params, is_leaf=_is_weight)


def merge_lora(params: Any) -> Any:
    """Plain arrays in place of the adapted kernels, updates added in."""
    return jax.tree.map(lambda w: w.dense() if isinstance(w, LowRank) else w, params, is_leaf=_is_weight)


def kernel_name(path: str) -> str | None:
    """`query` of `blocks/0/attention/query/kernel`; `None` for what is no kernel."""
    parts = path.split("/")
    return parts[-2] if len(parts) > 1 and parts[-1] == "kernel" else None


def _is_weight(x: Any) -> bool:
    return isinstance(x, Weight)
