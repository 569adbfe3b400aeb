"""Problems that a model solves in words: completions are generated, and a judge says which are right.

What an answer looks like is the caller's affair: `exact_match` takes the function that finds it in a completion, and
a judge may run tests in a sandbox instead.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.decoding import DecoderStepper, GenerationConfig, Prompt, complete
from jaxlm.evals import stats
from jaxlm.evals.stats import Estimate


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt, and what a judge needs to know: the answer as text, or a record with tests.

    `reply_start`: how the reply begins, which the completion goes on from; behind the template of a chat.
    """

    prompt: str
    reference: Any
    reply_start: str = ""


class Verdict(NamedTuple):
    """Whether a completion is right, and what was taken for its answer (`None`: nothing was found)."""

    is_right: bool
    answer: str | None = None


Judge = Callable[[Sequence[tuple[Problem, str]]], Sequence[Verdict]]
"""A verdict on each (problem, completion); all at once, so that a judge may work on them in parallel."""


class Solved(NamedTuple):
    """A problem with its completions and their verdicts."""

    problem: Problem
    completions: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def share(self) -> float:
        """The share of its completions that are right."""
        return float(np.mean([verdict.is_right for verdict in self.verdicts]))


def solve(
    model: Any,
    params: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    judge: Judge,
    config: GenerationConfig,
    *,
    format_prompt: Callable[[str], Prompt] = str,
    encode: Callable[[str], Sequence[int]] | None = None,
    batch_size: int = 16,
    max_length: int | None = None,
    stop_ids: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Solved]:
    """Generates `config.num_samples` completions of each problem and has them judged.

    `format_prompt` makes the prompt that the model sees, text or ids: a chat template, say. `encode` gives the ids of
    one that is text, by default BOS and the tokenizer's. Prompts too long for `max_length` (by default the model's
    context) lose their beginning. The other options are those of `complete`.
    Raises `DataError` when the judge does not give a verdict on each completion.
    """
    found = complete(
        DecoderStepper(model),
        params,
        tokenizer,
        [_prompt(problem, tokenizer, format_prompt, encode) for problem in problems],
        config,
        batch_size=batch_size,
        max_length=model.config.max_length if max_length is None else max_length,
        stop_ids=stop_ids,
        progress=progress,
    )
    texts = [tuple(completion.text for completion in completions) for completions in found]
    pairs = [(problem, text) for problem, group in zip(problems, texts) for text in group]
    verdicts = list(judge(pairs))
    if len(verdicts) != len(pairs):
        raise DataError(f"{len(verdicts)} verdicts on {len(pairs)} completions, expected one each")
    n = config.num_samples
    return [
        Solved(problem, group, tuple(verdicts[i * n : (i + 1) * n]))
        for i, (problem, group) in enumerate(zip(problems, texts))
    ]


def exact_match(
    extract: Callable[[str], str | None],
    matches: Callable[[str, str], bool] = lambda answer, reference: answer == reference,
) -> Judge:
    """A judge that compares what `extract` finds in a completion with the problem's reference (a text).

    A completion in which nothing is found is wrong.
    """

    def judge(pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        verdicts = []
        for problem, completion in pairs:
            answer = extract(completion)
            verdicts.append(Verdict(answer is not None and bool(matches(answer, problem.reference)), answer))
        return verdicts

    return judge


def few_shot_prompt(
    examples: Sequence[tuple[str, str]], prompt: str, *, delimiter: str = " ", separator: str = "\n\n"
) -> str:
    """Solved examples, each `prompt + delimiter + answer`, then the prompt to be continued."""
    return separator.join([*(question + delimiter + answer for question, answer in examples), prompt])


def match_metrics(solved: Sequence[Solved]) -> dict[str, Estimate]:
    """`exact_match`: the mean over problems of the share of right completions.

    `answered`: the share of completions in which the judge found an answer at all.
    """
    answered = [np.mean([v.is_right or v.answer is not None for v in s.verdicts]) for s in solved]
    return {"exact_match": stats.mean([s.share for s in solved]), "answered": stats.mean(answered)}


def check_greedy(config: GenerationConfig) -> None:
    """Raises `ConfigError` for several samples of a problem that would all be the same one."""
    if config.num_samples > 1 and config.temperature == 0:
        raise ConfigError(f"generation.num_samples is {config.num_samples} at temperature 0: all would be equal")


def _prompt(
    problem: Problem,
    tokenizer: Any,
    format_prompt: Callable[[str], Prompt],
    encode: Callable[[str], Sequence[int]] | None,
) -> Prompt:
    prompt = format_prompt(problem.prompt)
    if not isinstance(prompt, str):
        return [*prompt, *tokenizer.encode(problem.reply_start)]
    prompt += problem.reply_start
    return encode(prompt) if encode else prompt
