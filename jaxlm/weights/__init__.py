"""What a kernel may be, and the few functions that layers call on it."""

from jaxlm.weights.base import (
    Weight,
    child_axes,
    dense,
    grouped_matmul,
    matmul,
    matmul_transposed,
    nbytes,
    take,
)
from jaxlm.weights.factored import (
    Factored,
    Sparse,
    factored_kernel,
    merge_and_restart,
    refactorize,
    sparse_low_rank_kernel,
)
from jaxlm.weights.group_scaled import GroupScaled, add_group_scale
from jaxlm.weights.low_rank import LowRank, add_low_rank
from jaxlm.weights.quantized import Quantized, pack

__all__ = [
    "Factored",
    "GroupScaled",
    "LowRank",
    "Quantized",
    "Sparse",
    "Weight",
    "add_group_scale",
    "add_low_rank",
    "child_axes",
    "dense",
    "factored_kernel",
    "grouped_matmul",
    "matmul",
    "matmul_transposed",
    "merge_and_restart",
    "nbytes",
    "pack",
    "refactorize",
    "sparse_low_rank_kernel",
    "take",
]
