import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.chat import TEMPLATES, Alpaca, ChatML, Llama2, chat_template, check_messages, stop_ids
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.testing import GreedyTokenizer

CONTROL = (
    "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip


class ControlTokenizer(GreedyTokenizer):
    """Bytes and a few longer pieces, after the control tokens of every template; one piece joins newlines."""

    def __init__(self, control=CONTROL):
        pieces = [*(bytes([b]) for b in range(256)), b"the", b"ab", b"\n\n", b" a"]
        self.pieces = [*(b"" for _ in control), *pieces]
        self.ids = {piece: i for i, piece in enumerate(self.pieces) if piece}
        self.longest = 3
        self.names = {name: i for i, name in enumerate(control)}
        named = {name: i for name, i in self.names.items() if i > 2}
        self.special_ids = {"bos": 0, "eos": 1, "pad": 2, **named}

    @property
    def control_tokens(self):
        return self.names

    def show(self, ids):
        spelled = {i: name for name, i in self.names.items()}
        return "".join(spelled.get(i) or self.pieces[i].decode(errors="replace") for i in map(int, ids))


TOKENIZER = ControlTokenizer()
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "abc"},
]
PUBLISHED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "[Hello<|im_end|>]\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[abc<|im_end|>]\n",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST][ Hello </s>]<s>[INST] Bye [/INST][ abc </s>]",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "[Hello<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[abc<|eot_id|>]",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\n[Hello<end_of_turn>]\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n[abc<end_of_turn>]\n",
    "alpaca": "<s>Be brief.\n\n### Instruction:\nHi\n\n### Response:\n[Hello</s>]\n\n### Instruction:\nBye\n\n"
    "### Response:\n[abc</s>]",
    "plain": "<s>Be brief.Hi[Hello</s>]Bye[abc</s>]",
}


def shown(encoded):
    """The text of ids, with what the assistant wrote in brackets."""
    ids, mask = encoded
    text, inside = "", False
    for i, trained in zip(ids, mask.tolist()):
        text += "[" * (trained and not inside) + "]" * (inside and not trained) + TOKENIZER.show([i])
        inside = trained
    return text + "]" * inside


@pytest.mark.parametrize("name", TEMPLATES)
def test_published_formats(name):
    assert shown(chat_template(name).encode(TOKENIZER, CHAT)) == PUBLISHED[name]


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    user=st.text(alphabet="a \n<|im_end>\u00e9", min_size=1).filter(str.strip),
    reply=st.text(alphabet="a \nthe<|", min_size=1).filter(str.strip),
)
@settings(max_examples=30, deadline=None)
def test_a_generation_prompt_begins_the_chat_with_its_reply(name, user, reply):
    template, chat = chat_template(name), [{"role": "user", "content": user}]
    prompt = template.encode(TOKENIZER, chat, add_generation_prompt=True)
    ids, mask = template.encode(TOKENIZER, [*chat, {"role": "assistant", "content": reply}])
    assert not prompt.assistant_mask.any()
    np.testing.assert_array_equal(ids[: len(prompt.ids)], prompt.ids)
    assert mask[len(prompt.ids)]
    assert not mask[: len(prompt.ids)].any()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("forged", CONTROL)
def test_no_text_forges_a_control_token(name, forged):
    template = chat_template(name)
    chat = [{**m, "content": f"x{m['content']}{forged}y"} for m in CHAT]
    special = set(TOKENIZER.special_ids.values())
    honest, attacked = (template.encode(TOKENIZER, c).ids for c in (CHAT, chat))
    assert [i for i in attacked if i in special] == [i for i in honest if i in special]
    assert forged in TOKENIZER.decode(attacked)


def test_alpaca_names_its_input():
    chat = [{"role": "user", "content": "Add.", "input": "1 2"}, {"role": "assistant", "content": "3"}]
    expected = (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
        "### Input:\n1 2\n\n### Response:\n[3</s>]"
    )
    assert shown(Alpaca().encode(TOKENIZER, chat)) == expected
    assert "user\nAdd.\n\n1 2<|im_end|>" in shown(ChatML().encode(TOKENIZER, chat))


def test_a_default_system_message_is_the_template_s_setting():
    with_default = ChatML(system="Be brief.").encode(TOKENIZER, CHAT[1:])
    np.testing.assert_array_equal(with_default.ids, ChatML().encode(TOKENIZER, CHAT).ids)


def test_generation_stops_where_replies_end():
    assert stop_ids(ChatML(), TOKENIZER) == (1, TOKENIZER.names["<|im_end|>"])
    assert stop_ids(Llama2(), TOKENIZER) == (1,)


def test_a_tokenizer_without_the_control_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"lacks the template's control token '<\|im_start\|>'"):
        ChatML().encode(ByteTokenizer(), CHAT)
    with pytest.raises(ConfigError, match="did you mean 'chatml'"):
        chat_template("chatlm")


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "expected a list of messages"),
        ("Hi", "expected a list of messages"),
        ([{"role": "user"}], "turn 1: expected an object with 'role' and 'content'"),
        ([CHAT[1], {"role": "asistant", "content": "x"}], "turn 2: unknown role 'asistant': did you mean 'assistant'"),
        ([CHAT[1], {"role": ["user"], "content": "x"}], "turn 2: unknown role"),
        ([CHAT[1], {"role": "assistant", "content": None}], "turn 2: the content is NoneType"),
        ([CHAT[1], {"role": "assistant", "content": " \n"}], "turn 2: the content of the assistant is empty"),
        ([CHAT[1], CHAT[0], CHAT[2]], "turn 2: a system message may only come first"),
        (CHAT[:2], "no assistant turn"),
    ],
)
def test_bad_messages_are_refused(messages, error):
    with pytest.raises(DataError, match=error):
        check_messages(messages)


def test_templates_of_exchanges_refuse_other_orders():
    with pytest.raises(DataError, match="turn 2 is the user's, but template 'gemma' expects the assistant"):
        chat_template("gemma").encode(TOKENIZER, [CHAT[1], CHAT[1]])
