"""Loaders of small public benchmarks, in their publishers' own formats, from a folder on disk.

The folder is an argument or the environment variable `JAXLM_DATA`. Nothing is downloaded: a file that is missing is a
`DataError` that names the publisher's repository, the file there, and the place where it is looked for. Each file may
be gzipped (`.gz` after its name).
"""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxlm.core.errors import ConfigError, DataError, nearest

MGSM_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
XQUAD_LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
INFILLING_KINDS = ("SingleLine", "MultiLine", "RandomSpan", "RandomSpanLight")


@dataclass(frozen=True)
class MathProblem:
    """A word problem with its number, without grouping commas; `solution` is empty where none is published."""

    question: str
    answer: str
    solution: str = ""
    language: str = "en"


@dataclass(frozen=True)
class CodeProblem:
    """A program with a gap between `prompt` and `suffix`, the text that belongs there, and its tests."""

    task_id: str
    prompt: str
    suffix: str
    canonical_solution: str
    test: str
    entry_point: str


@dataclass(frozen=True)
class PackProblem(CodeProblem):
    """A problem of HumanEvalPack: completing (as `CodeProblem`), fixing `buggy_solution`, explaining.

    The whole function is `declaration + canonical_solution`, the faulty one `declaration + buggy_solution`.
    """

    declaration: str
    buggy_solution: str
    bug_type: str
    failure_symptoms: str
    docstring: str
    signature: str
    instruction: str
    example_test: str


@dataclass(frozen=True)
class ReadingQuestion:
    """A question on a paragraph; each answer is a span: `context[start : start + len(text)] == text`."""

    id: str
    title: str
    context: str
    question: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]
    language: str


@dataclass(frozen=True)
class Article:
    """An article of WikiText as published: tokens separated by spaces, rare ones `<unk>`, headings between `=`.

    The texts of all articles of a split, joined, are the file.
    """

    title: str
    text: str


@dataclass(frozen=True)
class Utterance:
    """A request to an assistant and its intent; `oos` in CLINC150 is out of scope."""

    text: str
    intent: str


def gsm8k(split: str = "test", folder: str | Path | None = None) -> list[MathProblem]:
    """GSM8K (Cobbe et al. 2021, arXiv 2110.14168): 7,473 problems of split "train", 1,319 of "test"."""
    _require(split, ("train", "test"), "split of GSM8K")
    source = "github.com/openai/grade-school-math", f"grade_school_math/data/{split}.jsonl"
    problems = []
    for where, row in _json_lines(_find(f"gsm8k/{split}.jsonl", source, folder)):
        question, solution = _texts(row, ("question", "answer"), where)
        answer = _number(solution.rpartition("#### ")[2] if "#### " in solution else "", where)
        problems.append(MathProblem(question, answer, solution))
    return problems


def mgsm(language: str, folder: str | Path | None = None) -> list[MathProblem]:
    """MGSM (Shi et al. 2022, arXiv 2210.03057): the same 250 problems of GSM8K in each of `MGSM_LANGUAGES`."""
    _require(language, MGSM_LANGUAGES, "language of MGSM")
    name = f"mgsm_{language}.tsv"
    file = _find(f"mgsm/{name}", ("github.com/google-research/url-nlp", f"mgsm/{name}"), folder)
    problems = []
    for where, line in _lines(file):
        fields = line.split("\t")
        if len(fields) != 2:
            raise DataError(f"{where}: {len(fields)} tab-separated fields, expected a question and an answer")
        problems.append(MathProblem(fields[0], _number(fields[1], where), language=language))
    return problems


def humaneval(folder: str | Path | None = None) -> list[CodeProblem]:
    """HumanEval (Chen et al. 2021, arXiv 2107.03374): 164 functions to complete from signature and docstring."""
    source = "github.com/openai/human-eval", "data/HumanEval.jsonl.gz"
    return _code_problems(_find("humaneval/HumanEval.jsonl", source, folder), CodeProblem)


def humaneval_infilling(kind: str = "SingleLine", folder: str | Path | None = None) -> list[CodeProblem]:
    """HumanEval with gaps (Bavarian et al. 2022, arXiv 2207.14255), of one of `INFILLING_KINDS`.

    There are 1,033 problems of SingleLine, 5,815 of MultiLine, 1,640 of RandomSpan and 164 of RandomSpanLight.
    """
    _require(kind, INFILLING_KINDS, "kind of infilling")
    name = f"HumanEval-{kind.removesuffix('Light')}Infilling{'Light' if kind.endswith('Light') else ''}.jsonl"
    source = "github.com/openai/human-eval-infilling", f"data/{name}.gz"
    return _code_problems(_find(f"humaneval/{name}", source, folder), CodeProblem)


