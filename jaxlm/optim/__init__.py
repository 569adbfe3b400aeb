"""Optax transformations and schedules that Optax lacks, and optimizers that know each parameter's role.

What each parameter is for is read by `jaxlm.optim.roles`.
"""

from jaxlm.optim.config import OptimizerConfig
from jaxlm.optim.learning_rate import FromHparams, LearningRate, scale_by_learning_rate
from jaxlm.optim.optimizers import DECAYED_ROLES, adamw, muon
from jaxlm.optim.schedules import Schedule, rewarm, warmup_stable_decay

__all__ = [
    "DECAYED_ROLES",
    "FromHparams",
    "LearningRate",
    "OptimizerConfig",
    "Schedule",
    "adamw",
    "muon",
    "rewarm",
    "scale_by_learning_rate",
    "warmup_stable_decay",
]
