"""Benchmarks ask as the harness asks, and their judges and metrics find what is right."""

import functools
import math
import os
import re
from pathlib import Path

import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data import benchmarks as data
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.evals import EvaluationConfig, adapt, evaluate_task, find_task, prepare_task
from jaxlm.evals.benchmarks import (
    BENCHMARKS,
    PASS_KS,
    before_fence,
    detokenized,
    indented,
    mgsm_announced,
    run_code,
)
from jaxlm.evals.generation import Problem, Solved
from jaxlm.evals.methods import Generation, Passage, Perplexity, Task
from jaxlm.interop import Pretrained
from jaxlm.testing import tiny_decoder
from jaxlm.verify.answers import mgsm_strict
from jaxlm.verify.sandbox import Limits
from tests.evals.benchmark_files import CODE, GSM8K, PACK, WIKITEXT, write

LIMITS = Limits(seconds=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def subject():
    model, params = tiny_decoder("llama", vocab_size=259, max_length=1024)
    return Pretrained(model.config, params, ByteTokenizer())


def examples(name, folder, **settings):
    return prepare_task(name, path=folder, config=EvaluationConfig(**settings)).examples


def metrics(name, example, *completions):
    """What a task's judge and metrics say of completions of one problem."""
    method = find_task(name).method
    verdicts = method.judge([(example, text) for text in completions])
    found = method.metrics([Solved(example, completions, tuple(verdicts))])
    return {key: estimate.value for key, estimate in found.items()}


def test_gsm8k_asks_behind_five_solved_examples(folder):
    shot = f"Question: {GSM8K[0]['question']}\nAnswer: {GSM8K[0]['answer']}\n\n"
    first, second = examples("gsm8k", folder)
    assert second.prompt == shot * 5 + "Question: How much is a thousand?\nAnswer:"
    assert len(examples("gsm8k", folder, num_shots=0, limit=1)) == 1
    assert metrics("gsm8k", first, " 2 + 3 = 5\n#### 5") == {"strict_match": 1, "flexible_extract": 1, "answered": 1}
    assert metrics("gsm8k", second, " $1,000.") == {"strict_match": 0, "flexible_extract": 1, "answered": 1}
    assert metrics("gsm8k", second, " none", " #### 1000 or 5") == {
        "strict_match": 0.5,
        "flexible_extract": 0,
        "answered": 0.5,
    }


def test_mgsm_asks_in_its_language(folder):
    first, second = examples("mgsm_de", folder)
    assert first.prompt == "Frage: Wie viele?\nSchritt-für-Schritt-Antwort:"
    assert metrics("mgsm_de", second, " Die Antwort lautet 5.600, also 5,600.")["strict_match"] == 0
    assert metrics("mgsm_de", second, " Die Antwort lautet 5,600.") == {
        "strict_match": 1,
        "flexible_extract": 1,
        "answered": 1,
    }
    (shown,) = examples("mgsm_de", folder, num_shots=1)
    assert shown.prompt.startswith(first.prompt + " Die Antwort lautet 18.\n\nFrage: Wie teuer?")


@pytest.mark.parametrize("language", data.MGSM_LANGUAGES)
def test_shown_answers_are_what_the_strict_filter_reads(language):
    assert mgsm_strict(mgsm_announced("18", language), language).rstrip(".") == "18"


def test_humaneval_runs_the_program_that_a_completion_makes(folder):
    problem, _ = examples("humaneval", folder)
    assert problem.prompt == CODE["prompt"]
    assert metrics("humaneval", problem, "    return xs[0]\n", "    return 2\n", "    )", "    return 1\n") == {
        "pass@1": 0.5,
        "pass@2": pytest.approx(5 / 6),
        "judged": 1,
    }
    problem, _ = examples("humaneval_instruct", folder)
    assert problem.prompt.endswith(f"tests:\n```python\n{CODE['prompt']}\n```\n")
    assert problem.reply_start.endswith(f"```python\n{CODE['prompt']}\n")
    assert metrics("humaneval_instruct", problem, "    return xs[0]\n```\nIt works.")["pass@1"] == 1
    with pytest.raises(ConfigError, match="num_shots: these problems are given without solved examples"):
        examples("humaneval", folder, num_shots=1)


def test_humanevalpack_has_bugs_fixed(folder):
    (tests,), (docs,), (write_it,) = (
        examples(f"humanevalpack_{kind}", folder) for kind in ("fix_tests", "fix_docs", "synthesize")
    )
    assert tests.prompt == f"def one(xs):\n    return xs[1]\n\n{PACK['test']}\nFix bugs in one.\n\n"
    assert docs.prompt == f"{CODE['prompt']}    return xs[1]\n\nFix bugs in one.\n\n"
    assert write_it.prompt == "Write a Python function `one(xs)`:\nThe first.\n\n"
    assert [p.reply_start for p in (tests, docs, write_it)] == ["def one(xs):", *[CODE["prompt"].rstrip()] * 2]
    right = "\n    return int(math.sqrt(xs[0]))\nNow it works."
    for name, problem in (("fix_tests", tests), ("fix_docs", docs), ("synthesize", write_it)):
        assert metrics(f"humanevalpack_{name}", problem, right)["pass@1"] == 1
    assert metrics("humanevalpack_fix_tests", tests, "\n    return xs[1]\n")["pass@1"] == 0


def test_parts_of_replies():
    assert before_fence("    return 1\n```\nSo.") == "    return 1\n"
    assert indented("\n    a\n\n    b\nprint(c)\n    d") == "\n    a\n\n    b\n"
    assert indented("\n    a  \n") == "\n    a"


def test_tests_at_fault_give_no_verdict(folder):
    problem, _ = examples("humaneval", folder)
    broken = Problem("", data.CodeProblem(**CODE | {"test": "def check(c):\n  )"}, suffix=""))
    wrong, unknown = run_code(limits=LIMITS)([(problem, "    return 0"), (broken, "    return xs[0]")])
    assert wrong.answer.startswith("failed")
    assert (unknown.is_right, unknown.answer) == (False, None)


def test_xquad_compares_without_articles(folder):
    (problem,) = examples("xquad_de", folder)
    assert problem.prompt == "Kontext: Grüner Tee kommt aus China.\n\nFrage: Woher?\n\nAntwort:"
    assert metrics("xquad_de", problem, " Das China!", " aus China") == {
        "exact_match": 0.5,
        "f1": pytest.approx((1 + 2 / 3) / 2),
    }


def test_wikitext_is_detokenized_and_counted_as_published(folder):
    (passage,) = examples("wikitext", folder)
    assert passage.text == "\n= Tea =\n\nIt's the drink's (good) name, 3,000.\n\n== Old ==\n\n\"So\".\n"
    assert passage.num_bytes == len(WIKITEXT)
    assert passage.num_words == len(WIKITEXT.split()) + 2  # the harness counts the blanks at both ends


@pytest.mark.parametrize("name", ["clinc150", "banking77"])
def test_intents_are_chosen_among_all(name, folder):
    questions = examples(name, folder, num_shots=3)
    assert len(questions) == 6
    assert questions[0].choices == ("card arrival", "exchange rate", "top up")
    shown = re.findall("Intent: (.+)", questions[0].context)
    assert sorted(shown) == ["card arrival", "exchange rate", "top up"]
    for question in questions:
        said = question.context.rpartition("Request: ")[2].partition("\n")[0]
        assert question.choices[question.answer].replace(" ", "_") == said.split()[1]


def test_intents_that_training_has_not_are_named(folder, tmp_path):
    write(tmp_path)
    file = tmp_path / "intents/clinc150_small.json"
    file.write_text(file.read_text().replace('"test": [', '"test": [["x", "unheard"], '))
    with pytest.raises(DataError, match="task 'clinc150': intents of split test .*unheard"):
        prepare_task("clinc150", path=tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gsm8k", {"strict_match", "flexible_extract", "answered"}),
        ("humanevalpack_fix_tests", {"pass@1", "judged"}),
        ("xquad_de", {"exact_match", "f1"}),
        ("wikitext", {"bits_per_byte", "byte_perplexity", "token_perplexity", "word_perplexity"}),
        ("banking77", {"acc", "acc_norm", "acc_tokens", "acc_mutual_info", "brier"}),
    ],
)
def test_on_a_model(name, expected, subject, folder):
    task = adapt(find_task(name), max_new_tokens=4)
    result = evaluate_task(task, subject, path=folder, config=EvaluationConfig(num_shots=0, limit=1))
    assert set(result.metrics) == expected
    assert len(result.examples) == 1


