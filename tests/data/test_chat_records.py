import json

import pytest

from jaxlm.core.errors import DataError
from jaxlm.data.chat_records import read_chats, read_labeled, read_preferences

HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "chat.jsonl"
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
        return path

    return write


@pytest.mark.parametrize(
    ("row", "messages", "prompt_turns"),
    [
        ({"messages": [HI, HELLO], "id": 3}, (HI, HELLO), None),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, (HI, HELLO), None),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, (HI, HELLO), 1),
        ({"instruction": "Hi", "input": "x", "output": "Hello"}, ({**HI, "input": "x"}, HELLO), 1),
        ({"prompt": "Hi", "completion": "Hello"}, (HI, HELLO), 1),
        ({"prompt": [HI, HELLO, HI], "completion": [HELLO]}, (HI, HELLO, HI, HELLO), 3),
    ],
)
def test_chats_in_the_fields_people_publish(write, row, messages, prompt_turns):
    (found,) = read_chats(write(row))
    assert (found.messages, found.prompt_turns) == (messages, prompt_turns)


def test_preferences_with_a_prompt_or_as_whole_chats(write):
    bye = {"role": "assistant", "content": "Bye"}
    rows = [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"},
        {"prompt": [HI], "chosen": [HELLO], "rejected": [bye]},
        {"chosen": [HI, HELLO], "rejected": [HI, bye]},
    ]
    for record in read_preferences(write(*rows)):
        assert (record.prompt, record.chosen, record.rejected) == ((HI,), (HELLO,), (bye,))


def test_labeled_completions(write):
    row = {"prompt": "Hi", "completion": "Hello", "label": True}
    good, bad = read_labeled(write(row, {**row, "label": False}))
    assert (good.prompt, good.completion, good.label, bad.label) == ((HI,), (HELLO,), True, False)


@pytest.mark.parametrize(
    ("read", "row", "error"),
    [
        (read_chats, "{", "malformed JSON at column"),
        (read_chats, [1], "expected an object, got list"),
        (read_chats, {"text": "x"}, r"expected 'messages', .* \(fields present: text\)"),
        (read_chats, {"messages": [HI]}, "no assistant turn"),
        (read_chats, {"messages": [HI, {"role": "bot", "content": "x"}]}, "turn 2: unknown role 'bot'"),
        (read_chats, {"messages": [HI, {"role": "assistant", "content": ""}]}, "turn 2: the content of the assistant"),
        (read_chats, {"conversations": [{"from": "alien", "value": "x"}]}, "turn 1: unknown role 'alien'"),
        (read_chats, {"conversations": [{"from": ["gpt"], "value": "x"}]}, "turn 1: unknown role"),
        (read_chats, {"conversations": "x"}, "field 'conversations' holds str"),
        (read_chats, {"instruction": "x"}, "field 'output' is missing"),
        (read_chats, {"prompt": "x"}, "no field 'completion'"),
        (read_chats, {"prompt": "x", "completion": [HI]}, "field 'completion': no assistant turn at its end"),
        (read_preferences, {"prompt": "x", "chosen": "y"}, "no field 'rejected'"),
        (read_preferences, {"chosen": "x", "rejected": "y"}, "no field 'prompt', and chosen and rejected share no"),
        (read_preferences, {"prompt": "x", "chosen": "y", "rejected": 3}, "field 'rejected': expected a list"),
        (read_labeled, {"prompt": "x", "completion": "y", "label": 1}, "label is 1, expected true or false"),
    ],
)
def test_errors_name_file_and_line(write, read, row, error):
    path = write({"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c", "label": True}, row)
    with pytest.raises(DataError, match=rf"chat\.jsonl line 2: {error}"):
        list(read(path))


def test_other_files_and_empty_ones_are_refused(write, tmp_path):
    with pytest.raises(DataError, match="holds no records"):
        list(read_chats(write("")))
    (tmp_path / "chat.txt").write_text("x")
    with pytest.raises(DataError, match="expected chats as .jsonl"):
        list(read_chats(tmp_path / "chat.txt"))
