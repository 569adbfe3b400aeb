"""Fine-tuning data from JSON lines: chats, preferences, and labeled completions, in the fields people publish.

Every record is checked as it is read; errors name the file, the line, and the turn.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxlm.core.errors import DataError
from jaxlm.data.chat import Message, check_messages
from jaxlm.data.sources import json_lines, list_files

Messages = tuple[Message, ...]
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


class ChatRecord(NamedTuple):
    """A chat; `prompt_turns`: how many of its messages are the prompt, where the record says so."""

    messages: Messages
    where: str
    prompt_turns: int | None = None


class PreferenceRecord(NamedTuple):
    """A prompt with a better and a worse completion, each one message or more."""

    prompt: Messages
    chosen: Messages
    rejected: Messages
    where: str


class LabeledRecord(NamedTuple):
    """A prompt and a completion that is desirable or not."""

    prompt: Messages
    completion: Messages
    label: bool
    where: str


def read_chats(path: str | Path) -> Iterator[ChatRecord]:
    """Chats from a `.jsonl` file, a folder or a glob, by the fields of each line.

    `messages` (role and content); `conversations` (ShareGPT: from and value); `instruction`, `input` (may be absent or
    empty) and `output` (Alpaca); `prompt` and `completion`, texts or lists of messages. Alpaca's input is kept apart
    as the user message's `input`.
    """
    return _read(path, _chat)


def read_preferences(path: str | Path) -> Iterator[PreferenceRecord]:
    """Preferences with `prompt`, `chosen`, `rejected`: texts, or lists of messages.

    Without `prompt`, the two are whole chats, and what they share at their beginning is the prompt.
    """
    return _read(path, _preference)


def read_labeled(path: str | Path) -> Iterator[LabeledRecord]:
    """Completions with `prompt`, `completion` (texts, or lists of messages) and `label`, true or false."""
    return _read(path, _labeled)


Record = TypeVar("Record")


def _read(path: str | Path, parse: Callable[[Mapping[str, Any], str], Record]) -> Iterator[Record]:
    empty = True
    for file, _ in list_files(path):
        if not file.name.lower().endswith((".jsonl", ".jsonl.gz")):
            raise DataError(f"{file}: expected chats as .jsonl or .jsonl.gz")
        for number, row in json_lines(file):
            where = f"{file} line {number}"
            if not isinstance(row, Mapping):
                raise DataError(f"{where}: expected an object, got {type(row).__name__}")
            try:
                yield parse(row, where)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            empty = False
    if empty:
        raise DataError(f"{path} holds no records")


def _chat(row: Mapping[str, Any], where: str) -> ChatRecord:
    if "messages" in row:
        check_messages(row["messages"])
        return ChatRecord(_plain(row["messages"]), where)
    if "conversations" in row:
        messages = _sharegpt(row["conversations"])
        check_messages(messages)
        return ChatRecord(_plain(messages), where)
    if "instruction" in row:
        user = {"role": "user", "content": _text(row, "instruction")}
        if row.get("input"):
            user["input"] = _text(row, "input")
        messages = (user, {"role": "assistant", "content": _text(row, "output")})
        check_messages(messages)
        return ChatRecord(messages, where, 1)
    if "prompt" in row:
        prompt, completion = _side(row, "prompt", "user"), _side(row, "completion", "assistant")
        _check_completion(prompt, completion, "completion")
        return ChatRecord(prompt + completion, where, len(prompt))
    raise DataError(
        "expected 'messages', 'conversations', 'instruction' and 'output', or 'prompt' and 'completion' "
        f"(fields present: {_fields(row)})"
    )


def _preference(row: Mapping[str, Any], where: str) -> PreferenceRecord:
    chosen, rejected = _side(row, "chosen", "assistant"), _side(row, "rejected", "assistant")
    if "prompt" in row:
        prompt = _side(row, "prompt", "user")
    else:
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise DataError("no field 'prompt', and chosen and rejected share no message at their beginning")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        _check_completion(prompt, side, name)
    return PreferenceRecord(prompt, chosen, rejected, where)


def _labeled(row: Mapping[str, Any], where: str) -> LabeledRecord:
    prompt, completion = _side(row, "prompt", "user"), _side(row, "completion", "assistant")
    _check_completion(prompt, completion, "completion")
    if not isinstance(row.get("label"), bool):
        raise DataError(f"label is {row.get('label')!r}, expected true or false")
    return LabeledRecord(prompt, completion, row["label"], where)


def _side(row: Mapping[str, Any], name: str, role: str) -> Messages:
    """A field as messages: a text is one of the given role."""
    if name not in row:
        raise DataError(f"no field '{name}' (fields present: {_fields(row)})")
    if isinstance(row[name], str):
        return ({"role": role, "content": row[name]},)
    try:
        check_messages(row[name], need_reply=False)
    except DataError as error:
        raise DataError(f"field '{name}': {error}") from error
    return _plain(row[name])


def _check_completion(prompt: Messages, completion: Messages, name: str) -> None:
    if not completion or completion[-1]["role"] != "assistant":
        raise DataError(f"field '{name}': no assistant turn at its end")
    check_messages([*prompt, *completion])


def _sharegpt(turns: Any) -> list[Message]:
    if not isinstance(turns, list):
        raise DataError(f"field 'conversations' holds {type(turns).__name__}, expected a list")
    messages = []
    for turn, message in enumerate(turns, 1):
        if not isinstance(message, Mapping) or not {"from", "value"} <= set(message):
            raise DataError(f"turn {turn}: expected an object with 'from' and 'value'")
        role = message["from"] if isinstance(message["from"], str) else ""
        # An unknown name goes on as it is: checking the messages names it.
        messages.append({"role": _SHAREGPT_ROLES.get(role, message["from"]), "content": message["value"]})
    return messages


def _plain(messages: Any) -> Messages:
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _text(row: Mapping[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        raise DataError(f"field '{name}' is missing or not text (fields present: {_fields(row)})")
    return row[name]


def _fields(row: Mapping[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"
