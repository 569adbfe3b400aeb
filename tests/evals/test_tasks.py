import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.json_files import read_json, write_json
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.decoding import GenerationConfig
from jaxlm.evals import tasks
from jaxlm.evals.generation import Problem, exact_match
from jaxlm.evals.methods import EvaluationConfig, Generation, MultipleChoice, Task, text_metrics
from jaxlm.evals.tasks import evaluate_task, find_task, register, task_names
from jaxlm.interop import Pretrained
from jaxlm.scoring import TextScore
from jaxlm.testing import tiny_decoder

RECORDS = [
    {"question": "Is water wet?", "choices": ["yes", "no"], "answer": "yes"},
    {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": 1},
    {"question": "Capital of France?", "choices": ["Rome", "Paris"], "answer": "B"},
]


@pytest.fixture(scope="module")
def subject():
    model, params = tiny_decoder("llama", vocab_size=259)
    return Pretrained(model.config, params, ByteTokenizer())


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS)) + "\n")
    return file


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(tasks, "_TASKS", dict(tasks._TASKS))


def test_multiple_choice_from_a_file(subject, questions, tmp_path):
    calls = []
    result = evaluate_task("multiple_choice", subject, path=questions, progress=lambda *call: calls.append(call))
    assert set(result.metrics) == {"acc", "acc_norm", "acc_bytes", "acc_tokens", "brier"}
    assert [e["answer"] for e in result.examples] == [0, 1, 1]
    right = [
        max(range(len(e["choices"])), key=e["log_likelihoods"].__getitem__) == e["answer"] for e in result.examples
    ]
    assert result.metrics["acc"].value == pytest.approx(sum(right) / 3)
    assert calls[-1] == (7, 7)
    write_json(tmp_path / "result.json", result.as_json())
    assert read_json(tmp_path / "result.json")["metrics"]["acc"]["value"] == pytest.approx(sum(right) / 3)


def test_first_examples_are_shots(subject, questions):
    result = evaluate_task("multiple_choice", subject, path=questions, config=EvaluationConfig(num_shots=1, limit=1))
    (example,) = result.examples
    assert example["context"] == "Question: Is water wet?\nAnswer: yes\n\nQuestion: 2 + 2?\nAnswer:"


def test_perplexity_of_a_uniform_model(subject, tmp_path):
    (tmp_path / "a.txt").write_text("\u00e9 two three " * 30)
    (tmp_path / "b.txt").write_text("four")
    (tmp_path / "c.txt").write_text("")
    uniform = dataclasses.replace(subject, params=jax.tree.map(jnp.zeros_like, subject.params))
    result = evaluate_task("perplexity", uniform, path=tmp_path)
    # A token a byte, all equally likely.
    assert result.metrics["bits_per_byte"] == (pytest.approx(math.log2(259)), pytest.approx(0, abs=1e-5))
    assert result.metrics["token_perplexity"].value == pytest.approx(259, rel=1e-5)
    assert len(result.examples) == 2


def test_text_metrics_by_hand():
    scores = [TextScore(-2.0, 4, 8, 1), TextScore(-10.0, 8, 16, 3), TextScore(0.0, 0, 0, 0)]
    metrics = text_metrics(scores)
    assert metrics["bits_per_byte"].value == pytest.approx(12 / 24 / math.log(2))
    assert metrics["byte_perplexity"].value == pytest.approx(math.exp(0.5))
    assert metrics["token_perplexity"].value == pytest.approx(math.exp(1))
    assert metrics["word_perplexity"].value == pytest.approx(math.exp(3))
    assert metrics["bits_per_byte"].error > 0


def test_a_task_of_problems_is_registered(subject, registry):
    problems = [Problem("a", "b"), Problem("one", "1"), Problem("two", "2")]
    greedy = GenerationConfig(max_new_tokens=4, temperature=0)
    register(Task("toy", lambda path: problems, Generation(greedy, exact_match(str)), lambda path: problems[:2]))
    assert "toy" in task_names()
    result = evaluate_task("toy", subject, config=EvaluationConfig(num_shots=2, limit=2))
    assert [e["prompt"] for e in result.examples] == ["a b\n\none 1\n\na", "a b\n\none 1\n\none"]
    assert set(result.metrics) == {"exact_match", "answered"}
    with pytest.raises(ConfigError, match="there is a task 'toy' already"):
        register(Task("toy", lambda path: [], MultipleChoice()))


def test_stop_ids_of_the_model_are_used(subject):
    greedy = GenerationConfig(max_new_tokens=6, temperature=0)
    task = Task("toy", lambda path: [Problem("a", "")], Generation(greedy, exact_match(str)))
    (free,) = evaluate_task(task, subject).examples
    every_byte = dataclasses.replace(subject, stop_ids=tuple(range(259)))
    (stopped,) = evaluate_task(task, every_byte).examples
    assert len(stopped["completions"][0]) <= 1 < len(free["completions"][0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n", "questions.jsonl line 1: no field 'question'"),
        ("\n{", "questions.jsonl line 2: malformed JSON at column 2"),
        ("[1]", "questions.jsonl line 1: expected an object, got list"),
        ("", "has no examples to evaluate"),
        (b"\xff", "questions.jsonl: not UTF-8 at byte 0"),
    ],
)
def test_bad_files_are_named(subject, questions, content, message):
    questions.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        evaluate_task("multiple_choice", subject, path=questions)


def test_other_bad_input_is_named(subject, questions, tmp_path):
    with pytest.raises(ConfigError, match="no task 'multiple_choise': did you mean 'multiple_choice'"):
        find_task("multiple_choise")
    with pytest.raises(ConfigError, match="task 'perplexity' reads a text file"):
        evaluate_task("perplexity", subject)
    with pytest.raises(DataError, match="no such file"):
        evaluate_task("multiple_choice", subject, path=tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="the model comes without a tokenizer"):
        evaluate_task("perplexity", dataclasses.replace(subject, tokenizer=None), path=questions)
    with pytest.raises(ConfigError, match="num_shots is 4; task 'multiple_choice' has 3"):
        evaluate_task("multiple_choice", subject, path=questions, config=EvaluationConfig(num_shots=4))
    with pytest.raises(ConfigError, match="evaluation.limit is 0"):
        EvaluationConfig(limit=0)
