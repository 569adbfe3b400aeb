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
from jaxlm.weights.low_rank import LowRank, add_low_rank
from jaxlm.weights.quantized import Quantized, pack

__all__ = [
    "LowRank",
    "Quantized",
    "Weight",
    "add_low_rank",
    "child_axes",
    "dense",
    "grouped_matmul",
    "matmul",
    "matmul_transposed",
    "nbytes",
    "pack",
    "take",
]