def test_passages_are_counted_as_their_originals(subject):
    given = Passage("abcd", num_words=7, num_bytes=50)
    result = evaluate_task(Task("toy", lambda path: [given], Perplexity()), subject)
    (record,) = result.examples
    assert (record["num_tokens"], record["num_words"], record["num_bytes"]) == (4, 7, 50)
    assert result.metrics["word_perplexity"].value == pytest.approx(math.exp(-record["log_likelihood"] / 7))


def test_a_context_too_short_is_named_first(subject, folder):
    prepared = prepare_task("humaneval", path=folder, config=EvaluationConfig(max_length=512))
    with pytest.raises(ConfigError, match="task 'humaneval': generation.max_new_tokens is 512, expected less than"):
        prepared.check(subject)


def test_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXLM_DATA", raising=False)
    with pytest.raises(DataError, match="JAXLM_DATA"):
        prepare_task("gsm8k")
    with pytest.raises(DataError, match="get grade_school_math/data/test.jsonl from"):
        prepare_task("gsm8k", path=tmp_path)
    with pytest.raises(ConfigError, match="no task 'gsm8': did you mean 'gsm8k'"):
        prepare_task("gsm8")


def test_samples_for_pass_at_k_need_a_temperature():
    with pytest.raises(ConfigError, match="num_samples is 4 at temperature 0"):
        adapt(find_task("humaneval"), num_samples=4)
    assert adapt(find_task("humaneval"), num_samples=4, temperature=0.8).method.generation.num_samples == 4
    assert adapt(find_task("wikitext"), num_samples=4) is find_task("wikitext")
    assert PASS_KS[0] == 1


