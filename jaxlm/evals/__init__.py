"""Evaluations of models."""

from jaxlm.evals.ensembles import growing_ensemble_loss
from jaxlm.evals.forgetting import Spike, measure_spike
from jaxlm.evals.generation import Problem, Solved, Verdict, exact_match, few_shot_prompt, match_metrics, solve
from jaxlm.evals.likelihood import Likelihood, likelihood, make_sums, resident_loss, source_likelihoods
from jaxlm.evals.methods import EvaluationConfig, Generation, MultipleChoice, Passage, Perplexity, Task
from jaxlm.evals.multiple_choice import ChoiceScores, Question, choice_metrics, few_shot, score_questions
from jaxlm.evals.probing import FINE_TUNE, ProbeConfig, ProbeResult, fine_tune, linear_probe
from jaxlm.evals.scaling import (
    Chinchilla,
    PowerLaw,
    bootstrap_fit,
    data_efficiency,
    fit_chinchilla,
    fit_power_law,
    nested_asymptote,
    optimal_batch_tokens,
)
from jaxlm.evals.stats import Estimate, bootstrap, mcnemar, mean, spearman, wilson_interval
from jaxlm.evals.tasks import (
    PreparedTask,
    TaskResult,
    adapt,
    evaluate_task,
    find_task,
    prepare_task,
    register,
    task_names,
)

__all__ = [
    "Chinchilla",
    "FINE_TUNE",
    "ChoiceScores",
    "Estimate",
    "EvaluationConfig",
    "Generation",
    "Likelihood",
    "MultipleChoice",
    "Passage",
    "Perplexity",
    "PowerLaw",
    "PreparedTask",
    "ProbeConfig",
    "ProbeResult",
    "Problem",
    "Question",
    "Solved",
    "Spike",
    "Task",
    "TaskResult",
    "Verdict",
    "adapt",
    "bootstrap",
    "bootstrap_fit",
    "choice_metrics",
    "data_efficiency",
    "evaluate_task",
    "exact_match",
    "few_shot",
    "few_shot_prompt",
    "find_task",
    "fit_chinchilla",
    "fit_power_law",
    "fine_tune",
    "growing_ensemble_loss",
    "likelihood",
    "linear_probe",
    "make_sums",
    "match_metrics",
    "mcnemar",
    "mean",
    "measure_spike",
    "nested_asymptote",
    "optimal_batch_tokens",
    "prepare_task",
    "register",
    "score_questions",
    "solve",
    "resident_loss",
    "source_likelihoods",
    "spearman",
    "task_names",
    "wilson_interval",
]
