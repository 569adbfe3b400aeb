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
from jaxlm.weights.fake_quantized import LearnedStep, fake_quant, learn_steps, learned_step_quant, straight_through
from jaxlm.weights.group_scaled import GroupScaled, add_group_scale
from jaxlm.weights.low_precision import LowPrecision, under_policy
from jaxlm.weights.low_rank import LowRank, add_low_rank
from jaxlm.weights.quantized import Quantized, pack
from jaxlm.weights.quantized_dot import quantized_dot_general, quantized_matmul, require_native

__all__ = [
    "Factored",
    "LearnedStep",
    "LowPrecision",
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
    "fake_quant",
    "grouped_matmul",
    "learn_steps",
    "learned_step_quant",
    "matmul",
    "matmul_transposed",
    "merge_and_restart",
    "nbytes",
    "pack",
    "quantized_dot_general",
    "quantized_matmul",
    "refactorize",
    "require_native",
    "sparse_low_rank_kernel",
    "straight_through",
    "take",
    "under_policy",
]
