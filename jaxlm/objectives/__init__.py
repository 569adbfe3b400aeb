"""Objectives: what a training step minimizes."""

from jaxlm.objectives.base import Aux, Objective, StepContext
from jaxlm.objectives.causal_lm import CausalLM, token_loss_sums

__all__ = ["Aux", "CausalLM", "Objective", "StepContext", "token_loss_sums"]
