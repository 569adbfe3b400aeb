"""What a task is made of: examples, and a method that evaluates a model on them.

`MultipleChoice` scores `Question`s, `Generation` has `Problem`s solved, `Perplexity` predicts texts. Tasks by name,
and what runs them, are in `jaxlm.evals.tasks`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding import GenerationConfig, Prompt
from jaxlm.evals import stats
from jaxlm.evals.generation import Judge, Problem, Solved, check_greedy, few_shot_prompt, match_metrics, solve
from jaxlm.evals.multiple_choice import Question, check_normalizations, choice_metrics, few_shot, score_questions
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

    @property
    def add_bos(self) -> bool:
        """Whether the model expects BOS before a text."""
        ...


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How to run a task."""

    batch_size: int = 16
    """Rows that go through the model at once."""
    max_length: int | None = None
    """Tokens of context; by default the model's."""
    add_bos: bool | None = None
    """Begin contexts and prompts that are text with the BOS id; by default as the model expects it."""
    num_shots: int | None = None
    """Solved examples before each question or problem; by default as many as the task is usually run with."""
    limit: int | None = None
    """Use the first so many examples only."""

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("max_length", 1), ("num_shots", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"evaluation.{name} is {value}, expected at least {least}")


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
            _encoding(subject, config),
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
    `show` is a problem's reference as solved examples show it, `None` where they cannot be shown. Prompts that are
    text are encoded as contexts to score are.
    """

    generation: GenerationConfig
    judge: Judge
    metrics: Callable[[Sequence[Solved]], Mapping[str, Estimate]] = match_metrics
    format_prompt: Callable[[str], Prompt] = str
    show: Callable[[Any], str] | None = str

    def __post_init__(self):
        check_greedy(self.generation)

    def with_shots(self, example: Problem, shots: Sequence[Problem]) -> Problem:
        if self.show is None:
            raise ConfigError("evaluation.num_shots: these problems are given without solved examples, expected 0")
        solved = [(shot.prompt, self.show(shot.reference)) for shot in shots]
        return dataclasses.replace(example, prompt=few_shot_prompt(solved, example.prompt))

    def evaluate(self, subject: Subject, examples: Sequence[Problem], config: EvaluationConfig, progress=None):
        encoding = _encoding(subject, config)
        solved = solve(
            subject.model,
            subject.params,
            subject.tokenizer,
            examples,
            self.judge,
            self.generation,
            format_prompt=self.format_prompt,
            encode=lambda text: encoding.encode(text) or [encoding.prefix],
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
class Passage:
    """A text to predict, and the words and bytes to count it as: those of the original that it was made from."""

    text: str
    num_words: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well texts (or `Passage`s) are predicted: each token once, windows of the model's context, documents apart.

    Metrics are those of the harness, weighted by the corpus and not means over documents: `word_perplexity`,
    `byte_perplexity`, `bits_per_byte`; and `token_perplexity`, which depends on the tokenizer. Errors are
    bootstrapped over documents.
    """

    resamples: int = 1000

    def with_shots(self, example: str | Passage, shots: Sequence[str | Passage]) -> str | Passage:
        raise ConfigError("evaluation.num_shots: texts are predicted without solved examples, expected 0")

    def evaluate(self, subject: Subject, examples: Sequence[str | Passage], config: EvaluationConfig, progress=None):
        scores = score_texts(
            subject.model,
            subject.params,
            _encoding(subject, config),
            [example.text if isinstance(example, Passage) else example for example in examples],
            **_scoring_options(config, progress),
        )
        scores = [
            s._replace(num_words=e.num_words, num_bytes=e.num_bytes) if isinstance(e, Passage) else s
            for s, e in zip(scores, examples)
        ]
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
    which are then not evaluated. `num_shots`: how many of them are usual. `reads`: what kind of path the user has to
    give; the path of other tasks is the folder of benchmark files, and may be left out.
    """

    name: str
    load: Callable[[str | None], Sequence[Any]]
    method: Method
    load_shots: Callable[[str | None], Sequence[Any]] | None = None
    num_shots: int = 0
    reads: str | None = None


def _encoding(subject: Subject, config: EvaluationConfig) -> TokenizerEncoding:
    return TokenizerEncoding(subject.tokenizer, subject.add_bos if config.add_bos is None else config.add_bos)


def _scoring_options(config: EvaluationConfig, progress: Any) -> dict[str, Any]:
    return {"batch_size": config.batch_size, "max_length": config.max_length, "progress": progress}
