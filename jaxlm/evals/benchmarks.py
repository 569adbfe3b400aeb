"""Tasks on published data: GSM8K, MGSM, HumanEval, HumanEvalPack, XQuAD, WikiText-2, CLINC150, BANKING77.

The loaders of `jaxlm.data.benchmarks` read the publishers' files from a folder (the task's path, or `JAXLM_DATA`).
Prompts, stop strings and filters are, word for word, those of EleutherAI's lm-evaluation-harness 0.4.13 (for
HumanEvalPack of the bigcode-evaluation-harness, its prompt "instruct"), with these differences: solved examples are
the first of the training split and not drawn from it; generated code is run in the sandbox of
`jaxlm.verify.sandbox`, after 512 new tokens at most (1,024 there); answers on XQuAD are compared as MLQA's evaluation
compares them; and WikiText-2 is the version with `<unk>`. The two of intents have no counterpart there.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence

from jaxlm.core.errors import DataError
from jaxlm.data import benchmarks as data
from jaxlm.data.benchmarks import CodeProblem, PackProblem
from jaxlm.decoding import GenerationConfig
from jaxlm.evals import stats
from jaxlm.evals.generation import Judge, Problem, Solved, Verdict, exact_match, match_metrics
from jaxlm.evals.methods import Generation, MultipleChoice, Passage, Perplexity, Task
from jaxlm.evals.multiple_choice import Question
from jaxlm.evals.stats import Estimate
from jaxlm.verify import answers
from jaxlm.verify.code import HUMANEVAL_STOPS, humaneval_job, pass_at_k
from jaxlm.verify.sandbox import Limits, run_many

PASS_KS = (1, 2, 5, 10, 20, 50, 100)
"""The k of pass@k that are measured, as far as there are samples."""

# What ends a turn of chat models whose tokenizer spells it as text.
_TURN_ENDS = ("</s>", "<|im_end|>")


def _greedy(max_new_tokens: int, *stop: str) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=max_new_tokens, temperature=0, stop=stop)


# Numbers: GSM8K and MGSM


def number_metrics(strict: Callable[[str], str | None]) -> Callable[[Sequence[Solved]], dict[str, Estimate]]:
    """`strict_match`: the answer is right and announced as `strict` finds it; `flexible_extract`: the last number is.

    `answered`: the share of completions with a number.
    """

    def metrics(solved: Sequence[Solved]) -> dict[str, Estimate]:
        shares = [
            sum(answers.gsm8k_match(strict(text), s.problem.reference) for text in s.completions) / len(s.completions)
            for s in solved
        ]
        found = match_metrics(solved)
        return {
            "strict_match": stats.mean(shares),
            "flexible_extract": found["exact_match"],
            "answered": found["answered"],
        }

    return metrics


def _gsm8k(split: str, folder: str | None) -> list[Problem]:
    return [Problem(f"Question: {p.question}\nAnswer:", p.solution) for p in data.gsm8k(split, folder)]


_NUMBERS: Judge = exact_match(answers.gsm8k_flexible, answers.gsm8k_match)

GSM8K = Task(
    "gsm8k",
    functools.partial(_gsm8k, "test"),
    Generation(_greedy(256, "Question:", *_TURN_ENDS), _NUMBERS, number_metrics(answers.gsm8k_strict)),
    functools.partial(_gsm8k, "train"),
    num_shots=5,
)

# Slips in spelling are the harness's own, and stay: prompts have to be the same to compare.
_MGSM_WORDS = {
    "bn": ("প্রশ্ন:", "ধাপে ধাপে উত্তর:"),
    "de": ("Frage:", "Schritt-für-Schritt-Antwort:"),
    "en": ("Question:", "Step-by-Step Answer:"),
    "es": ("Pregunta:", "Respuesta paso a paso:"),
    "fr": ("Question :", "Réponse étape par étape :"),
    "ja": ("問題：", "ステップごとの答え:"),
    "ru": ("Задача:", "Пошаговоерешение:"),
    "sw": ("Swali:", "Jibu la Hatua kwa Hatua:"),
    "te": ("ప్రశ్న:", "దశలవారీగా సమాధానం:"),
    "th": ("โจทย์:", "คำตอบทีละขั้นตอน:"),
    "zh": ("问题：", "逐步解答:"),
}


def mgsm_announced(number: str, language: str) -> str:
    """An answer as the strict filter wants it: what solved examples show, as the data have no solutions."""
    announcement = answers.MGSM_ANNOUNCEMENTS["en" if language == "bn" else language]
    return {"ja": f"{announcement}{number}です。", "zh": f"{announcement} {number}。"}.get(
        language, f"{announcement} {number}."
    )


def _mgsm(language: str) -> Task:
    """The harness's `mgsm_native_cot_<language>` without its eight worked examples, which are not in the data."""
    ask, answer = _MGSM_WORDS[language]

    def load(folder: str | None) -> list[Problem]:
        return [Problem(f"{ask} {p.question}\n{answer}", p.answer) for p in data.mgsm(language, folder)]

    strict = functools.partial(answers.mgsm_strict, language=language)
    show = functools.partial(mgsm_announced, language=language)
    generation = _greedy(256, ask, *_TURN_ENDS)
    return Task(f"mgsm_{language}", load, Generation(generation, _NUMBERS, number_metrics(strict), show=show))


