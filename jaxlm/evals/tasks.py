"""Named evaluations, and what runs one on a model.

    result = evaluate_task("multiple_choice", subject, path="questions.jsonl")
    result.metrics["acc_norm"]         # Estimate(value, error)

A task is a loader and a method. A data set of problems joins with a few lines:

    register(Task(
        "gsm8k",
        lambda path: [Problem(f"Question: {r.question}\\nAnswer:", r.answer) for r in read_gsm8k(path)],
        Generation(GenerationConfig(max_new_tokens=256, temperature=0, stop=("Question:",)), exact_match(last_number)),
    ))
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jaxlm.core.errors import ConfigError, DataError, nearest
from jaxlm.data.sources import read_documents
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding import GenerationConfig, Prompt
from jaxlm.evals import stats
from jaxlm.evals.generation import Judge, Problem, Solved, check_greedy, few_shot_prompt, match_metrics, solve
from jaxlm.evals.multiple_choice import (
    Question,
    check_normalizations,
    choice_metrics,
    few_shot,
    question_from_record,
    score_questions,
)
from jaxlm.evals.stats import Estimate
from jaxlm.scoring import TextScore, TokenizerEncoding, score_texts


class Subject(Protocol):
    """What is evaluated; `jaxlm.interop.Pretrained` is one."""

    @property
    def model(self) -> Any: ...

    @property
    def params(self) -> Any: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def stop_ids(self) -> Sequence[int]:
        """Ids that end a completion; the tokenizer's EOS where there are none."""
        ...


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How to run a task."""

    batch_size: int = 16
    """Rows that go through the model at once."""
    max_length: int | None = None
    """Tokens of context; by default the model's."""
    add_bos: bool = False
    """Begin scored contexts with the BOS id, as Llama and Gemma expect it."""
    num_shots: int = 0
    """Solved examples before each question or problem."""
    limit: int | None = None
    """Use the first so many examples only."""

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("max_length", 1), ("num_shots", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"evaluation.{name} is {value}, expected at least {least}")


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Metrics with standard errors, and a plain record of each example, as JSON may hold it."""

    task: str
    metrics: Mapping[str, Estimate]
    examples: tuple[Mapping[str, Any], ...]

    def as_json(self, with_examples: bool = True) -> dict[str, Any]:
        """A dict for `jaxlm.core.json_files.write_json`."""
        metrics = {name: {"value": m.value, "error": m.error} for name, m in self.metrics.items()}
        found = {"task": self.task, "num_examples": len(self.examples), "metrics": metrics}
        return {**found, "examples": list(self.examples)} if with_examples else found


class Method(Protocol):
    """What a task does with its examples."""

    def with_shots(self, example: Any, shots: Sequence[Any]) -> Any:
        """The example behind solved ones."""
        ...

    def evaluate(
        self,
        subject: Subject,
        examples: Sequence[Any],
        config: EvaluationConfig,
        progress: Callable[[int, int], None] | None,
    ) -> tuple[dict[str, Estimate], list[dict[str, Any]]]:
        """Metrics, and a record of each example."""
        ...


@dataclasses.dataclass(frozen=True)
class MultipleChoice:
    """`Question`s by log-likelihood, under each of the `normalizations`."""

    normalizations: tuple[str, ...] = ("none", "characters", "bytes", "tokens")

    def __post_init__(self):
        check_normalizations(self.normalizations)

    def with_shots(self, example: Question, shots: Sequence[Question]) -> Question:
        return few_shot(shots, example)

    def evaluate(self, subject: Subject, examples: Sequence[Question], config: EvaluationConfig, progress=None):
        scores = score_questions(
            subject.model,
            subject.params,
            TokenizerEncoding(subject.tokenizer, config.add_bos),
            examples,
            normalizations=self.normalizations,
            **_scoring_options(config, progress),
        )
        records = [
            {
                "context": s.question.context,
                "choices": list(s.question.choices),
                "answer": s.question.answer,
                "log_likelihoods": s.log_likelihoods.tolist(),
                "predictions": {n: s.prediction(n) for n in self.normalizations},
            }
            for s in scores
        ]
        return choice_metrics(scores, self.normalizations), records


@dataclasses.dataclass(frozen=True)
class Generation:
    """`Problem`s by completions that a judge finds right or wrong.

    `metrics` sums the judged problems up; `format_prompt` makes the prompt that the model sees (a chat template).
    `show` is a problem's reference as solved examples show it.
    """

    generation: GenerationConfig
    judge: Judge
    metrics: Callable[[Sequence[Solved]], Mapping[str, Estimate]] = match_metrics
    format_prompt: Callable[[str], Prompt] = str
    show: Callable[[Any], str] = str

    def __post_init__(self):
        check_greedy(self.generation)

    def with_shots(self, example: Problem, shots: Sequence[Problem]) -> Problem:
        solved = [(shot.prompt, self.show(shot.reference)) for shot in shots]
        return dataclasses.replace(example, prompt=few_shot_prompt(solved, example.prompt))

    def evaluate(self, subject: Subject, examples: Sequence[Problem], config: EvaluationConfig, progress=None):
        solved = solve(
            subject.model,
            subject.params,
            subject.tokenizer,
            examples,
            self.judge,
            self.generation,
            format_prompt=self.format_prompt,
            batch_size=config.batch_size,
            max_length=config.max_length,
            stop_ids=tuple(subject.stop_ids) or None,
            progress=progress,
        )
        records = [
            {
                "prompt": s.problem.prompt,
                "completions": list(s.completions),
                "answers": [verdict.answer for verdict in s.verdicts],
                "right": [verdict.is_right for verdict in s.verdicts],
            }
            for s in solved
        ]
        return dict(self.metrics(solved)), records


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well texts are predicted: each token once, windows of the model's context, documents apart.

    Metrics are those of the harness, weighted by the corpus and not means over documents: `word_perplexity`,
    `byte_perplexity`, `bits_per_byte`; and `token_perplexity`, which depends on the tokenizer. Errors are
    bootstrapped over documents.
    """

    resamples: int = 1000

    def with_shots(self, example: str, shots: Sequence[str]) -> str:
        raise ConfigError("evaluation.num_shots: texts are predicted without solved examples, expected 0")

    def evaluate(self, subject: Subject, examples: Sequence[str], config: EvaluationConfig, progress=None):
        scores = score_texts(
            subject.model,
            subject.params,
            TokenizerEncoding(subject.tokenizer, config.add_bos),
            examples,
            **_scoring_options(config, progress),
        )
        return text_metrics(scores, self.resamples), [score._asdict() for score in scores]


