"""Chats as token ids: messages, the published templates, and which tokens the assistant wrote.

A template turns messages into parts: control tokens, which it alone writes, and text, which is encoded as plain text
whatever it spells. So no message can forge a control token. (A template without control tokens, such as Alpaca's,
marks its turns by plain text, which a message can imitate; that is the format's nature.)

A model's own Jinja template is in `jaxlm.data.chat_jinja`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxlm.core.errors import ConfigError, DataError, nearest
from jaxlm.data.tokenizers.protocol import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, str]


class Part(NamedTuple):
    """A piece of a rendered chat: plain text, or a control token by its spelling or role (`bos`, `eos`).

    `trained`: written by the assistant.
    """

    text: str
    control: bool = False
    trained: bool = False


class Encoded(NamedTuple):
    """Ids, and of the same length whether the assistant wrote each, its end-of-turn token included."""

    ids: Int[np.ndarray, "n"]
    assistant_mask: Bool[np.ndarray, "n"]


class ChatTemplate:
    """Messages to ids. A new template writes `parts`."""

    def parts(
        self, messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = False
    ) -> list[Part]:
        """The chat as parts in order; `DataError` for messages that the template has no place for."""
        raise NotImplementedError

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> Encoded:
        """The ids of a chat and the assistant's mask; with `add_generation_prompt`, up to where a reply begins.

        A generation prompt's ids are a prefix of those of the chat with its reply: between control tokens text is
        encoded in one piece, unless a token would join what comes before a reply with the reply.

        Raises `DataError` for bad messages, `ConfigError` if the tokenizer lacks a control token of the template.
        """
        check_messages(messages, need_reply=False)
        return encode_parts(tokenizer, self.parts(messages, tokenizer, add_generation_prompt=add_generation_prompt))


def chat_template(name: str) -> ChatTemplate:
    """A published template with its defaults, by name (see `TEMPLATES`)."""
    if name not in TEMPLATES:
        raise ConfigError(f"no chat template '{name}': {nearest(name, TEMPLATES)}")
    return TEMPLATES[name]()


def check_messages(messages: Any, *, need_reply: bool = True) -> None:
    """Raises `DataError`, naming the turn (from 1), unless the messages are a chat.

    A chat is a list of `{"role": ..., "content": ...}` with known roles and text that is not blank, a system message
    at most at its beginning, and with `need_reply` an assistant's turn.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"expected a list of messages, got {_shown(messages)}")
    for turn, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise DataError(f"turn {turn}: expected an object with 'role' and 'content', got {_shown(message)}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise DataError(f"turn {turn}: unknown role {role!r}: {nearest(str(role), ROLES)}")
        if not isinstance(content, str):
            raise DataError(f"turn {turn}: the content is {type(content).__name__}, expected text")
        if not content.strip():
            raise DataError(f"turn {turn}: the content of the {role} is empty")
        if role == "system" and turn > 1:
            raise DataError(f"turn {turn}: a system message may only come first")
    if need_reply and not any(m["role"] == "assistant" for m in messages):
        raise DataError("no assistant turn: nothing to train on")


def stop_ids(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end the assistant's turn: what generation stops at, EOS included.

    Raises `ConfigError` if no special token ends a turn: a model trained so would never learn to stop.
    """
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids, mask = template.encode(tokenizer, chat)
    special = set(tokenizer.special_ids.values())
    found = {int(i) for i in ids[mask] if int(i) in special}
    if not found:
        raise ConfigError("the chat template ends the assistant's turn with no special token of the tokenizer")
    return tuple(sorted(found | {tokenizer.special_ids["eos"]}))


def encode_parts(tokenizer: Tokenizer, parts: Sequence[Part]) -> Encoded:
    """The ids of parts; text between control tokens is encoded in one piece (see `ChatTemplate.encode`)."""
    ids: list[int] = []
    mask: list[bool] = []
    run: list[Part] = []
    for part in parts:
        if not part.control:
            run.append(part)
            continue
        _encode_run(tokenizer, run, ids, mask)
        run = []
        ids.append(control_id(tokenizer, part.text))
        mask.append(part.trained)
    _encode_run(tokenizer, run, ids, mask)
    return Encoded(np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=bool))


def control_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of a control token by role or spelling; `ConfigError` if the tokenizer has none such."""
    known = {**tokenizer.control_tokens, **tokenizer.special_ids}
    if name not in known:
        raise ConfigError(f"the tokenizer lacks the template's control token '{name}': {nearest(name, known)}")
    return known[name]


def user_text(message: Message) -> str:
    """A message's content, followed by its `input` (Alpaca's second field) where it has one."""
    return f"{message['content']}\n\n{message['input']}" if message.get("input") else message["content"]


@dataclasses.dataclass(frozen=True)
class ChatML(ChatTemplate):
    """`<|im_start|>role, newline, content<|im_end|>, newline` (Qwen, SmolLM2); `system` where a chat has none."""

    system: str | None = None

    def parts(self, messages, tokenizer, *, add_generation_prompt=False):
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        parts = []
        for message in messages:
            reply = message["role"] == "assistant"
            parts += [Part("<|im_start|>", True), Part(f"{message['role']}\n")]
            parts += [Part(user_text(message), False, reply), Part("<|im_end|>", True, reply), Part("\n")]
        return parts + ([Part("<|im_start|>", True), Part("assistant\n")] if add_generation_prompt else [])


@dataclasses.dataclass(frozen=True)
class Llama2(ChatTemplate):
    """`<s>[INST] user [/INST] assistant </s>`, the system message between `<<SYS>>` marks in the first turn.

    The marks are plain text, as in the released code (facebookresearch/llama); contents are stripped.
    """

    system: str | None = None

    def parts(self, messages, tokenizer, *, add_generation_prompt=False):
        system, turns = _exchanges(messages, "llama2", self.system)
        parts = []
        for i, message in enumerate(turns):
            text = user_text(message).strip()
            if message["role"] == "assistant":
                parts += [Part(f" {text} ", False, True), Part("eos", True, True)]
                continue
            before = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and i == 0 else ""
            parts += [Part("bos", True), Part(f"[INST] {before}{text} [/INST]")]
        return parts


@dataclasses.dataclass(frozen=True)
class Llama3(ChatTemplate):
    """`<|start_header_id|>role<|end_header_id|>`, blank line, stripped content, `<|eot_id|>` (Llama 3 model card)."""

    system: str | None = None

    def parts(self, messages, tokenizer, *, add_generation_prompt=False):
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        parts = [Part("<|begin_of_text|>", True)]
        for message in messages:
            reply = message["role"] == "assistant"
            parts += self._header({"tool": "ipython"}.get(message["role"], message["role"]))
            parts += [Part(user_text(message).strip(), False, reply), Part("<|eot_id|>", True, reply)]
        return parts + (self._header("assistant") if add_generation_prompt else [])

    @staticmethod
    def _header(role: str) -> list[Part]:
        return [Part("<|start_header_id|>", True), Part(role), Part("<|end_header_id|>", True), Part("\n\n")]


@dataclasses.dataclass(frozen=True)
class Gemma(ChatTemplate):
    """`<start_of_turn>user` and `model`, `<end_of_turn>`; contents stripped, a system message before the first turn."""

    def parts(self, messages, tokenizer, *, add_generation_prompt=False):
        system, turns = _exchanges(messages, "gemma")
        parts = [Part("bos", True)]
        for i, message in enumerate(turns):
            reply = message["role"] == "assistant"
            text = user_text(message).strip()
            text = f"{system.strip()}\n\n{text}" if system and i == 0 else text
            parts += [Part("<start_of_turn>", True), Part("model\n" if reply else "user\n")]
            parts += [Part(text, False, reply), Part("<end_of_turn>", True, reply), Part("\n")]
        return parts + ([Part("<start_of_turn>", True), Part("model\n")] if add_generation_prompt else [])


@dataclasses.dataclass(frozen=True)
class Alpaca(ChatTemplate):
    """Instruction, input and response under `###` headings (tatsu-lab/stanford_alpaca); a reply ends with EOS.

    A system message takes the place of the sentence before the headings.
    """

    def parts(self, messages, tokenizer, *, add_generation_prompt=False):
        system, turns = _exchanges(messages, "alpaca")
        parts = [Part("bos", True)]
        for i, message in enumerate(turns):
            if message["role"] == "assistant":
                parts += [Part(message["content"], False, True), Part("eos", True, True)]
                continue
            given = message.get("input")
            task = "that describes a task" + (", paired with an input that provides further context" if given else "")
            ask = "Write a response that appropriately completes the request."
            begin = system or f"Below is an instruction {task}. {ask}"
            fields = f"### Instruction:\n{message['content']}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
            parts.append(Part((f"{begin}\n\n" if i == 0 else "\n\n") + f"{fields}### Response:\n"))
        return parts


@dataclasses.dataclass(frozen=True)
class Plain(ChatTemplate):
    """BOS, the prompt, the completion as they are, EOS: for prompts that bring their own format."""

    def parts(self, messages, tokenizer, *, add_generation_prompt=False):
        system, turns = _exchanges(messages, "plain")
        parts = [Part("bos", True), *([Part(system)] if system else [])]
        for message in turns:
            reply = message["role"] == "assistant"
            parts += [Part(user_text(message), False, reply), *([Part("eos", True, True)] if reply else [])]
        return parts


TEMPLATES = {
    "chatml": ChatML,
    "llama2": Llama2,
    "llama3": Llama3,
    "gemma": Gemma,
    "alpaca": Alpaca,
    "plain": Plain,
}


def _exchanges(
    messages: Sequence[Message], template: str, system: str | None = None
) -> tuple[str | None, list[Message]]:
    """The system message and the turns; `DataError` unless user and assistant alternate."""
    turns = list(messages)
    if turns[0]["role"] == "system":
        system, turns = turns[0]["content"], turns[1:]
    first = len(messages) - len(turns) + 1
    for i, message in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if message["role"] != expected:
            found = f"turn {first + i} is the {message['role']}'s"
            raise DataError(f"{found}, but template '{template}' expects the {expected}")
    return system, turns


def _encode_run(tokenizer: Tokenizer, parts: Sequence[Part], ids: list[int], mask: list[bool]) -> None:
    """Appends the ids of text parts, encoded together as far as the beginning of replies allows."""
    parts = [p for p in parts if p.text]
    if not parts:
        return
    text = "".join(p.text for p in parts)
    found, spans = tokenizer.encode_with_offsets(text)
    for index, cut in _reply_starts(parts):
        before = tokenizer.encode(text[:cut])
        # What generation starts from must be what training saw before the reply.
        if list(found[: len(before)]) != list(before) or _straddles(spans, cut):
            _encode_run(tokenizer, parts[:index], ids, mask)
            _encode_run(tokenizer, parts[index:], ids, mask)
            return
    trained = np.concatenate([np.full(len(p.text), p.trained) for p in parts])
    ids.extend(found)
    mask.extend(bool(trained[min(start, len(trained) - 1)]) for start, _ in spans)


def _reply_starts(parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    at = 0
    for i, part in enumerate(parts):
        if i and part.trained and not parts[i - 1].trained:
            yield i, at
        at += len(part.text)


def _straddles(spans: Sequence[tuple[int, int]], cut: int) -> bool:
    return any(start < cut < end for start, end in spans)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
