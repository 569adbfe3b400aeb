"""Optax transformations and schedules that Optax lacks, and optimizers that know each parameter's role.

What each parameter is for is read by `jaxlm.optim.roles`.
"""

from jaxlm.optim.apollo import apollo, apollo_mini, scale_by_apollo
from jaxlm.optim.config import OptimizerConfig
from jaxlm.optim.eight_bit import (
    adamw_8bit,
    dequantize_blocks,
    dynamic_code_book,
    quantize_blocks,
    scale_by_adam_8bit,
)
from jaxlm.optim.fisher import natural_gradient, scale_by_empirical_fisher
from jaxlm.optim.galore import fira, galore, natural_galore, scale_by_fira, scale_by_galore
from jaxlm.optim.learning_rate import FromHparams, LearningRate, scale_by_learning_rate
from jaxlm.optim.limiters import limit_norm_growth
from jaxlm.optim.low_precision import apply_rounded_updates, keep_state_in
from jaxlm.optim.memory import model_bytes, state_bytes
from jaxlm.optim.normalized import (
    normalize_gradients,
    scale_by_axis_rms,
    scale_by_orthogonalization,
    scale_by_swan,
    scale_optimizer,
    swan,
)
from jaxlm.optim.optimizers import adamw, muon
from jaxlm.optim.projection import Projection
from jaxlm.optim.reset import reset_state_every
from jaxlm.optim.schedules import Schedule, quick_recovery, rewarm, warmup_stable_decay
from jaxlm.optim.spam import scale_by_spam, scale_by_stable_spam, spam, stable_spam
from jaxlm.optim.sparse import add_masked_decay, cast, decay_budget, scale_by_cast
from jaxlm.optim.wiring import DECAYED_ROLES

__all__ = [
    "DECAYED_ROLES",
    "FromHparams",
    "LearningRate",
    "OptimizerConfig",
    "Projection",
    "Schedule",
    "adamw",
    "add_masked_decay",
    "adamw_8bit",
    "apollo",
    "apollo_mini",
    "apply_rounded_updates",
    "cast",
    "decay_budget",
    "dequantize_blocks",
    "dynamic_code_book",
    "fira",
    "galore",
    "keep_state_in",
    "limit_norm_growth",
    "model_bytes",
    "muon",
    "natural_galore",
    "natural_gradient",
    "normalize_gradients",
    "quantize_blocks",
    "quick_recovery",
    "reset_state_every",
    "rewarm",
    "scale_by_adam_8bit",
    "scale_by_apollo",
    "scale_by_axis_rms",
    "scale_by_cast",
    "scale_by_empirical_fisher",
    "scale_by_fira",
    "scale_by_galore",
    "scale_by_learning_rate",
    "scale_by_orthogonalization",
    "scale_by_spam",
    "scale_by_stable_spam",
    "scale_by_swan",
    "scale_optimizer",
    "spam",
    "stable_spam",
    "state_bytes",
    "swan",
    "warmup_stable_decay",
]
