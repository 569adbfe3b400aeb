"""Multiple choice by log-likelihood: which choice a model finds most likely, under each normalization by length.

Normalizations, as lm-evaluation-harness 0.4.13 has them (and `tokens`, OLMES's per-token one, Gu et al. 2024):

- `none`: the log-likelihood of the choice (`acc`);
- `characters`: over the choice's characters, without the delimiter (`acc_norm`);
- `bytes`: over its UTF-8 bytes (`acc_bytes`);
- `tokens`: over the tokens scored, the delimiter's included (`acc_tokens`);
- `unconditional`: less the choice's log-likelihood without the context (`acc_mutual_info`; Holtzman et al. 2021
  for the idea), which takes twice the passes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxlm.core.errors import ConfigError, DataError, nearest
from jaxlm.evals import stats
from jaxlm.evals.stats import Estimate
from jaxlm.scoring import Encoding, score_pairs

METRICS = {
    "none": "acc",
    "characters": "acc_norm",
    "bytes": "acc_bytes",
    "tokens": "acc_tokens",
    "unconditional": "acc_mutual_info",
}
"""Normalizations and the harness's names of their accuracies."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A context, what may follow it, and which of these is right. `answer` counts from 0.

    A choice is scored as `delimiter + choice`.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    delimiter: str = " "

    def __post_init__(self):
        if len(self.choices) < 2 or not all(self.choices):
            raise DataError(f"choices are {self.choices!r}, expected at least two, none of them empty")
        if not 0 <= self.answer < len(self.choices):
            raise DataError(f"answer is {self.answer}, expected 0 to {len(self.choices) - 1}")


@dataclasses.dataclass(frozen=True)
class ChoiceScores:
    """A question's log-likelihoods, and what the choices' are divided by or compared with."""

    question: Question
    log_likelihoods: Float[np.ndarray, "choices"]
    num_tokens: tuple[int, ...]
    unconditional: Float[np.ndarray, "choices"] | None = None

    def normalized(self, normalization: str) -> Float[np.ndarray, "choices"]:
        """The scores that a normalization compares. Raises `ConfigError` for one unknown or not measured."""
        choices = self.question.choices
        match normalization:
            case "none":
                return self.log_likelihoods
            case "characters":
                return self.log_likelihoods / np.array([len(choice) for choice in choices])
            case "bytes":
                return self.log_likelihoods / np.array([len(choice.encode()) for choice in choices])
            case "tokens":
                return self.log_likelihoods / np.array(self.num_tokens)
            case "unconditional":
                if self.unconditional is None:
                    raise ConfigError("normalization 'unconditional' needs scores made with it")
                return self.log_likelihoods - self.unconditional
        raise ConfigError(f"normalization '{normalization}': {nearest(normalization, METRICS)}")

    def prediction(self, normalization: str = "none") -> int:
        """The choice with the highest score; the first among equals."""
        return int(np.argmax(self.normalized(normalization)))

    def is_right(self, normalization: str = "none") -> bool:
        return self.prediction(normalization) == self.question.answer

    @property
    def probabilities(self) -> Float[np.ndarray, "choices"]:
        """The softmax of the log-likelihoods."""
        shifted = np.exp(self.log_likelihoods - self.log_likelihoods.max())
        return shifted / shifted.sum()

    @property
    def brier(self) -> float:
        """The squared distance of `probabilities` from certainty of the answer, 0 to 2 (Brier 1950)."""
        truth = np.arange(len(self.question.choices)) == self.question.answer
        return float(np.square(self.probabilities - truth).sum())


def score_questions(
    model: Any,
    params: Any,
    encoding: Encoding,
    questions: Sequence[Question],
    *,
    normalizations: Sequence[str] = ("none", "characters", "bytes", "tokens"),
    **options: Any,
) -> list[ChoiceScores]:
    """Scores each question's choices after its context; `options` are those of `score_tokens`.

    Without context too where `normalizations` contains `unconditional`.
    """
    check_normalizations(normalizations)
    pairs = [(q.context, q.delimiter + choice) for q in questions for choice in q.choices]
    alone: dict[str, int] = {}
    if "unconditional" in normalizations:
        # Yes and no, or A to D, are scored once for all questions.
        alone = {continuation: len(pairs) + i for i, continuation in enumerate(dict.fromkeys(c for _, c in pairs))}
    scores = score_pairs(model, params, encoding, pairs + [("", continuation) for continuation in alone], **options)
    results, begin = [], 0
    for question in questions:
        found = scores[begin : begin + len(question.choices)]
        begin += len(question.choices)
        without = [scores[alone[question.delimiter + c]].log_likelihood for c in question.choices] if alone else None
        results.append(
            ChoiceScores(
                question,
                np.array([s.log_likelihood for s in found]),
                tuple(s.num_tokens for s in found),
                None if without is None else np.array(without),
            )
        )
    return results


def choice_metrics(scores: Sequence[ChoiceScores], normalizations: Sequence[str]) -> dict[str, Estimate]:
    """The accuracy under each normalization, by the harness's names, and `brier`; means over questions."""
    check_normalizations(normalizations)
    metrics = {METRICS[n]: stats.mean([score.is_right(n) for score in scores]) for n in normalizations}
    return {**metrics, "brier": stats.mean([score.brier for score in scores])}


def check_normalizations(normalizations: Sequence[str]) -> None:
    """Raises `ConfigError` for an unknown name, with the nearest known one."""
    for name in normalizations:
        if name not in METRICS:
            raise ConfigError(f"normalization '{name}': {nearest(name, METRICS)}")


def few_shot(examples: Sequence[Question], question: Question, separator: str = "\n\n") -> Question:
    """The question behind solved examples, each its context, the delimiter and the right choice."""
    solved = [q.context + q.delimiter + q.choices[q.answer] for q in examples]
    return dataclasses.replace(question, context=separator.join([*solved, question.context]))


def question_from_record(
    record: Mapping[str, Any], where: str, template: str = "Question: {question}\nAnswer:"
) -> Question:
    """The `Question` in an object with `question`, `choices` and `answer`.

    `answer`: an index from 0, a letter from A, or the text of a choice (the text wins where a choice is itself a
    letter). `template` makes the context of the question. Raises `DataError` that begins with `where`.
    """
    for field, kinds, expected in (
        ("question", str, "text"),
        ("choices", list, "a list"),
        ("answer", (int, str), "an index, a letter or a choice"),
    ):
        if field not in record:
            raise DataError(f"{where}: no field '{field}' (fields present: {', '.join(record) or 'none'})")
        value = record[field]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise DataError(f"{where}: field '{field}' holds {type(value).__name__}, expected {expected}")
    choices, answer = record["choices"], record["answer"]
    if not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{where}: field 'choices' holds {choices!r}, expected texts")
    if isinstance(answer, str):
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        options = choices if answer in choices else letters
        if answer not in options:
            raise DataError(f"{where}: answer {answer!r} is neither a choice nor one of {', '.join(letters)}")
        answer = options.index(answer)
    try:
        return Question(template.replace("{question}", record["question"]), tuple(choices), answer)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