# Code: HumanEval and HumanEvalPack


def run_code(finish: Callable[[str], str] = str, limits: Limits | None = None) -> Judge:
    """A judge that runs `finish(completion)` in its problem (the reference, a `CodeProblem`) against the tests.

    A verdict's answer says how the program fared; none where the tests or the sandbox failed, not the program.
    """

    def judge(pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        jobs = [humaneval_job(problem.reference, finish(completion)) for problem, completion in pairs]
        return [
            Verdict(v.passed, None if v.status == "error" else f"{v.status}: {v.detail}".rstrip(": "))
            for v in run_many(jobs, limits=limits)
        ]

    return judge


def pass_metrics(solved: Sequence[Solved]) -> dict[str, Estimate]:
    """`pass@k` for each of `PASS_KS` that the samples suffice for; `judged`: the share of programs with a verdict."""
    n = len(solved[0].completions)
    counts = [sum(verdict.is_right for verdict in s.verdicts) for s in solved]
    metrics = {f"pass@{k}": stats.mean([pass_at_k(n, c, k) for c in counts]) for k in PASS_KS if k <= n}
    return {**metrics, "judged": match_metrics(solved)["answered"]}


def _code(name: str, make: Callable[[str | None], list[Problem]], judge: Judge) -> Task:
    return Task(name, make, Generation(_greedy(512, *HUMANEVAL_STOPS), judge, pass_metrics, show=None))


def _humaneval(folder: str | None) -> list[Problem]:
    return [Problem(p.prompt, p) for p in data.humaneval(folder)]


def _humaneval_instruct(folder: str | None) -> list[Problem]:
    ask = "Write a solution to the following problem and make sure that it passes the tests:"
    return [
        Problem(f"{ask}\n```python\n{p.prompt}\n```\n", p, f"Here is the completed function:\n```python\n{p.prompt}\n")
        for p in data.humaneval(folder)
    ]


def before_fence(completion: str) -> str:
    """The part of a reply that goes on in a fenced block, up to the fence that ends it."""
    return completion.partition("```")[0]


def indented(completion: str) -> str:
    """The body of a function: the lines before the first that is neither blank nor indented."""
    return re.split(r"(?m)^(?=\S)", completion.rstrip(), maxsplit=1)[0]


# Before each program of HumanEvalPack; NumPy, which the harness imports too, is not in the sandbox.
_IMPORTS = """\
import math, re, sys, copy, datetime, itertools, collections, heapq, statistics, functools, hashlib, string
from typing import *
from collections import *
"""


def _pack(make: Callable[[PackProblem], tuple[str, str]]) -> Callable[[str | None], list[Problem]]:
    """Problems from `make`'s instruction and the beginning of the function, as the reply begins and the program too.

    The line break after that beginning is the model's to write.
    """

    def problem(p: PackProblem) -> Problem:
        instruction, base = make(p)
        program: CodeProblem = dataclasses.replace(p, prompt=_IMPORTS + base.rstrip())
        return Problem(f"{instruction.lstrip()}\n\n", program, base.rstrip())

    return lambda folder: [problem(p) for p in data.humanevalpack(folder)]


def _synthesize(p: PackProblem) -> tuple[str, str]:
    return p.instruction.strip(), p.prompt


def _fix_tests(p: PackProblem) -> tuple[str, str]:
    return f"{p.declaration}{p.buggy_solution}\n{p.test}\nFix bugs in {p.entry_point}.", p.declaration


def _fix_docs(p: PackProblem) -> tuple[str, str]:
    return f"{p.prompt}{p.buggy_solution}\nFix bugs in {p.entry_point}.", p.prompt


# Reading: XQuAD

_XQUAD_WORDS = {
    "ar": ("سيا", "سؤال", "إجابة"),
    "de": ("Kontext", "Frage", "Antwort"),
    "el": ("Συμφραζόμενα", "Ερώτηση", "Απάντηση"),
    "en": ("Context", "Question", "Answer"),
    "es": ("Contexto", "Pregunta", "Respuesta"),
    "hi": ("प्रसंग", "सवाल", "उत्तर"),
    "ro": ("Context", "Întrebare", "Răspuns"),
    "ru": ("Контекст", "Вопрос", "Ответ"),
    "th": ("บริบท", "คำถาม", "คำตอบ"),
    "tr": ("Bağlam", "Soru", "Cevap"),
    "vi": ("Bối cảnh", "Câu hỏi", "Trả lời"),
    "zh": ("语境", "问题", "回答"),
}


def _xquad(language: str) -> Task:
    """The reference of a problem is the texts of its answers; metrics are `exact_match` and `f1`."""
    context, question, answer = _XQUAD_WORDS[language]

    def load(folder: str | None) -> list[Problem]:
        return [
            Problem(f"{context}: {q.context}\n\n{question}: {q.question}\n\n{answer}:", q.answers)
            for q in data.xquad(language, folder)
        ]

    def judge(pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        return [
            Verdict(answers.exact_match(text, problem.reference, language) == 1, text.strip() or None)
            for problem, text in pairs
        ]

    def metrics(solved: Sequence[Solved]) -> dict[str, Estimate]:
        scores = [[answers.f1(text, s.problem.reference, language) for text in s.completions] for s in solved]
        f1 = stats.mean([sum(found) / len(found) for found in scores])
        return {"exact_match": match_metrics(solved)["exact_match"], "f1": f1}

    return Task(f"xquad_{language}", load, Generation(_greedy(256, "\n"), judge, metrics, show=lambda texts: texts[0]))


# Texts: WikiText-2

_REPLACED = [
    (re.escape(old), new)
    for old, new in (
        ("s '", "s'"),
        (" @-@ ", "-"),
        (" @,@ ", ","),
        (" @.@ ", "."),
        *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    )
] + [
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def detokenized(text: str) -> str:
    """An article of WikiText without the spaces around marks: as the harness gives it to a model."""
    for pattern, replacement in _REPLACED:
        text = re.sub(pattern, replacement, text)
    return text


def _wikitext(folder: str | None) -> list[Passage]:
    """Counted as the harness counts: the article's own words and bytes, before it is detokenized."""
    texts = [article.text for article in data.wikitext2("test", folder)]
    return [Passage(detokenized(text), len(re.split(r"\s+", text)), len(text.encode())) for text in texts]


# Intents: CLINC150 and BANKING77

Load = Callable[[str, str | None], list[data.Utterance]]


def _intents(name: str, load: Load) -> Task:
    """Which of all intents of the training split a model finds likeliest; solved examples have different ones."""

    def questions(split: str, folder: str | None) -> list[Question]:
        names = sorted({u.intent for u in load("train", folder)})
        if len(names) < 2:
            raise DataError(f"task '{name}': {len(names)} intents in the training split, expected at least 2")
        choices, index = tuple(intent.replace("_", " ") for intent in names), {n: i for i, n in enumerate(names)}
        utterances = load(split, folder)
        if unknown := sorted({u.intent for u in utterances} - set(names)):
            raise DataError(f"task '{name}': intents of split {split} that the training split has not: {unknown[:5]}")
        return [Question(f"Request: {u.text}\nIntent:", choices, index[u.intent]) for u in utterances]

    def shots(folder: str | None) -> list[Question]:
        found, seen, turns = questions("train", folder), Counter[int](), []
        for question in found:
            turns.append(seen[question.answer])
            seen[question.answer] += 1
        return [found[i] for i in sorted(range(len(found)), key=turns.__getitem__)]

    normalizations = ("none", "characters", "tokens", "unconditional")
    return Task(name, functools.partial(questions, "test"), MultipleChoice(normalizations), shots)


BENCHMARKS: tuple[Task, ...] = (
    GSM8K,
    *map(_mgsm, _MGSM_WORDS),
    _code("humaneval", _humaneval, run_code()),
    _code("humaneval_instruct", _humaneval_instruct, run_code(before_fence)),
    _code("humanevalpack_synthesize", _pack(_synthesize), run_code(indented, Limits(seconds=10))),
    _code("humanevalpack_fix_tests", _pack(_fix_tests), run_code(indented, Limits(seconds=10))),
    _code("humanevalpack_fix_docs", _pack(_fix_docs), run_code(indented, Limits(seconds=10))),
    *map(_xquad, _XQUAD_WORDS),
    Task("wikitext", _wikitext, Perplexity()),
    _intents("clinc150", data.clinc150),
    _intents("banking77", data.banking77),
)