def humanevalpack(folder: str | Path | None = None) -> list[PackProblem]:
    """HumanEvalPack's Python part (Muennighoff et al. 2023, arXiv 2308.07124): 164 problems to write, fix, explain."""
    path = "evaluation/create/humaneval-x/data/python/data/humanevalpack.jsonl"
    file = _find("humaneval/humanevalpack_python.jsonl", ("github.com/bigcode-project/octopack", path), folder)
    return _code_problems(file, PackProblem)


def xquad(language: str, folder: str | Path | None = None) -> list[ReadingQuestion]:
    """XQuAD (Artetxe et al. 2020, arXiv 1910.11856): 1,190 questions on 240 paragraphs, parallel in 12 languages."""
    _require(language, XQUAD_LANGUAGES, "language of XQuAD")
    name = f"xquad.{language}.json"
    file = _find(f"xquad/{name}", ("github.com/google-deepmind/xquad", name), folder)
    questions = []
    for a, article in enumerate(_items(_json(file), "data", str(file))):
        at = f"{file}: data[{a}]"
        for p, paragraph in enumerate(_items(article, "paragraphs", at)):
            here = f"{at}.paragraphs[{p}]"
            (context,) = _texts(paragraph, ("context",), here)
            for q, item in enumerate(_items(paragraph, "qas", here)):
                where = f"{here}.qas[{q}]"
                answers, starts = _spans(_items(item, "answers", where), context, where)
                id, question = _texts(item, ("id", "question"), where)
                title = str(article.get("title", ""))
                questions.append(ReadingQuestion(id, title, context, question, answers, starts, language))
    return questions


def wikitext2(split: str = "test", folder: str | Path | None = None) -> list[Article]:
    """WikiText-2 (Merity et al. 2017, arXiv 1609.07843), word-level: split "train", "valid" or "test"."""
    _require(split, ("train", "valid", "test"), "split of WikiText-2")
    source = "github.com/pytorch/examples", f"word_language_model/data/wikitext-2/{split}.txt"
    file = _find(f"text/wikitext2_{split}.txt", source, folder)
    text = _read(file)
    heads = list(_TITLE.finditer(text))
    if not heads:
        raise DataError(f"{file}: no line like ' = Title = ', so no article")
    ends = [head.start() for head in heads[1:]] + [len(text)]
    starts = [0, *ends[:-1]]
    return [Article(head[1].strip(), text[start:end]) for head, start, end in zip(heads, starts, ends)]


# A title has one equals sign on each side, a section two or more, and stands between empty lines.
_TITLE = re.compile(r"(?:^|(?<=\n)) ?\n = ([^=\n](?:[^\n]*[^=\n])?) = ?\n ?\n")


def clinc150(split: str = "test", folder: str | Path | None = None) -> list[Utterance]:
    """CLINC150 (Larson et al. 2019, arXiv 1909.02027), the small version: 150 intents and `oos`.

    Splits are "train" (7,500), "val" (3,000), "test" (4,500), and "oos_train" (100), "oos_val" (100), "oos_test"
    (1,000), the requests out of scope.
    """
    _require(split, tuple(f"{o}{s}" for o in ("", "oos_") for s in ("train", "val", "test")), "split of CLINC150")
    file = _find("intents/clinc150_small.json", ("github.com/clinc/oos-eval", "data/data_small.json"), folder)
    utterances = []
    for index, pair in enumerate(_items(_json(file), split, str(file))):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
            raise DataError(f"{file}: {split}[{index}] is {str(pair)[:80]}, expected a text and an intent")
        utterances.append(Utterance(*pair))
    return utterances


def banking77(split: str = "test", folder: str | Path | None = None) -> list[Utterance]:
    """BANKING77 (Casanueva et al. 2020, arXiv 2003.04807): 10,003 requests of split "train", 3,080 of "test"."""
    _require(split, ("train", "test"), "split of BANKING77")
    known = set(banking77_intents(folder))
    file = _find(f"intents/banking77_{split}.csv", (_BANKING, f"banking_data/{split}.csv"), folder)
    reader = csv.reader(io.StringIO(_read(file), newline=""), strict=True)
    utterances = []
    try:
        for row in reader:
            where = f"{file} line {reader.line_num}"
            if reader.line_num == 1 and row == ["text", "category"]:
                continue
            if len(row) != 2:
                raise DataError(f"{where}: {len(row)} columns, expected a text and a category")
            if row[1] not in known:
                raise DataError(f"{where}: unknown category '{row[1]}'")
            utterances.append(Utterance(*row))
    except csv.Error as error:
        raise DataError(f"{file} line {reader.line_num}: malformed CSV: {error}") from error
    return utterances


