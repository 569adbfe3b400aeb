"""Scoring of generated code: HumanEval and its kin in the sandbox, pass@k, and the code in a model's reply.

Sources: Chen et al. 2021 (arXiv 2107.03374) for HumanEval and the estimator of pass@k, Bavarian et al. 2022
(arXiv 2207.14255) for infilling, Muennighoff et al. 2023 (arXiv 2308.07124) for HumanEvalPack.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from jaxlm.core.errors import ConfigError
from jaxlm.verify.sandbox import Job, Limits, Verdict, run, run_many

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\nassert")


class CodeProblem(Protocol):
    """A problem to complete: the text before the gap, and tests that define `check` or call it themselves."""

    prompt: str
    suffix: str
    test: str
    entry_point: str


def humaneval_job(problem: CodeProblem, completion: str) -> Job:
    """The program that a completion makes, `prompt + completion + suffix`, and its tests, for `run_many`.

    Tests that define `check` without calling it (HumanEval) get the call `check(entry_point)`; those that call it
    (HumanEvalPack) stay as they are.
    """
    tests = problem.test
    if not re.search(r"^check\(", tests, re.MULTILINE):
        tests = f"{tests}\ncheck({problem.entry_point})\n"
    return Job(problem.prompt + completion + problem.suffix, tests)


def check_humaneval(problem: CodeProblem, completion: str, *, limits: Limits | None = None) -> Verdict:
    """The verdict on one completion of a problem of HumanEval, its infilling variants, or HumanEvalPack."""
    return run(humaneval_job(problem, completion), limits=limits)


def score_completions(
    problems: Sequence[CodeProblem],
    completions: Sequence[Sequence[str]],
    *,
    ks: Iterable[int] = (1,),
    workers: int | None = None,
    limits: Limits | None = None,
) -> tuple[dict[int, float], list[list[Verdict]]]:
    """Mean pass@k over problems for each k, and every verdict as `[problem][sample]`.

    Raises:
      ConfigError: no problems, not one list of completions for each, or a problem with fewer than k of them.
    """
    if not problems or len(problems) != len(completions):
        raise ConfigError(f"{len(completions)} lists of completions for {len(problems)} problems, expected one each")
    ks = tuple(ks)
    for index, samples in enumerate(completions):
        for k in ks:
            if not 1 <= k <= len(samples):
                raise ConfigError(f"pass@{k} of problem {index}, which has {len(samples)} completions")
    jobs = [humaneval_job(p, c) for p, samples in zip(problems, completions) for c in samples]
    flat = iter(run_many(jobs, workers=workers, limits=limits))
    verdicts = [[next(flat) for _ in samples] for samples in completions]
    counts = [(len(found), sum(v.passed for v in found)) for found in verdicts]
    return {k: float(np.mean([pass_at_k(n, c, k) for n, c in counts])) for k in ks}, verdicts


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate, from n samples of which c passed, that one of k samples passes.

    `1 - C(n - c, k) / C(n, k)`, as a product that does not overflow (Chen et al. 2021, figure 3).

    Raises:
      ConfigError: not `0 <= c <= n` and `1 <= k <= n`.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ConfigError(f"pass@k of n={n} samples, c={c} of them passed, k={k}: expected 0 <= c <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def extract_code(text: str, stops: Sequence[str] = ()) -> str:
    """The code in a model's reply: its first fenced block that is Python's or unlabelled, else the text up to the
    first of the stop strings. A fence that is never closed reaches to the end."""
    for match in re.finditer(r"(?ms)^ {0,3}```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^ {0,3}```|\Z)", text):
        if match[1].lower() in ("", "python", "python3", "py"):
            return match[2]
    return truncate(text, stops)


def truncate(text: str, stops: Sequence[str]) -> str:
    """The text before the earliest of the stop strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