def text_metrics(scores: Sequence[TextScore], resamples: int = 1000) -> dict[str, Estimate]:
    """The metrics of `Perplexity`. Texts without words leave `word_perplexity` out."""
    scores = [score for score in scores if score.num_tokens]
    if not scores:
        raise DataError("there are no tokens to evaluate")
    total = [score.log_likelihood for score in scores]

    def metric(field: str, finish: Callable[[float], float]) -> Estimate:
        counts = [getattr(score, field) for score in scores]

        def of(log_likelihoods: Any, counts: Any) -> float:
            return finish(-log_likelihoods.sum() / max(counts.sum(), 1))

        return stats.bootstrap(of, total, counts, resamples=resamples)

    def exp(nats: float) -> float:
        return math.exp(min(nats, 700.0))

    metrics = {
        "bits_per_byte": metric("num_bytes", lambda nats: nats / math.log(2)),
        "byte_perplexity": metric("num_bytes", exp),
        "token_perplexity": metric("num_tokens", exp),
    }
    if any(score.num_words for score in scores):
        metrics["word_perplexity"] = metric("num_words", exp)
    return metrics


@dataclasses.dataclass(frozen=True)
class Task:
    """`load(path)` gives the examples that `method` evaluates; a path may be optional (`None`).

    `load_shots(path)`: examples to show solved, from another split; without it they are the first of the task's own,
    which are then not evaluated.
    """

    name: str
    load: Callable[[str | None], Sequence[Any]]
    method: Method
    load_shots: Callable[[str | None], Sequence[Any]] | None = None


def evaluate_task(
    task: Task | str,
    subject: Subject,
    *,
    path: str | Path | None = None,
    config: EvaluationConfig = EvaluationConfig(),
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Runs a task, given by itself or by name, on a model.

    Raises `ConfigError` for an unknown name (with the nearest known one), for a model without a tokenizer or a task
    without the path it needs; `DataError` for data that are missing, malformed or empty.
    """
    task = find_task(task) if isinstance(task, str) else task
    if subject.tokenizer is None:
        raise ConfigError(f"task '{task.name}': the model comes without a tokenizer")
    where = None if path is None else str(path)
    examples = list(task.load(where))
    shots: list[Any] = []
    if config.num_shots:
        shots = list(task.load_shots(where) if task.load_shots else examples)[: config.num_shots]
        if len(shots) < config.num_shots:
            raise ConfigError(f"evaluation.num_shots is {config.num_shots}; task '{task.name}' has {len(shots)}")
        if task.load_shots is None:
            examples = examples[config.num_shots :]
    examples = examples[: config.limit]
    if not examples:
        raise DataError(f"task '{task.name}' has no examples to evaluate")
    if shots:
        examples = [task.method.with_shots(example, shots) for example in examples]
    metrics, records = task.method.evaluate(subject, examples, config, progress)
    return TaskResult(task.name, metrics, tuple(records))


def register(task: Task) -> Task:
    """Makes a task known by its name. Raises `ConfigError` for a name that is taken."""
    if task.name in _TASKS:
        raise ConfigError(f"there is a task '{task.name}' already")
    _TASKS[task.name] = task
    return task


def find_task(name: str) -> Task:
    """The task of this name. Raises `ConfigError` with the nearest one."""
    if name not in _TASKS:
        raise ConfigError(f"no task '{name}': {nearest(name, _TASKS)}")
    return _TASKS[name]


def task_names() -> list[str]:
    """Every name that `evaluate_task` knows."""
    return sorted(_TASKS)


def read_questions(path: str | None) -> list[Question]:
    """Questions from a `.jsonl` file with `question`, `choices` and `answer` a line (see `question_from_record`).

    Raises `DataError` that names the file and line.
    """
    file = Path(_needed(path, "multiple_choice", "a .jsonl file"))
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    questions = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: malformed JSON at column {error.colno}: {error.msg}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object, got {type(record).__name__}")
        questions.append(question_from_record(record, where))
    return questions


def read_texts(path: str | None) -> list[str]:
    """Texts of anything that `jaxlm.data.sources.read_documents` reads; empty ones are left out."""
    documents = read_documents(_needed(path, "perplexity", "a text file, a folder or a glob"))
    return [document.text for document in documents if document.text]


def _needed(path: str | None, task: str, what: str) -> str:
    if path is None:
        raise ConfigError(f"task '{task}' reads {what}: give its path")
    return path


def _scoring_options(config: EvaluationConfig, progress: Any) -> dict[str, Any]:
    return {"batch_size": config.batch_size, "max_length": config.max_length, "progress": progress}


_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("multiple_choice", read_questions, MultipleChoice()),
        Task("perplexity", read_texts, Perplexity()),
    )
}
