"""Answers as the published filters extract them, and comparisons on known examples."""

from fractions import Fraction

import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.verify import answers as A

REPLY = "She makes 9 * 2 = $18 a day, $1,260.50 in 10 weeks.\n#### 1,260.50"


def test_the_filters_of_gsm8k():
    assert A.gsm8k_strict(REPLY) == "1,260.50"
    assert A.gsm8k_strict("#### -5 and #### 6") == "-5"
    assert A.gsm8k_strict("####5") is A.gsm8k_strict("the answer is 5") is None
    assert A.gsm8k_flexible("It costs $1,000.") == "$1,000."
    assert A.gsm8k_flexible("first 12, then 7") == "7"
    assert A.gsm8k_flexible("no number") is None


def test_gsm8k_match():
    reference = "Ten times 100 is <<10*100=1000>>1000.\n#### 1,000"
    for found in ("1000", "$1,000.", "1,000"):
        assert A.gsm8k_match(found, reference)
    for found in ("1000.00", "100", None, ""):
        assert not A.gsm8k_match(found, reference)


def test_mgsm():
    assert A.mgsm_answer("16 - 7 = 9 und 9 * 2 = 18. Die Antwort lautet 18. (Nicht 20.)", "de") == "18"
    assert A.mgsm_answer("16 - 3 = 13。答案是 13。", "zh") == "13"
    assert A.mgsm_answer("উত্তর হল ১৮।", "bn") == "18"
    assert A.mgsm_answer("maybe 5, or 7", "en") == "7"
    assert A.mgsm_strict("La réponse est 1,000. La réponse est 2.", "fr") == "1,000."
    assert A.mgsm_strict("答えは18です。", "ja") == "18"
    assert A.mgsm_strict("答案是 13。", "zh") == "13"
    assert A.mgsm_strict("The answer is 5", "bn") == "5"
    assert A.mgsm_strict("答案是13", "zh") is A.mgsm_strict("উত্তর হল 18", "bn") is None
    with pytest.raises(ConfigError, match="no language 'it'"):
        A.mgsm_answer("", "it")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18), ("-3.50", Fraction(-7, 2)), ("$1,234,567.", 1234567), ("12,34,567", 1234567), ("1 000 000", 10**6),
        ("18 dollars", 18), ("5cm", 5), ("12%", 12), ("\\$12", 12), ("$\\boxed{\\frac{3}{4}}$", Fraction(3, 4)),
        ("\\frac34", Fraction(3, 4)), ("-\\dfrac{1}{2}", Fraction(-1, 2)), ("3/4", Fraction(3, 4)), ("1e3", 1000),
        (".5", Fraction(1, 2)), ("10{,}000", 10000), ("90^\\circ", 90), ("\\text{18 apples}", 18), ("−4", -4),
        ("१२", 12),
        ("1/0", None), ("three", None), ("3 4", None), ("x = 3", None), ("", None), ("1e999999", None), ("5-3", None),
    ],
)  # fmt: skip
def test_parse_number(text, number):
    assert A.parse_number(text) == number


def test_numbers_in_text():
    assert A.last_number("from 5-3 we get") == "3"
    assert A.last_number("it is -3") == "-3"
    assert A.last_number("1,234 and 56,789.5 in all.") == "56,789.5"
    assert A.last_number("none") is None
    assert A.numbers_equal("18.00", "$18")
    assert A.numbers_equal("3.1416", "3.14159", tolerance=1e-4)
    assert not A.numbers_equal("3.1416", "3.14159")
    assert not A.numbers_equal("x", "x")


def test_boxes_and_final_answers():
    assert A.last_boxed("\\boxed{1} then \\boxed{\\frac{1}{2}} end") == "\\frac{1}{2}"
    assert A.last_boxed("\\boxed 5$") == "5"
    assert A.last_boxed("\\boxed{1") is A.last_boxed("1") is None
    assert A.math_answer("so \\boxed{ 7 }. #### 8") == "7"
    assert A.math_answer("#### 8\nand 9") == "8"
    assert A.math_answer("8 or 9") == "9"
    assert A.math_equal("\\frac{1}{2}", "0.5")
    assert A.math_equal("\\left(1, 2\\right)", "(1,2)")
    assert not A.math_equal("(1,2)", "(1,3)")
    assert not A.math_equal("", "")
    assert not A.math_equal(None, "1")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("(c)", "C"), ("B. Paris", "B"), ("**D**", "D"), ("b) Paris", "B"), ("The answer is (A).", "A"),
        ("Answer: C", "C"), ("I first thought the answer is A, but the answer is B.", "B"), ("\\boxed{\\text{D}}", "D"),
        ("Not (A), rather (C)", "C"), ("It must be D because of it", "D"), ("A dog is an animal", None),
        ("A or B", None), ("E", None), ("I'd say", None), ("", None), ("The answer is a dog", None),
    ],
)  # fmt: skip
def test_choice_letter(text, letter):
    assert A.choice_letter(text) == letter


def test_squad_scores():
    assert A.squad_normalize("The  Eiffel-Tower, a tower!") == "eiffeltower tower"
    assert A.exact_match("the Denver Broncos.", ["Broncos", "Denver Broncos"]) == 1.0
    assert A.exact_match("Denver", ["Broncos"]) == 0.0
    assert A.f1("the Denver Broncos team", ["Denver Broncos"]) == pytest.approx(0.8)
    assert A.f1("the", ["a"]) == A.f1("", [""]) == 1.0
    assert A.f1("", ["x"]) == 0.0
    with pytest.raises(ConfigError, match="at least one text"):
        A.f1("x", "x")


def test_squad_scores_of_other_languages():
    assert A.squad_normalize("Der „Alte Fritz“!", "de") == "alte fritz"
    assert A.squad_normalize("¿Las Vegas?", "es") == "vegas"
    assert A.squad_normalize("黑豹队（NFL 2015）", "zh") == "黑 豹 队 nfl 2015"
    assert A.f1("黑豹队", ["黑豹"], "zh") == pytest.approx(0.8)
    assert A.exact_match("«Пэнтерс»", ["пэнтерс"], "ru") == 1.0
