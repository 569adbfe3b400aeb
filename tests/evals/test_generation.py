import re

import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.decoding import DecoderStepper, GenerationConfig, generate_text
from jaxlm.evals.generation import (
    Problem,
    Solved,
    Verdict,
    check_greedy,
    exact_match,
    few_shot_prompt,
    match_metrics,
    solve,
)
from jaxlm.testing import tiny_decoder

GREEDY = GenerationConfig(max_new_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def subject():
    return *tiny_decoder("llama", vocab_size=259), ByteTokenizer()


def last_number(text):
    found = re.findall(r"\d+", text)
    return found[-1] if found else None


def test_exact_match_compares_what_is_extracted():
    judge = exact_match(last_number)
    pairs = [(Problem("", "12"), "7 and 5 are 12."), (Problem("", "12"), "13"), (Problem("", "12"), "twelve")]
    assert judge(pairs) == [(True, "12"), (False, "13"), (False, None)]
    equal = exact_match(last_number, lambda answer, reference: int(answer) == int(reference))
    assert equal([(Problem("", "12"), "012")]) == [(True, "012")]


def test_solves_what_the_model_says(subject):
    model, params, tokenizer = subject
    prompts = ["a", "the second one", "third"]
    said = [g[0].text for g in generate_text(DecoderStepper(model), params, tokenizer, prompts, GREEDY)]
    problems = [Problem(p, text) for p, text in zip(prompts, said)]
    problems[1] = Problem(prompts[1], said[1] + "!")
    solved = solve(*subject, problems, exact_match(str), GREEDY, batch_size=2)
    assert [s.completions for s in solved] == [(text,) for text in said]
    assert [s.share for s in solved] == [1, 0, 1]
    assert match_metrics(solved)["exact_match"].value == pytest.approx(2 / 3)


def test_prompts_are_formatted(subject):
    template = {"x": [256, *b"<x>"]}
    (formatted,) = solve(*subject, [Problem("x", "")], exact_match(str), GREEDY, format_prompt=template.get)
    (plain,) = solve(*subject, [Problem("<x>", "")], exact_match(str), GREEDY)
    assert formatted.completions == plain.completions


def test_several_samples_share_a_problem(subject):
    config = GenerationConfig(max_new_tokens=4, num_samples=3)
    problems = [Problem("a", ""), Problem("b", "")]
    solved = solve(*subject, problems, lambda pairs: [Verdict(p.prompt == "b") for p, _ in pairs], config)
    assert [len(s.completions) for s in solved] == [3, 3]
    assert [s.share for s in solved] == [0, 1]


def test_metrics_by_hand():
    solved = [
        Solved(Problem("", ""), ("", ""), (Verdict(True, "1"), Verdict(False, None))),
        Solved(Problem("", ""), ("", ""), (Verdict(False, "2"), Verdict(False, "3"))),
    ]
    metrics = match_metrics(solved)
    assert metrics["exact_match"] == (0.25, pytest.approx(0.25))
    assert metrics["answered"].value == 0.75


def test_few_shot_prompt():
    assert few_shot_prompt([("Q: a", "b")], "Q: c", delimiter="\n") == "Q: a\nb\n\nQ: c"


def test_bad_input_is_named(subject):
    with pytest.raises(DataError, match="0 verdicts on 1 completions"):
        solve(*subject, [Problem("a", "")], lambda pairs: [], GREEDY)
    with pytest.raises(ConfigError, match="num_samples is 4 at temperature 0"):
        check_greedy(GenerationConfig(num_samples=4, temperature=0))
