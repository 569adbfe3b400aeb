"""Named evaluations, and what runs one on a model.

    result = evaluate_task("multiple_choice", subject, path="questions.jsonl")
    result.metrics["acc_norm"]         # Estimate(value, error)

A task is a loader and a method; `jaxlm.evals.benchmarks` has those of published data. One more joins with a few lines:

    register(Task(
        "sums",
        lambda path: [Problem(f"Question: {r.question}\\nAnswer:", r.answer) for r in read_sums(path)],
        Generation(GenerationConfig(max_new_tokens=256, temperature=0, stop=("Question:",)), exact_match(last_number)),
    ))
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxlm.core.errors import ConfigError, DataError, nearest
from jaxlm.data.sources import read_documents
from jaxlm.decoding import Prompt
from jaxlm.evals.benchmarks import BENCHMARKS
from jaxlm.evals.methods import EvaluationConfig, Generation, MultipleChoice, Perplexity, Subject, Task
from jaxlm.evals.multiple_choice import Question, question_from_record
from jaxlm.evals.stats import Estimate

_DEFAULTS = EvaluationConfig()


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


def evaluate_task(
    task: Task | str,
    subject: Subject,
    *,
    path: str | Path | None = None,
    config: EvaluationConfig = _DEFAULTS,
    progress: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Runs a task, given by itself or by name, on a model: `prepare_task`, then `PreparedTask.evaluate`.

    Raises `ConfigError` for an unknown name (with the nearest known one), for a model without a tokenizer or a task
    without the path it needs; `DataError` for data that are missing, malformed or empty.
    """
    task = find_task(task) if isinstance(task, str) else task
    _check_tokenizer(task, subject)
    return prepare_task(task, path=path, config=config).evaluate(subject, progress)


def prepare_task(
    task: Task | str, *, path: str | Path | None = None, config: EvaluationConfig = _DEFAULTS
) -> "PreparedTask":
    """The examples of a task, read and checked, solved ones before each: all that needs no model.

    Raises `ConfigError` and `DataError` as `evaluate_task` does.
    """
    task = find_task(task) if isinstance(task, str) else task
    if task.reads and path is None:
        raise ConfigError(f"task '{task.name}' reads {task.reads}: give its path")
    where = None if path is None else str(path)
    examples = list(task.load(where))
    num_shots = task.num_shots if config.num_shots is None else config.num_shots
    shots: list[Any] = []
    if num_shots:
        shots = list(task.load_shots(where) if task.load_shots else examples)[:num_shots]
        if len(shots) < num_shots:
            raise ConfigError(f"evaluation.num_shots is {num_shots}; task '{task.name}' has {len(shots)}")
        if task.load_shots is None:
            examples = examples[num_shots:]
    examples = examples[: config.limit]
    if not examples:
        raise DataError(f"task '{task.name}' has no examples to evaluate")
    if shots:
        examples = [task.method.with_shots(example, shots) for example in examples]
    return PreparedTask(task, tuple(examples), config)


@dataclasses.dataclass(frozen=True)
class PreparedTask:
    """A task with its examples in memory."""

    task: Task
    examples: tuple[Any, ...]
    config: EvaluationConfig

    def check(self, subject: Subject) -> None:
        """Raises `ConfigError` for a model without a tokenizer, or with a context too short for the completions."""
        _check_tokenizer(self.task, subject)
        method, context = self.task.method, self.config.max_length or subject.model.config.max_length
        if isinstance(method, Generation) and method.generation.max_new_tokens >= context:
            raise ConfigError(
                f"task '{self.task.name}': generation.max_new_tokens is {method.generation.max_new_tokens}, "
                f"expected less than the context of {context}"
            )

    def evaluate(self, subject: Subject, progress: Callable[[int, int], None] | None = None) -> TaskResult:
        """Metrics and records; `progress` is called with what is done and all there is to do."""
        self.check(subject)
        metrics, records = self.task.method.evaluate(subject, self.examples, self.config, progress)
        return TaskResult(self.task.name, metrics, tuple(records))


def adapt(task: Task, format_prompt: Callable[[str], Prompt] | None = None, **generation: Any) -> Task:
    """A task that generates with another format of prompts, or other fields of `GenerationConfig`; others as they are.

    Raises `ConfigError` for settings that cannot work.
    """
    if not isinstance(task.method, Generation):
        return task
    method = dataclasses.replace(
        task.method,
        generation=dataclasses.replace(task.method.generation, **generation),
        format_prompt=format_prompt or task.method.format_prompt,
    )
    return dataclasses.replace(task, method=method)


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


def read_questions(path: str) -> list[Question]:
    """Questions from a `.jsonl` file with `question`, `choices` and `answer` a line (see `question_from_record`).

    Raises `DataError` that names the file and line.
    """
    file = Path(path)
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
        except (ValueError, RecursionError) as error:
            at = f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else f": {error}"
            raise DataError(f"{where}: malformed JSON{at}") from error
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected an object, got {type(record).__name__}")
        questions.append(question_from_record(record, where))
    return questions


def read_texts(path: str) -> list[str]:
    """Texts of anything that `jaxlm.data.sources.read_documents` reads; empty ones are left out."""
    return [document.text for document in read_documents(path) if document.text]


def _check_tokenizer(task: Task, subject: Subject) -> None:
    if subject.tokenizer is None:
        raise ConfigError(f"task '{task.name}': the model comes without a tokenizer")


_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("multiple_choice", read_questions, MultipleChoice(), reads="a .jsonl file"),
        Task("perplexity", read_texts, Perplexity(), reads="a text file, a folder or a glob"),
        *BENCHMARKS,
    )
}
