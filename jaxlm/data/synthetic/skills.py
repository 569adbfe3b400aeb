"""Short instructions with one right answer, of three kinds: formats to follow, facts to know, skills to have.

    format   Put brackets on lomi.       [lomi]
    facts    What color has Rado?        green
    skills   Reverse lomi.               imol

Each also has a plain form, without an instruction, that a base model may be trained on: `reverse(lomi) = imol`. Formats
and skills can be worked out, so examples held out have other words; facts are those of a `World`, which must be
learned, so examples held out ask in other words for facts that were seen.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.data.chat_records import ChatRecord
from jaxlm.data.packing import Batch, shift
from jaxlm.data.tokenizers.protocol import Tokenizer

KINDS = ("format", "facts", "skills")

COLORS = ("red", "blue", "green", "black", "white", "brown", "pink", "gray")
FOODS = ("rice", "bread", "soup", "fish", "corn", "beans", "eggs", "nuts")
TOOLS = ("saw", "axe", "pen", "rope", "drill", "brush", "spade", "knife")
CITIES = ("Oslo", "Lima", "Rome", "Cairo", "Delhi", "Quito", "Tunis", "Seoul")


class Example(NamedTuple):
    """An instruction and its answer. `skill` and `arguments` say what is asked, whatever the words."""

    kind: str
    skill: str
    arguments: tuple[str, ...]
    question: str
    answer: str


@dataclasses.dataclass(frozen=True)
class World:
    """What is true of so many persons, drawn from a seed: their color, food, tool and city."""

    persons: int = 64
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.persons <= len(_SYLLABLES) ** 2 // 2:
            most = len(_SYLLABLES) ** 2 // 2
            raise ConfigError(f"world.persons is {self.persons}, expected from 1 to {most}")

    @functools.cached_property
    def facts(self) -> Mapping[tuple[str, str], str]:
        """The value of each (attribute, person)."""
        rng = random.Random(f"world {self.seed}")
        names: dict[str, None] = {}
        while len(names) < self.persons:
            names[_word(rng).capitalize()] = None
        return {(a, name): rng.choice(values) for name in names for a, values in ATTRIBUTES.items()}


def draw_examples(
    kind: str, count: int, *, seed: int = 0, exclude: Sequence[Example] = (), world: World | None = None
) -> list[Example]:
    """`count` different examples of a kind, none of them in `exclude`; the first n of more are the same n.

    Examples of formats and skills differ in what is asked, those of facts (of `world`) at least in the words.

    Raises `ConfigError` for an unknown kind, or if there are not so many.
    """
    if kind not in KINDS:
        raise ConfigError(f"no kind '{kind}': {nearest(kind, KINDS)}")
    if count < 1:
        raise ConfigError(f"{count} examples of kind '{kind}', expected at least one")
    rng, facts = random.Random(f"{kind} {seed}"), (world or World()).facts
    taken = {_identity(example) for example in exclude}
    found: list[Example] = []
    in_vain = 0
    while len(found) < count:
        example = _draw(rng, kind, facts)
        if _identity(example) in taken:
            in_vain += 1
            if in_vain == 2000:  # draws in a row without a new one: hardly any are left
                raise ConfigError(f"there are only about {len(found)} other examples of kind '{kind}', not {count}")
            continue
        in_vain = 0
        taken.add(_identity(example))
        found.append(example)
    return found


def is_right(example: Example, reply: str) -> bool:
    """Whether a reply is the answer, blanks around it aside."""
    return reply.strip() == example.answer


def as_record(example: Example) -> ChatRecord:
    """The example as a chat of two turns."""
    turns = ({"role": "user", "content": example.question}, {"role": "assistant", "content": example.answer})
    return ChatRecord(turns, f"{example.kind} {example.question!r}")


def as_text(example: Example) -> tuple[str, str]:
    """The plain form, up to the answer, and the answer: `("reverse(lomi) = ", "imol")`."""
    return f"{example.skill}({','.join(example.arguments)}) = ", example.answer


def text_pairs(example: Example, tokenizer: Tokenizer, *, answers_only: bool = False) -> Batch:
    """The plain form as token pairs (see `jaxlm.data.packing.shift`) between BOS and EOS.

    `answers_only`: with the loss on the answer and EOS alone, as a test of what a model knows.
    """
    before, answer = (tokenizer.encode(text) for text in as_text(example))
    ids = [tokenizer.special_ids["bos"], *before, *answer, tokenizer.special_ids["eos"]]
    weights = np.ones(len(ids))
    if answers_only:
        weights[: 1 + len(before)] = 0
    return shift(np.asarray(ids, np.int32), weights)


# What each skill makes of its arguments.
FORMATS: Mapping[str, Callable[..., str]] = {
    "quote": lambda a: f'"{a}"',
    "brackets": lambda a: f"[{a}]",
    "tag": lambda a: f"<{a}>",
    "capitals": lambda a: a.upper(),
    "list": lambda a, b: f"{a},{b}",
    "pair": lambda a, b: f"{{{a}:{b}}}",
}
ATTRIBUTES: Mapping[str, tuple[str, ...]] = {"color": COLORS, "food": FOODS, "tool": TOOLS, "city": CITIES}
SKILLS: Mapping[str, Callable[..., str]] = {
    "reverse": lambda a: a[::-1],
    "double": lambda a: a + a,
    "first": lambda a: a[0],
    "last": lambda a: a[-1],
    "add": lambda a, b: str(int(a) + int(b)),
    "subtract": lambda a, b: str(int(a) - int(b)),
    "larger": lambda a, b: str(max(int(a), int(b))),
}
_NUMBERS = ("add", "subtract", "larger")
_TWO_WORDS = ("list", "pair")
_LARGEST = 50

_QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "quote": ("Quote {}.", "{} in quotes?", "Put quotes on {}."),
    "brackets": ("Bracket {}.", "{} in brackets?", "Put brackets on {}."),
    "tag": ("Tag {}.", "{} as a tag?", "Make a tag of {}."),
    "capitals": ("Shout {}.", "{} in capitals?", "Write {} large."),
    "list": ("List {} {}.", "{} {} as a list?", "Join {} {}."),
    "pair": ("Pair {} {}.", "{} {} as a pair?", "Map {} to {}."),
    "color": ("What color has {}?", "The color of {}?", "{} has what color?"),
    "food": ("What does {} eat?", "The food of {}?", "{} eats what?"),
    "tool": ("What tool has {}?", "The tool of {}?", "{} has what tool?"),
    "city": ("Where lives {}?", "The city of {}?", "{} lives where?"),
    "reverse": ("Reverse {}.", "{} backwards?", "Turn {} around."),
    "double": ("Double {}.", "{} twice?", "Say {} twice."),
    "first": ("First of {}?", "{} begins with?", "Which sign begins {}?"),
    "last": ("Last of {}?", "{} ends with?", "Which sign ends {}?"),
    "add": ("Add {} {}.", "{} plus {}?", "Sum of {} {}?"),
    "subtract": ("Subtract {} {}.", "{} minus {}?", "Take from {} {}."),
    "larger": ("Larger of {} {}?", "{} or {}, the larger?", "Maximum of {} {}?"),
}
_OPENINGS = ("", "Now: ", "Say: ", "Task: ")
_SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")


def _draw(rng: random.Random, kind: str, facts: Mapping[tuple[str, str], str]) -> Example:
    if kind == "facts":
        skill, name = rng.choice(list(facts))
        arguments, answer = (name,), facts[skill, name]
    else:
        does = FORMATS if kind == "format" else SKILLS
        skill = rng.choice(list(does))
        if skill in _NUMBERS:
            numbers = [rng.randrange(_LARGEST), rng.randrange(_LARGEST)]
            if skill == "subtract":
                numbers.sort(reverse=True)
            arguments = tuple(map(str, numbers))
        else:
            arguments = tuple(_word(rng) for _ in range(2 if skill in _TWO_WORDS else 1))
        answer = does[skill](*arguments)
    question = rng.choice(_OPENINGS) + rng.choice(_QUESTIONS[skill]).format(*arguments)
    return Example(kind, skill, arguments, question, answer)


def _word(rng: random.Random) -> str:
    return rng.choice(_SYLLABLES) + rng.choice(_SYLLABLES)


def _identity(example: Example) -> tuple:
    return (example.question,) if example.kind == "facts" else (example.skill, *example.arguments)