class TestAgainstTheHarness:
    """Needs lm_eval: its own files say how it asks, where it stops, and how it undoes WikiText's spaces."""

    @functools.cached_property
    def folder(self):
        return Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"

    def read(self, name):
        yaml = pytest.importorskip("yaml")
        loader = type("Loader", (yaml.SafeLoader,), {})
        loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
        return yaml.load((self.folder / name).read_text(), loader)

    def asked(self, settings, **fields):
        jinja2 = pytest.importorskip("jinja2")
        return jinja2.Environment().from_string(settings["doc_to_text"]).render(**fields)

    @pytest.mark.parametrize("language", data.MGSM_LANGUAGES)
    def test_mgsm(self, language, tmp_path):
        settings = self.read(f"mgsm/native_cot/mgsm_native_cot_{language}.yaml")
        (tmp_path / "mgsm").mkdir()
        (tmp_path / f"mgsm/mgsm_{language}.tsv").write_text("How many?\t18\n")
        (problem,) = examples(f"mgsm_{language}", tmp_path)
        assert problem.prompt == self.asked(settings, question="How many?", answer=None)
        method = find_task(f"mgsm_{language}").method
        assert list(method.generation.stop) == settings["generation_kwargs"]["until"]
        strict = settings["filter_list"][0]["filter"][0]["regex_pattern"]
        assert re.search(strict, mgsm_announced("18", language))[1].rstrip(".") == "18"

    @pytest.mark.parametrize("language", data.XQUAD_LANGUAGES)
    def test_xquad(self, language, folder, tmp_path):
        (tmp_path / "xquad").mkdir()
        (tmp_path / f"xquad/xquad.{language}.json").write_text((folder / "xquad/xquad.de.json").read_text())
        (problem,) = examples(f"xquad_{language}", tmp_path)
        settings = self.read(f"xquad/xquad_{language}.yaml")
        fields = {"context": "Grüner Tee kommt aus China.", "question": "Woher?"}
        assert problem.prompt == self.asked(settings, **fields)

    def test_gsm8k_and_humaneval(self, folder):
        settings = self.read("gsm8k/gsm8k.yaml")
        (problem,) = examples("gsm8k", folder, num_shots=0, limit=1)
        assert problem.prompt == self.asked(settings, **GSM8K[0])
        assert list(find_task("gsm8k").method.generation.stop) == settings["generation_kwargs"]["until"]
        assert find_task("gsm8k").num_shots == settings["num_fewshot"]
        until = self.read("humaneval/humaneval.yaml")["generation_kwargs"]["until"]
        assert set(until) <= set(find_task("humaneval").method.generation.stop)

    def test_wikitext(self, folder):
        theirs = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext").wikitext_detokenizer
        place = os.environ.get("JAXLM_DATA", folder)
        for article in data.wikitext2("test", place):
            assert detokenized(article.text) == theirs({"page": article.text})


@pytest.mark.skipif("JAXLM_DATA" not in os.environ, reason="JAXLM_DATA names no folder of benchmark files")
def test_canonical_solutions_pass():
    """Every twentieth problem, written as each of the tasks has it written."""
    for task in BENCHMARKS:
        if not task.name.startswith("humaneval"):
            continue
        problems = prepare_task(task).examples[::20]
        assert isinstance(task.method, Generation)
        verdicts = task.method.judge([(p, f"\n{p.reference.canonical_solution}") for p in problems])
        assert all(v.is_right for v in verdicts), task.name
