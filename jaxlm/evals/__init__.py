"""Evaluations of models."""

from jaxlm.evals.likelihood import Likelihood, likelihood, make_sums

__all__ = ["Likelihood", "likelihood", "make_sums"]