def banking77_intents(folder: str | Path | None = None) -> list[str]:
    """The 77 intents in the publisher's order, whose index is the label."""
    file = _find("intents/banking77_categories.json", (_BANKING, "banking_data/categories.json"), folder)
    names = _json(file)
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise DataError(f"{file}: expected a list of names")
    return names


_MAX_BYTES = 1 << 30  # The largest of these files has 20 MB; a gzip can stand for a thousand times its size.
_BANKING = "github.com/PolyAI-LDN/task-specific-datasets"


def data_folder(folder: str | Path | None = None) -> Path:
    """The folder of benchmark files: the argument, else what `JAXLM_DATA` names.

    Raises:
      DataError: neither is given, or it is no folder.
    """
    given = folder or os.environ.get("JAXLM_DATA")
    if not given:
        raise DataError("no folder of benchmark files: pass one, or name it in the environment variable JAXLM_DATA")
    if not Path(given).is_dir():
        raise DataError(f"the folder of benchmark files does not exist: {given} (argument, or JAXLM_DATA)")
    return Path(given)


def _find(name: str, source: tuple[str, str], folder: str | Path | None) -> Path:
    root = data_folder(folder)
    for file in (root / name, root / f"{name}.gz"):
        if file.is_file():
            return file
    repository, path = source
    raise DataError(
        f"no file {root / name} (or .gz): get {path} from https://{repository} and put it there; "
        f"the environment variable JAXLM_DATA names the folder {root.name}"
    )


def _require(value: str, options: tuple[str, ...], what: str) -> None:
    if value not in options:
        raise ConfigError(f"unknown {what} '{value}': {nearest(value, options)}")


def _read(file: Path) -> str:
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: truncated or damaged gzip: {error}") from error
    if len(raw) > _MAX_BYTES:
        raise DataError(f"{file} holds more than {_MAX_BYTES:,} bytes of text: not such a file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file} line {line}: not UTF-8: byte 0x{raw[error.start]:02X}") from error


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_read(file).split("\n"), 1):
        if line.strip():
            yield f"{file} line {number}", line.removesuffix("\r")


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    for where, line in _lines(file):
        yield where, _parse(line, where)


def _json(file: Path) -> Any:
    return _parse(_read(file), str(file), one_line=False)


def _parse(text: str, where: str, one_line: bool = True) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if one_line else f" line {error.lineno}"
        raise DataError(f"{where}{line}: malformed JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, thousands of brackets
        raise DataError(f"{where}: malformed JSON: {error}") from error


def _texts(row: Any, fields: tuple[str, ...], where: str) -> list[str]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, got {type(row).__name__}")
    for field in fields:
        if field not in row:
            raise DataError(f"{where}: no field '{field}' (fields present: {', '.join(row) or 'none'})")
        if not isinstance(row[field], str):
            raise DataError(f"{where}: field '{field}' holds {type(row[field]).__name__}, expected text")
    return [row[field] for field in fields]


def _items(row: Any, field: str, where: str) -> list:
    if not isinstance(row, dict) or not isinstance(row.get(field), list):
        raise DataError(f"{where}: no list '{field}'")
    return row[field]


def _spans(answers: list, context: str, where: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    texts, starts = [], []
    for answer in answers:
        (text,) = _texts(answer, ("text",), where)
        start = answer.get("answer_start")
        if not isinstance(start, int) or context[start : start + len(text)] != text:
            raise DataError(f"{where}: the answer '{text[:40]}' does not stand at {start} of its context")
        texts.append(text)
        starts.append(start)
    if not texts:
        raise DataError(f"{where}: no answers")
    return tuple(texts), tuple(starts)


def _number(text: str, where: str) -> str:
    number = text.strip().replace(",", "")
    if not re.fullmatch(r"-?\d+(\.\d+)?", number):
        raise DataError(f"{where}: the answer is '{text.strip()[:40]}', expected a number")
    return number


def _code_problems(file: Path, kind: Callable[..., Any]) -> list:
    fields = tuple(name for name in kind.__dataclass_fields__ if name != "suffix")
    problems = []
    for where, row in _json_lines(file):
        values = dict(zip(fields, _texts(row, fields, where)))
        suffix = row.get("suffix", "")
        if not isinstance(suffix, str):
            raise DataError(f"{where}: field 'suffix' holds {type(suffix).__name__}, expected text")
        problems.append(kind(**values, suffix=suffix))
    return problems
