"""Answers out of a model's text, and whether they are the ones expected. Pure functions, text in, text or score out.

The filters for GSM8K and MGSM and the normalization of their exact match are those of EleutherAI's evaluation
harness (tasks `gsm8k`, `mgsm_native_cot`). `squad_normalize`, `exact_match` and `f1` are SQuAD's official evaluation
for English and MLQA's (Lewis et al. 2020, arXiv 1910.07475) for other languages, the usual one for XQuAD.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from jaxlm.core.errors import ConfigError

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def gsm8k_strict(text: str) -> str | None:
    """The number after the first `#### `, or None."""
    found = _STRICT.search(text)
    return found[1] if found else None


def gsm8k_flexible(text: str) -> str | None:
    """The last thing in the text that looks like a number (with `$`, commas, a point), or None."""
    found = [a or b for a, b in _FLEXIBLE.findall(text)]
    return found[-1] if found else None


def gsm8k_match(found: str | None, reference: str) -> bool:
    """The harness's exact match of GSM8K: without case, commas, dollar signs, `... #### ` and a final point.

    `reference` is the data set's answer, its reasoning included or not. Here `18.00` is not `18`; where that is
    meant, compare with `numbers_equal`.
    """
    return found is not None and _gsm8k_clean(found) == _gsm8k_clean(reference)


def _gsm8k_clean(text: str) -> str:
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


MGSM_ANNOUNCEMENTS = {
    "bn": "উত্তর হল",
    "de": "Die Antwort lautet",
    "en": "The answer is",
    "es": "La respuesta es",
    "fr": "La réponse est",
    "ja": "答えは",
    "ru": "Ответ —",
    "sw": "Jibu ni",
    "te": "సమాధానం",
    "th": "คำตอบคือ",
    "zh": "答案是",
}


def mgsm_strict(text: str, language: str) -> str | None:
    """The number after the first announcement of an answer, as the harness's task `mgsm_native_cot` reads it, or None.

    The harness wants Bengali answers announced in English; for its flexible filter use `gsm8k_flexible`.
    """
    announcement = "The answer is" if language == "bn" else _announcement(language)
    end = {"ja": "です。", "zh": "。"}.get(language, "")
    space = "" if language == "ja" else " "
    found = re.search(rf"{announcement}{space}(-?[0-9.,]+){end}", text)
    return found[1] if found else None


def mgsm_answer(text: str, language: str) -> str | None:
    """The number that a reply in one of MGSM's languages gives: after the last announcement of an answer as the
    data set's own examples word it ("The answer is 18."), else the last number of the text.

    Digits of any script are read (`১৮` is 18).

    Raises:
      ConfigError: a language that MGSM has not.
    """
    _, announced, after = text.rpartition(_announcement(language))
    if announced:
        number = _NUMBER.search(_plain_digits(after))
        if number:
            return number[0]
    return last_number(text)


def _announcement(language: str) -> str:
    if language not in MGSM_ANNOUNCEMENTS:
        raise ConfigError(f"MGSM has no language {language!r}, expected one of {', '.join(MGSM_ANNOUNCEMENTS)}")
    return MGSM_ANNOUNCEMENTS[language]


_NUMBER = re.compile(
    r"[-−]?(?:\d{1,3}(?:,\d{2,3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+(?![\d.]))?|[-−]?\.\d+"
)


def last_number(text: str) -> str | None:
    """The last number of a text: with sign, grouping commas, decimals, an exponent, or as a fraction; or None.

    A minus directly after a digit or a letter is taken for a dash or an operator: the number of `5-3` is 3.
    """
    text = _plain_digits(text)
    found = [m for m in _NUMBER.finditer(text)]
    if not found:
        return None
    number, before = found[-1][0], text[: found[-1].start()]
    return number[1:] if number[0] in "-−" and before[-1:].isalnum() else number


def parse_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number and decoration, or None.

    Read are grouping commas and spaces, currency signs, LaTeX (`$..$`, `\\boxed{}`, `\\frac{a}{b}`, `\\text{}`,
    `\\%`, `\\!`), a fraction, an exponent, a percent sign (12% is 12, as graders have it), a unit after the number
    ("18 dollars", "5 cm"), a point at the end. `3 4` is two numbers and gives None.
    """
    text = _unlatex(_plain_digits(text)).strip().rstrip(".").replace("−", "-")
    text = re.sub(r"(?<=\d)[,\s\u00a0\u202f'](?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d),(?=\d\d,?\d)", "", text)  # the Indian grouping, 12,34,567
    found = re.fullmatch(
        r"[^\w.+-]*([-+]?)[^\w.+-]*(\d+\.?\d*|\.\d+)(?:[eE]([-+]?\d{1,3}))?(?:\s*/\s*(\d+\.?\d*))?\s*"
        r"(?:%|[^\d\s]*(?:\s[^\d]*)?)",
        text,
    )
    if not found:
        return None
    sign, digits, exponent, divisor = found.groups()
    try:
        value = Fraction(Decimal(digits)) * Fraction(10) ** int(exponent or 0)
        value = value / Fraction(Decimal(divisor)) if divisor else value
    except (InvalidOperation, ZeroDivisionError):
        return None
    return -value if sign == "-" else value


def numbers_equal(a: str | None, b: str | None, tolerance: float = 0.0) -> bool:
    """Whether two texts are the same number, within a relative tolerance; texts that are no numbers never are."""
    x, y = (None if t is None else parse_number(t) for t in (a, b))
    return x is not None and y is not None and abs(x - y) <= Fraction(tolerance) * max(abs(x), abs(y))


