"""Plans of function calls as graphs, and whether two are the same.

A plan has a call a line, each with its number, and `$n` where an argument is the result of call n:

    1. find_contact("Ada")
    2. read_file("notes")
    3. summarize($2)
    4. send($1, $3)

The order of calls and their numbers say nothing by themselves: two plans are the same if their graphs are isomorphic,
as TinyAgent judges them (Erdogan et al. 2024, arXiv 2409.00608).
"""

import re
from collections import Counter
from typing import NamedTuple

from jaxlm.core.errors import DataError

_DIGITS = 9  # Models write any number, and Python converts none of thousands of digits.
_LINE = re.compile(rf"\s*(\d{{1,{_DIGITS}}})\s*\.\s*(\w+)\s*\((.*)\)\s*")
_RESULT = re.compile(r"\$\s*(\d+)")
_ARGUMENT = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^,"']*)\s*(?:,|$)""")


class Call(NamedTuple):
    """`arguments`: texts, and whole numbers where an argument is the result of the call at that place of the plan."""

    function: str
    arguments: tuple[str | int, ...]


Plan = tuple[Call, ...]


def parse_plan(text: str, end: str = "join") -> Plan:
    """The calls of a plan; lines that are empty are left out, and so is a last call of `end`.

    Raises `DataError` naming the line: no call, a number twice, a result of a call that does not come before.
    """
    places: dict[int, int] = {}
    calls: list[Call] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found = _LINE.fullmatch(line)
        if not found:
            raise DataError(f"line {number} of the plan is no numbered call: {line.strip()[:80]!r}")
        name = int(found[1])
        if name in places:
            raise DataError(f"line {number} of the plan has the number {name} again")
        calls.append(Call(found[2], tuple(_argument(x, places, number) for x in _split(found[3], number))))
        places[name] = len(calls) - 1
    if calls and calls[-1].function == end:
        calls.pop()
    if not calls:
        raise DataError("the plan has no call")
    return tuple(calls)


def same_plan(plan: Plan, other: Plan, *, arguments: bool = True) -> bool:
    """Whether the graphs of two plans are isomorphic: the same calls of the same results, in whatever order.

    `arguments`: texts must agree too; otherwise functions and what they depend on decide alone.
    """
    mine, theirs = ([_label(call, arguments) for call in p] for p in (plan, other))
    if Counter(mine) != Counter(theirs):
        return False
    matched: dict[int, int] = {}

    def extend(i: int) -> bool:
        if i == len(plan):
            return True
        # Arguments come from earlier calls, which are matched already.
        wanted = tuple(matched[x] if isinstance(x, int) else None for x in plan[i].arguments)
        for j, call in enumerate(other):
            given = tuple(x if isinstance(x, int) else None for x in call.arguments)
            if j not in matched.values() and theirs[j] == mine[i] and given == wanted:
                matched[i] = j
                if extend(i + 1):
                    return True
                del matched[i]
        return False

    return extend(0)


def plans_equal(text: str, reference: str, *, arguments: bool = True) -> bool:
    """`same_plan` of two texts; a text that is no plan equals none. Raises `DataError` for a bad reference."""
    expected = parse_plan(reference)
    try:
        return same_plan(parse_plan(text), expected, arguments=arguments)
    except DataError:
        return False


def _label(call: Call, arguments: bool) -> tuple:
    shown = tuple("$" if isinstance(x, int) else (x if arguments else "") for x in call.arguments)
    return call.function, shown


def _split(text: str, line: int) -> list[str]:
    found, at = [], 0
    while at < len(text):
        match = _ARGUMENT.match(text, at)
        if not match or match.end() == at:
            raise DataError(f"line {line} of the plan has arguments that cannot be read: {text[:80]!r}")
        found.append(match[1].strip())
        at = match.end()
    return found


def _argument(text: str, places: dict[int, int], line: int) -> str | int:
    result = _RESULT.fullmatch(text)
    if not result:
        return text[1:-1] if len(text) > 1 and text[0] in "\"'" else text
    name = int(result[1]) if len(result[1]) <= _DIGITS else None
    if name not in places:
        raise DataError(f"line {line} of the plan takes ${result[1][:80]}, the result of no call before it")
    return places[name]
