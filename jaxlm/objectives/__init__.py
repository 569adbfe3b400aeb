"""Objectives: what a training step minimizes."""

from jaxlm.objectives.base import Aux, Objective, StepContext
from jaxlm.objectives.causal_lm import CausalLM, token_loss_sums
from jaxlm.objectives.distill import Distillation
from jaxlm.objectives.policy_gradient import GRPO, group_advantages
from jaxlm.objectives.preference import CPO, DPO, KTO, ORPO, SimPO
from jaxlm.objectives.token_log_probs import model_log_probs, token_log_probs

__all__ = [
    "CPO",
    "DPO",
    "GRPO",
    "KTO",
    "ORPO",
    "Aux",
    "CausalLM",
    "Distillation",
    "Objective",
    "SimPO",
    "StepContext",
    "group_advantages",
    "model_log_probs",
    "token_log_probs",
    "token_loss_sums",
]