def last_boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{...}` (or `\\fbox`), braces matched, or None. `\\boxed 5` gives "5"."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].removeprefix("\\boxed").removeprefix("\\fbox")
    if not rest.startswith("{"):
        found = re.match(r"\s+([^\s$]+)", rest)
        return found[1] if found else None
    depth = 0
    for at, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:at]
    return None


def math_answer(text: str) -> str | None:
    """The final answer of a solution: the last box, else what follows `####` on its line, else the last number."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    _, marked, after = text.rpartition("####")
    if marked and after.strip():
        return after.strip().splitlines()[0].strip()
    return last_number(text)


def math_equal(a: str | None, b: str | None) -> bool:
    """Whether two final answers are the same number, or the same text once LaTeX's spacing and case are gone."""
    if a is None or b is None:
        return False
    if numbers_equal(a, b):
        return True
    return _math_text(a) == _math_text(b) != ""


def choice_letter(text: str, choices: str | Sequence[str] = "ABCD") -> str | None:
    """The letter that a reply to a multiple-choice question picks, or None.

    Tried in this order: a box; "answer is (B)" or "Answer: B", the last; a reply that starts with the letter
    ("B", "(B)", "B.", "B) Paris"); the last letter in parentheses; a capital letter of the choices that stands
    alone, where the reply has only one such. "A" as the first word of a sentence ("A dog") is no answer.
    """
    letters = "".join(choices)
    one = f"([{re.escape(letters + letters.lower())}])"
    boxed = last_boxed(text)
    if boxed is not None:
        found = re.fullmatch(rf"(?:\\text(?:bf)?\{{)?\W*{one}\W*", boxed.strip())
        if found:
            return found[1].upper()
    announced = re.findall(rf"(?i:answer|choice|option)(?i:\s+is|\s*:|\s*)\W*{one}(?![\w'’])(?!\s+[a-z])", text)
    if announced:
        return announced[-1].upper()
    stripped = text.strip()
    for pattern in (rf"[(\[*]*{one}[)\].:*]+(?:\s|$)", rf"{one}\s*(?:\n|$)"):
        found = re.match(pattern, stripped)
        if found:
            return found[1].upper()
    in_parentheses = re.findall(rf"\({one}\)", text)
    if in_parentheses:
        return in_parentheses[-1].upper()
    alone = re.findall(rf"(?<![\w'’])([{re.escape(letters)}])(?![\w'’])(\s+[a-z])?", text)
    if len({letter for letter, _ in alone}) != 1:
        return None
    letter, _ = alone[0]
    # "A" and "I" before a word in lower case are words themselves.
    return None if letter in "AI" and all(word for _, word in alone) else letter


# Words that SQuAD's evaluation, and MLQA's for other languages, leave out.
_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "ar": r"\sال^|ال",
}
XQUAD_LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
_SPLIT_INTO_CHARACTERS = ("zh", "ja")


def squad_normalize(text: str, language: str = "en") -> str:
    """Lower case, without punctuation, the language's articles, and more than single spaces.

    English loses ASCII punctuation (SQuAD's script); other languages all of Unicode's (MLQA's script). Chinese is
    split into characters, runs of other scripts kept whole.
    """
    if language == "en":
        text = "".join(c for c in text.lower() if c not in string.punctuation)
    else:
        text = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P") and c not in _ASCII)
    if language in _ARTICLES:
        text = re.sub(_ARTICLES[language], " ", text)
    return " ".join(_mixed_tokens(text) if language in _SPLIT_INTO_CHARACTERS else text.split())


def exact_match(prediction: str, references: Sequence[str], language: str = "en") -> float:
    """1.0 where the normalized prediction is one of the normalized references, else 0.0."""
    return _best(lambda p, r: float(p == r), prediction, references, language)


def f1(prediction: str, references: Sequence[str], language: str = "en") -> float:
    """The best F1 of the prediction's words (for Chinese, characters) against those of a reference.

    An empty text after normalization scores 1.0 against another empty one and 0.0 against any other.
    """
    return _best(_token_f1, prediction, references, language)


def _best(score: Callable[[str, str], float], prediction: str, references: Sequence[str], language: str) -> float:
    if isinstance(references, str) or not references:
        raise ConfigError(f"the references are {references!r}, expected at least one text in a sequence")
    found = squad_normalize(prediction, language)
    return max(score(found, squad_normalize(reference, language)) for reference in references)


def _token_f1(prediction: str, reference: str) -> float:
    a, b = prediction.split(), reference.split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))


_ASCII = frozenset(string.punctuation)


def _mixed_tokens(text: str) -> list[str]:
    return re.findall(r"[\u4e00-\u9fa5\u3040-\u30ff]|[^\s\u4e00-\u9fa5\u3040-\u30ff]+", text)


def _plain_digits(text: str) -> str:
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() and not c.isascii() else c for c in text)


def _unlatex(text: str) -> str:
    boxed = last_boxed(text)
    text = text if boxed is None else boxed
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r"\1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\left|\\right|\\!|\\,|\\;|\\:|\\ |\{,\}", lambda m: "," if m[0] == "{,}" else "", text)
    return re.sub(r"\^\{?\\circ\}?|\\degree", "", text).replace("\\$", "").replace("\\%", "%").replace("$", "")


def _math_text(text: str) -> str:
    return re.sub(r"\s+", "", _unlatex(text)).rstrip(".").lower()
