"""Text that others write to be understood: chat templates, and answers of models."""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.target import Target
from tests.interop.checkpoints import tokenizer_definition

_EXPRESSIONS = (
    "messages", "messages[0]", "messages[0].content", "messages[-1]['role']", "ns.s", "x", "loop", "bos_token",
    "undefined.a",
    "'ab' * 9999999", "'a' * 3", "ns.s ~ ns.s", "[ns.s, ns.s]", "range(99999)", "2 ** 9999", "9999999 * 9999999",
    "'%9999999999d' % 1", "'{:>9999999999}'.format(1)", "'a'.ljust(99999999999)", "''.__class__", "messages.append(1)",
    "messages | tojson(indent=999999999)", "messages | join('a')", "lipsum(99)", "ns.s | center(999999999)", "x | list",
    "strftime_now('%Y')", "raise_exception('no')", "messages | map(attribute='content') | list", "self", "cycler('a')",
    "(ns.s, ns.s) == (ns.s, ns.s)", "{'a': messages} | items | list", "dict(a=1) | xmlattr", "ns.s | replace('', ns.s)",
    "x | int // 0", "messages | batch(999999999, 'x') | list", "'a' | indent(999999999)", "1e308 * 10", "'a' in ns.s",
    "joiner(', ')()", "ns.s[::-1]", "messages | groupby('role')", "none | length", "ns | pprint", "caller()",
)  # fmt: skip


def _templates() -> st.SearchStrategy[str]:
    expression = st.sampled_from(_EXPRESSIONS)
    leaf = st.one_of(
        expression.map(lambda e: "{{ " + e + " }}"),
        expression.map(lambda e: "{% set ns.s = " + e + " %}"),
        expression.map(lambda e: "{% set x = " + e + " %}"),
        st.sampled_from(("text<|im_end|>", "{% break %}", "{# c #}", "{%", "}}", "{% endfor %}", "{% include 'a' %}")),
        st.just("\ud800"),
        st.text(max_size=5),
    )

    def around(body: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        joined = st.lists(body, max_size=3).map("".join)
        frames = (
            "{% for m in messages %}B{% endfor %}", "{% for i in range(40) %}B{% endfor %}",
            "{% if x is defined %}B{% else %}B{% endif %}", "{% generation %}B{% endgeneration %}",
            "{% macro f() %}B{% endmacro %}{{ f() }}", "{% set x %}B{% endset %}", "{% filter upper %}B{% endfilter %}",
            "{% for i in range(99999) %}B{% endfor %}", "{% call f() %}B{% endcall %}",
        )  # fmt: skip
        return st.tuples(st.sampled_from(frames), joined).map(lambda case: case[0].replace("B", case[1]))

    return st.lists(st.recursive(leaf, around, max_leaves=4), max_size=4).map(
        lambda parts: "{% set ns = namespace(s='ab') %}" + "".join(parts)
    )


def render_template(source: str, folder: Path) -> None:
    from jaxlm.data.chat_jinja import JinjaTemplate
    from jaxlm.data.tokenizers import HuggingFaceTokenizer

    tokenizer = _chat_tokenizer()
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    chat = [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]
    JinjaTemplate(source).encode(tokenizer, chat)


@functools.cache
def _chat_tokenizer() -> Any:
    from jaxlm.data.tokenizers import HuggingFaceTokenizer

    return HuggingFaceTokenizer(tokenizer_definition(), bos="<|im_start|>", eos="<|im_end|>", pad="<|endoftext|>")


def _answers() -> st.SearchStrategy[str]:
    pieces = (
        "\\boxed{", "}", "{", "$", "####", "1,234", "-", ".", "\\frac", "\\sqrt", "^", "/", "9" * 400, "answer is",
        "\n",
        "(", ")", "%", "1. ", "2. send($1, ", "$1", "'",
        "```python", "```", "def f():", "\u0661", "\u00bd", "e999", "**", " " * 50, "<think>", "\\text{",
    )  # fmt: skip
    return st.lists(st.sampled_from(pieces) | st.text(max_size=4), max_size=12).map("".join)


def read_answer(text: str, folder: Path) -> None:
    from jaxlm.verify import _wire, answers, code, plans

    for read in (answers.gsm8k_strict, answers.gsm8k_flexible, answers.last_number, answers.parse_number,
                 answers.last_boxed, answers.math_answer, answers.choice_letter, answers.squad_normalize):  # fmt: skip
        read(text)
    answers.mgsm_answer(text, "en")
    answers.math_equal(text, text[1:])
    answers.numbers_equal(text, "1")
    answers.f1(text, [text[1:]])
    code.extract_code(text)
    with contextlib.suppress(_wire.WireError, ValueError, RecursionError):
        _wire.decode(json.loads(text), lambda number, name: None)
    plans.parse_plan(text)


TARGETS: dict[str, Target] = {
    "chat_template": Target(_templates, render_template, cost=40),
    "answers": Target(_answers, read_answer),
}
