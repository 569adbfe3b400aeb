"""Fewer bytes for a model's weights."""

from jaxlm.compression.memory import MemoryReport, memory_report
from jaxlm.compression.quantize import QuantizeConfig, abstract_quantize, quantize, quantize_matrix
from jaxlm.compression.sparsity import (
    add_group_scales,
    apply_masks,
    fold_and_prune,
    magnitude_masks,
    straight_through,
    wanda_masks,
)

__all__ = [
    "MemoryReport",
    "QuantizeConfig",
    "abstract_quantize",
    "add_group_scales",
    "apply_masks",
    "fold_and_prune",
    "magnitude_masks",
    "memory_report",
    "quantize",
    "quantize_matrix",
    "straight_through",
    "wanda_masks",
]
