"""Measurements of models: bucketed log-likelihoods of tokens, pairs and texts; tangent kernels; curvature."""

from jaxlm.scoring.curvature import Trace, fisher_trace, hessian_trace, hvp, objective_loss
from jaxlm.scoring.pairs import (
    Encoding,
    PairScore,
    TextScore,
    TokenizerEncoding,
    encode_pair,
    score_pairs,
    score_texts,
)
from jaxlm.scoring.tangent import (
    kernel_alignment,
    representation_alignment,
    sign_similarity,
    tangent_kernel,
    weight_change,
)
from jaxlm.scoring.tokens import TokenScores, score_rolling, score_tokens
from jaxlm.scoring.windows import Window, rolling_windows

__all__ = [
    "Encoding",
    "PairScore",
    "TextScore",
    "TokenScores",
    "TokenizerEncoding",
    "Trace",
    "Window",
    "encode_pair",
    "fisher_trace",
    "hessian_trace",
    "hvp",
    "kernel_alignment",
    "objective_loss",
    "representation_alignment",
    "rolling_windows",
    "score_pairs",
    "score_rolling",
    "score_texts",
    "score_tokens",
    "sign_similarity",
    "tangent_kernel",
    "weight_change",
]
