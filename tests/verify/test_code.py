"""Scores of code: the estimator against its definition, HumanEval's own solutions, code in replies."""

import dataclasses
import itertools
import os

import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.data import benchmarks
from jaxlm.data.benchmarks import CodeProblem
from jaxlm.verify.code import (
    HUMANEVAL_STOPS,
    check_humaneval,
    extract_code,
    humaneval_job,
    pass_at_k,
    score_completions,
    truncate,
)
from jaxlm.verify.sandbox import Limits, run_many

LIMITS = Limits(seconds=20)
PROBLEM = CodeProblem(
    task_id="Invented/0",
    prompt='def helper(n):\n    return n + 1\n\ndef count(items):\n    """How many items there are."""\n',
    suffix="",
    canonical_solution="    return len(items)\n",
    test="def check(candidate):\n    for n in range(5):\n        assert candidate(list(range(n))) == helper(n) - 1\n",
    entry_point="count",
)


def test_pass_at_k_on_known_values():
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(10, 3, 5) == pytest.approx(0.9166667)
    assert pass_at_k(200, 5, 10) == pytest.approx(0.2282845)
    assert pass_at_k(7, 7, 3) == pass_at_k(7, 5, 3) == 1.0
    assert pass_at_k(7, 0, 3) == 0.0


def test_pass_at_k_is_the_share_of_subsets_with_a_pass():
    for n, c, k in itertools.product(range(1, 7), range(7), range(1, 7)):
        if c <= n and k <= n:
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))
    for n, c, k in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(ConfigError, match="expected 0 <= c <= n"):
            pass_at_k(n, c, k)


def test_completions_of_a_problem():
    assert check_humaneval(PROBLEM, PROBLEM.canonical_solution, limits=LIMITS).passed
    assert check_humaneval(PROBLEM, "    return 0\n", limits=LIMITS).status == "failed"
    gap = dataclasses.replace(PROBLEM, prompt=PROBLEM.prompt + "    n = ", suffix="\n    return n\n")
    assert check_humaneval(gap, "len(items)", limits=LIMITS).passed
    calling = dataclasses.replace(PROBLEM, test=PROBLEM.test + "\ncheck(count)")
    assert humaneval_job(calling, "").tests.count("\ncheck(") == 1


def test_mean_pass_at_k():
    right, wrong = PROBLEM.canonical_solution, "    return -1\n"
    scores, verdicts = score_completions(
        [PROBLEM, PROBLEM], [[right, wrong], [wrong, wrong]], ks=(1, 2), workers=2, limits=LIMITS
    )
    assert scores == {1: pytest.approx(0.25), 2: pytest.approx(0.5)}
    assert [[v.passed for v in found] for found in verdicts] == [[True, False], [False, False]]
    with pytest.raises(ConfigError, match="pass@2 of problem 0, which has 1"):
        score_completions([PROBLEM], [[right]], ks=(2,))
    with pytest.raises(ConfigError, match="0 lists of completions for 1 problems"):
        score_completions([PROBLEM], [])


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nand\n```python\ny\n```", "x = 1\n"),
        ("```bash\npip\n```\n```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = '```'\n", "x = '```'\n"),
        ("    return 1\n\ndef other(): pass", "    return 1\n"),
        ("    return 1", "    return 1"),
    ],
)
def test_code_in_replies(text, code):
    assert extract_code(text, HUMANEVAL_STOPS) == code


def test_truncation_at_the_earliest_stop():
    assert truncate("a\n#b\ndef c", ("\ndef", "\n#")) == "a"
    assert truncate("a", ("\n",)) == "a"


needs_data = pytest.mark.skipif("JAXLM_DATA" not in os.environ, reason="JAXLM_DATA names no folder of benchmark files")


def failures(problems, completions, limits=LIMITS):
    verdicts = run_many([humaneval_job(p, c) for p, c in zip(problems, completions)], limits=limits)
    return {p.task_id: v for p, v in zip(problems, verdicts) if not v.passed}


@needs_data
@pytest.mark.slow
def test_all_canonical_solutions_pass_and_empty_ones_fail():
    problems = benchmarks.humaneval()
    assert len(problems) == 164
    assert failures(problems, [p.canonical_solution for p in problems]) == {}
    assert len(failures(problems[:20], ["    pass\n"] * 20)) == 20


@needs_data
@pytest.mark.slow
def test_canonical_solutions_of_infilling_and_of_the_pack_pass_and_bugs_fail():
    light = benchmarks.humaneval_infilling("RandomSpanLight")[::4]
    assert failures(light, [p.canonical_solution for p in light]) == {}
    pack = benchmarks.humanevalpack()[::4]
    assert failures(pack, [p.canonical_solution for p in pack]) == {}
    assert len(failures(pack, [p.buggy_solution for p in pack], Limits(seconds=2))) == len(pack)
