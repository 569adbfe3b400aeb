"""Requests in words, and the plans of function calls that fulfill them: a toy of single-turn function calling.

    show me a summary in French of the notes
    1. read_file(notes)
    2. summarize($1)
    3. translate($2, French)
    4. show($3)

A request is drawn from a small grammar, so its plan is known, and how deep texts are nested says how hard it is. A
language belongs to the noun before it, so a request has one plan: `a summary of the notes in French` is one of a
translation. Texts are cut into words; `VOCABULARY` has them all.
"""

import random
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.packing import Batch

NAMES = (
    "Ada", "Alan", "Barbara", "Emmy", "Donald", "Edsger", "Frances", "Grace", "John", "Katherine", "Leslie", "Tony",
)  # fmt: skip
FILES = ("notes", "report", "budget", "minutes", "draft", "letter", "paper", "agenda")
LANGUAGES = ("French", "German", "Hindi", "Swahili")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
_FUNCTIONS = ("find_contact", "read_file", "summarize", "translate", "show", "send", "remind")
_WORDS = ("show", "me", "send", "to", "and", "remind", "of", "on", "a", "summary", "the", "in")
_SIGNS = (".", "(", ")", ",", "$", "\n", *"123456789")
PAD, END = "<pad>", "<end>"
VOCABULARY = tuple(dict.fromkeys((PAD, END, *_SIGNS, *_WORDS, *_FUNCTIONS, *NAMES, *FILES, *LANGUAGES, *DAYS)))
_IDS = {word: i for i, word in enumerate(VOCABULARY)}
_TOKEN = re.compile(r"\w+|[^\w ]")


class Example(NamedTuple):
    """A request, and its plan as `jaxlm.verify.plans` reads it."""

    request: str
    plan: str


def draw_examples(count: int, depth: int, seed: int = 0, exclude: Sequence[Example] = ()) -> list[Example]:
    """`count` different examples whose texts are nested up to `depth` deep, none of them in `exclude`.

    Raises `ConfigError` if there are not so many.
    """
    if count < 1 or depth < 0:
        raise ConfigError(f"{count} examples of depth {depth}: expected at least one, of depth 0 or more")
    rng, taken = random.Random(seed), {example.request for example in exclude}
    found: dict[str, Example] = {}
    in_vain = 0
    while in_vain < 1000:  # draws in a row without a new one: hardly any are left
        example = _draw(rng, depth)
        is_new = example.request not in taken and example.request not in found
        in_vain = 0 if is_new else in_vain + 1
        if is_new:
            found[example.request] = example
        if len(found) == count:
            return list(found.values())
    raise ConfigError(f"there are only about {len(found)} other examples of depth {depth}, fewer than {count}")


def encode(text: str) -> list[int]:
    """The ids of a text's words. Raises `DataError` for a word that is not in the vocabulary."""
    words = _TOKEN.findall(text)
    if unknown := [word for word in words if word not in _IDS]:
        raise DataError(f"'{unknown[0]}' is not in the vocabulary")
    return [_IDS[word] for word in words]


def decode(ids: Sequence[int]) -> str:
    """The text of ids up to the end of a plan, words apart."""
    words = [VOCABULARY[i] for i in ids]
    return " ".join(words[: words.index(END)] if END in words else words)


def prompt(example: Example) -> list[int]:
    """What comes before the plan."""
    return [*encode(example.request), _IDS["\n"]]


def example_arrays(examples: Sequence[Example], length: int) -> Batch:
    """A row an example: `inputs, targets, loss_weights, segment_ids, positions` `[examples, length]`; the loss is on
    the plan and its end. Raises `DataError` for an example that is longer."""
    arrays = {name: np.zeros((len(examples), length), np.int32) for name in ("inputs", "targets", "segment_ids")}
    arrays["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), (len(examples), length)).copy()
    arrays["loss_weights"] = np.zeros((len(examples), length), np.float32)
    for row, example in enumerate(examples):
        before = prompt(example)
        ids = [*before, *encode(example.plan), _IDS[END]]
        size = len(ids) - 1
        if size > length:
            raise DataError(f"an example has {size} pairs of tokens, but rows hold {length}: {example.request!r}")
        arrays["inputs"][row, :size], arrays["targets"][row, :size] = ids[:-1], ids[1:]
        arrays["segment_ids"][row, :size] = 1
        arrays["loss_weights"][row, len(before) - 1 : size] = 1
    return arrays


def _draw(rng: random.Random, depth: int) -> Example:
    calls: list[str] = []

    def call(text: str) -> str:
        calls.append(text)
        return f"${len(calls)}"

    def text(depth: int) -> tuple[str, str, str]:
        """Words for a text (its noun with languages, and what it is of), and the result that it is."""
        if depth == 0:
            file = rng.choice(FILES)
            return f"the {file}", "", call(f"read_file({file})")
        noun, rest, result = text(depth - 1)
        if rng.random() < 0.5:
            return "a summary", f" of {noun}{rest}", call(f"summarize({result})")
        language = rng.choice(LANGUAGES)
        return f"{noun} in {language}", rest, call(f"translate({result}, {language})")

    kind = rng.choice(("show", "send", "send both", "remind"))
    names = rng.sample(NAMES, 2)
    contacts = [call(f"find_contact({name})") for name in names[: {"show": 0, "send both": 2}.get(kind, 1)]]
    noun, rest, result = text(rng.randint(0, depth))
    words = noun + rest
    if kind == "show":
        call(f"show({result})")
        request = f"show me {words}"
    elif kind == "remind":
        day = rng.choice(DAYS)
        call(f"remind({contacts[0]}, {result}, {day})")
        request = f"remind {names[0]} of {words} on {day}"
    else:
        for contact in contacts:
            call(f"send({contact}, {result})")
        request = f"send {words} to {' and '.join(names[: len(contacts)])}"
    return Example(request, "\n".join(f"{i}. {text}" for i, text in enumerate(calls, 1)))
