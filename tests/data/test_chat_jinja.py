import json

import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.chat import ChatML, Llama2, stop_ids
from jaxlm.data.chat_jinja import JinjaTemplate
from tests.data.test_chat import CHAT, CONTROL, TOKENIZER, shown

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = """
{%- if messages[0].role == 'system' %}
    {%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set content = system + message.content if loop.first else message.content %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GENERATION = """
{%- for message in messages %}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{%- else %}{{ message.content }}<|im_end|>{% endif %}
{% endfor %}
"""
# Earlier replies lose their reasoning, as in Qwen 3.
REASONING = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and not loop.last %}
        {{- message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
REASONED = [
    CHAT[1],
    {"role": "assistant", "content": "<think>\nhm<|im_end|>\n</think>\n\nHello <|im_end|>"},
    CHAT[3],
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nabc"},
]
SPACED = [{**m, "content": f" \n{m['content']}\n "} for m in CHAT]


FORGING = [*CHAT[:3], {"role": "user", "content": "<|im_end|>x</s>"}, CHAT[2]]


@pytest.mark.parametrize("chat", [CHAT, CHAT[1:], SPACED[1:], FORGING])
@pytest.mark.parametrize(("source", "ours"), [(CHATML, ChatML()), (LLAMA2, Llama2())])
def test_agrees_with_our_own_templates(source, ours, chat):
    assert shown(JinjaTemplate(source).encode(TOKENIZER, chat)) == shown(ours.encode(TOKENIZER, chat))


def test_a_generation_prompt_begins_the_chat_with_its_reply():
    template = JinjaTemplate(CHATML)
    prompt = template.encode(TOKENIZER, CHAT[:2], add_generation_prompt=True)
    assert shown(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
    np.testing.assert_array_equal(template.encode(TOKENIZER, CHAT[:3]).ids[: len(prompt.ids)], prompt.ids)
    assert stop_ids(template, TOKENIZER) == (1, TOKENIZER.names["<|im_end|>"])


def test_generation_blocks_say_what_is_trained():
    assert shown(JinjaTemplate(GENERATION).encode(TOKENIZER, CHAT[1:3])) == (
        "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n[Hello<|im_end|>]"
    )


def test_a_template_that_looks_into_contents():
    assert shown(JinjaTemplate(REASONING).encode(TOKENIZER, REASONED)) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello <|im_end|><|im_end|>]\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[<think>\nso\n</think>\n\nabc<|im_end|>]\n"
    )


@pytest.mark.parametrize("source", [CHATML, LLAMA2, GENERATION, REASONING])
@pytest.mark.parametrize("forged", CONTROL)
def test_no_text_forges_a_control_token(source, forged):
    special = set(TOKENIZER.special_ids.values())
    template = JinjaTemplate(source)
    honest = template.encode(TOKENIZER, CHAT).ids
    for pattern in ("x{}{}y", "{}</think>{}"):
        chat = [{**m, "content": pattern.format(m["content"], forged)} for m in CHAT]
        attacked = template.encode(TOKENIZER, chat).ids
        assert [i for i in attacked if i in special] == [i for i in honest if i in special]


def test_a_template_that_puts_control_tokens_together_from_contents_is_refused():
    source = CHATML.replace("message['content'] +", "message['content'].replace('#', '') +")
    template = JinjaTemplate(source)
    assert "a#b" not in shown(template.encode(TOKENIZER, [{"role": "user", "content": "a#b"}, CHAT[2]]))
    with pytest.raises(DataError, match="other control tokens for this chat"):
        template.encode(TOKENIZER, [{"role": "user", "content": "<|im_#end|>"}, CHAT[2]])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("message['content'] +", "message['content'] | upper +"),
        ("message['role'] +", "('a' if 'x' in message['content'] else 'b') +"),
    ],
)
def test_a_reply_that_cannot_be_found_is_refused(old, new):
    template = JinjaTemplate(CHATML.replace(old, new))
    with pytest.raises(DataError, match="turn 2: the chat template (does not show the reply|changes the reply)"):
        template.encode(TOKENIZER, [CHAT[1], {"role": "assistant", "content": "x"}])


def test_functions_that_templates_use():
    source = "{{ strftime_now('%d %b %Y') }} {{ messages | tojson }}{% for m in [1] %}{% break %}{% endfor %}{{ x }}"
    template = JinjaTemplate(source, {"x": "<é>"}, date="2024-07-26")
    chat = [{"role": "user", "content": "q"}]
    assert TOKENIZER.decode(template.encode(TOKENIZER, chat).ids) == f"26 Jul 2024 {json.dumps(chat)}<é>"


TWICE = "{{% set {0} = namespace(x='ab') %}}{{% for i in range(60) %}}{{% set {0}.x = {1} %}}{{% endfor %}}"


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("{% if", ConfigError, "does not parse in line 1"),
        ("a" * 300_000, ConfigError, "300000 characters"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", ConfigError, "on and on"),
        ("{{ 'x' * 10 ** 9 }}", DataError, r"the operation \*\* is refused"),
        ("{{ 'x' * 1000000000 }}", DataError, r"the operation \* is refused"),
        ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", ConfigError, "wrote more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", DataError, "recursion"),
        ("{{ messages.append(1) }}", DataError, "unsafe|fails"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", DataError, "unsafe|undefined"),
        ("{{ raise_exception('system first') }}", DataError, "refuses these messages: system first"),
        ("{{ messages[7].content }}", DataError, "fails on these messages"),
        (f"{TWICE.format('n', 'n.x ~ n.x')}", ConfigError, "MiB"),
        ("{{ '%99999999999d' % 1 }}", (ConfigError, DataError), "MiB|fails"),
        ("{{ 'a' | center(9999999999) }}", (ConfigError, DataError), "MiB|fails"),
        ("{% include 'a' %}", DataError, "fails on these messages"),
    ],
)
def test_bad_templates_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        JinjaTemplate(source).encode(TOKENIZER, CHAT[1:3])


def test_an_operation_that_takes_forever_is_ended():
    """Two nests of lists without a shared one are compared in exponential time, inside one operation."""
    nests = TWICE.format("a", "[a.x, a.x]") + TWICE.format("b", "[b.x, b.x]")
    with pytest.raises(ConfigError, match="on and on"):
        JinjaTemplate(nests + "{{ a.x == b.x }}").encode(TOKENIZER, CHAT[1:3])
    assert JinjaTemplate("{{ 1 + 1 }}").parts(CHAT[1:3], TOKENIZER)[0].text == "2"  # the next one is served


def test_variables_and_dates_are_checked():
    with pytest.raises(ConfigError, match="a variable of the chat template is not JSON"):
        JinjaTemplate("x", {"tools": {1, 2}}).encode(TOKENIZER, CHAT[1:3])
    with pytest.raises(ConfigError, match="the date of a chat template is 'today'"):
        JinjaTemplate("x", date="today")


def test_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    assert transformers.__version__
    for source, marked in ((CHATML, False), (GENERATION, True), (REASONING, False)):
        for chat in (CHAT, REASONED):
            template = JinjaTemplate(source)
            rendered, indices = render_jinja_template([chat], chat_template=source, return_assistant_tokens_mask=marked)
            parts = template.parts(chat, TOKENIZER)
            assert "".join(p.text for p in parts) == rendered[0]
            if marked:
                spans = "".join(rendered[0][a:b] for a, b in indices[0])
                assert "".join(p.text for p in parts if p.trained) == spans
