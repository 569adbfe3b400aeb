import re

import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.data.chat import Plain
from jaxlm.data.chat_examples import chat_examples
from jaxlm.data.synthetic import skills
from jaxlm.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


def test_answers_are_what_is_asked_for():
    for example in skills.draw_examples("skills", 300):
        numbers = [int(n) for n in re.findall(r"\d+", example.question)]
        match example.skill:
            case "add":
                assert int(example.answer) == sum(numbers)
            case "subtract":
                assert int(example.answer) == numbers[0] - numbers[1] >= 0
            case "larger":
                assert example.answer in map(str, numbers)
                assert int(example.answer) >= min(numbers)
            case "reverse":
                assert "".join(reversed(example.answer)) in example.question
            case "double":
                half = len(example.answer) // 2
                assert example.answer[:half] == example.answer[half:]
                assert example.answer[:half] in example.question
            case _:
                assert len(example.answer) == 1
    for example in skills.draw_examples("format", 100):
        assert re.sub(r"\W", "", example.answer).lower() == "".join(example.arguments)
        assert example.answer != example.arguments[0]


def test_facts_of_a_world_are_one_value_each_whatever_the_words():
    examples = skills.draw_examples("facts", 500, world=skills.World(20, seed=3))
    asked = {(e.skill, e.arguments): e.answer for e in examples}
    assert all(asked[e.skill, e.arguments] == e.answer for e in examples)
    assert len(asked) == 80
    other = skills.draw_examples("facts", 500, world=skills.World(20, seed=4))
    assert not {e.arguments for e in other} >= {e.arguments for e in examples}


@pytest.mark.parametrize("kind", skills.KINDS)
def test_examples_differ_and_are_apart_from_those_excluded(kind):
    first = skills.draw_examples(kind, 200, seed=1)
    more = skills.draw_examples(kind, 200, seed=2, exclude=first)
    asked = [e.question if kind == "facts" else (e.skill, e.arguments) for e in (*first, *more)]
    assert len(set(asked)) == 400
    assert skills.draw_examples(kind, 50, seed=1) == first[:50]
    assert {e.kind for e in first} == {kind}


def test_the_loss_of_the_plain_form_is_on_everything_or_on_the_answer():
    (example,) = skills.draw_examples("skills", 1)
    text = "".join(skills.as_text(example))
    assert text == f"{example.skill}({','.join(example.arguments)}) = {example.answer}"
    whole, answer = (skills.text_pairs(example, TOKENIZER, answers_only=only) for only in (False, True))
    assert whole["loss_weights"].all()
    assert TOKENIZER.decode(whole["inputs"][1:].tolist()) == text
    counted = answer["targets"][answer["loss_weights"] > 0].tolist()
    assert counted[-1] == TOKENIZER.special_ids["eos"]
    assert TOKENIZER.decode(counted[:-1]) == example.answer
    assert skills.is_right(example, f" {example.answer}\n")
    assert not skills.is_right(example, "x" + example.answer)


def test_records_are_chats_that_are_trained_on_the_answer():
    drawn = skills.draw_examples("facts", 5)
    examples, counts = chat_examples(map(skills.as_record, drawn), TOKENIZER, Plain(), length=48)
    assert counts.dropped == 0
    for drawn_one, pairs in zip(drawn, examples):
        counted = pairs["targets"][np.flatnonzero(pairs["loss_weights"])]
        assert TOKENIZER.decode(counted[:-1].tolist()) == drawn_one.answer


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="no kind 'fact': did you mean 'facts'"):
        skills.draw_examples("fact", 1)
    with pytest.raises(ConfigError, match="other examples of kind 'facts', not 1000"):
        skills.draw_examples("facts", 1000, world=skills.World(2))
    with pytest.raises(ConfigError, match="0 examples"):
        skills.draw_examples("format", 0)
    with pytest.raises(ConfigError, match="world.persons is 0"):
        skills.World(0)
