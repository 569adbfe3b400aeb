"""A model's own chat template: Jinja, rendered in a sandbox in a process of its own, every message kept plain text.

Which characters of a rendering are the template's and which a message's is found by rendering twice: with the real
contents, and with an unguessable mark in place of each. Putting the contents into the second rendering must give the
first; then the template alone can have written control tokens, and the places of the replies are known.

Where the two disagree (a template that looks into contents: one that moves or drops reasoning, say), contents are
rendered with each control token in them replaced by a mark. The control tokens of that rendering must then be those
of the rendering with marks, in the same order, or the chat is refused. A reply is what lies between the last piece of
text that a generation prompt would end with and the next control token.
"""

import dataclasses
import datetime
import functools
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data import jinja_process
from jaxlm.data.chat import ChatTemplate, Message, Part, Plain, chat_template, user_text

_MAX_SOURCE = 1 << 18
_MARK = re.compile("(\ue000[0-9a-f]{32}\ue001)")


@dataclasses.dataclass(frozen=True)
class JinjaTemplate(ChatTemplate):
    """A Jinja template as `transformers` renders them (`messages`, `add_generation_prompt`, `bos_token`, ...).

    `variables` (JSON) are passed to the template. `date` is what `strftime_now` formats (ISO, by default today): pin
    it where a template writes the date, or its ids change from day to day. `{% generation %}` blocks, where there are
    any, say what the assistant wrote; otherwise it is what follows the generation prompt (where the chat does not
    begin with that, the reply's content), up to the next control token, that token included.

    Raises `ConfigError` for a template that does not parse, is longer than 256 KiB, runs without end, takes too much
    memory (see `jaxlm.data.jinja_process`) or writes more than 16 MiB, and for a date that is none; `DataError` for
    messages that it refuses (`raise_exception`), that it fails on, or whose rendering cannot be told from the
    template's own text.
    """

    source: str
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: str | None = None

    def __post_init__(self):
        if len(self.source) > _MAX_SOURCE:
            raise ConfigError(f"the chat template has {len(self.source)} characters, expected {_MAX_SOURCE} at most")
        if self.date is not None:
            try:
                datetime.datetime.fromisoformat(self.date)
            except ValueError as error:
                raise ConfigError(f"the date of a chat template is '{self.date}', expected ISO: {error}") from error
        jinja_process.check(self.source)

    def parts(self, messages, tokenizer, *, add_generation_prompt=False):
        spelled = {i: text for text, i in tokenizer.control_tokens.items()}
        named = {
            f"{role}_token": spelled[i] for role, i in tokenizer.special_ids.items() if role in ("bos", "eos", "pad")
            if i in spelled
        }  # fmt: skip
        # One moment for all renderings of a chat: they are compared.
        date = self.date or datetime.datetime.now().isoformat()
        messages = [{**m, "content": user_text(m)} for m in messages]
        render = functools.partial(self._render, named=named, date=date)
        control = _pattern(tokenizer.control_tokens)
        real = _without(*render(messages, add_generation_prompt))
        marks = [_mark() for _ in messages]
        # Templates keep the blanks around a content, or trim them: then the mark takes only the place between.
        for keep in (str, str.strip):
            contents = {mark: keep(m["content"]) for m, mark in zip(messages, marks)}
            replaced = [{**m, "content": m["content"].replace(contents[k], k)} for m, k in zip(messages, marks)]
            marked, ends = render(replaced, add_generation_prompt)
            if "".join(p.text for p in _split(marked, contents, ends, control)) == real:
                if ends[0] not in marked:
                    marked = _with_blocks(marked, replaced, marks, ends, control, render)
                return _split(marked, contents, ends, control)
        render = functools.partial(render, prompt=add_generation_prompt)
        return self._protected(messages, render, control, marked, marks)

    def _protected(
        self,
        messages: Sequence[Message],
        render: Callable,
        control: re.Pattern,
        marked: str,
        marks: Sequence[str],
    ) -> list[Part]:
        """The parts of a chat whose contents the template looks into."""
        hidden: dict[str, str] = {}

        def hide(match: re.Match) -> str:
            mark = _mark()
            hidden[mark] = match[0]
            return mark

        safe, ends = render([{**m, "content": control.sub(hide, m["content"])} for m in messages])
        pieces, expected = _pieces(safe, control), _pieces(marked, control)
        if [c for c, _ in pieces] != [c for c, _ in expected]:
            raise DataError("the chat template writes other control tokens for this chat than its turns call for")
        has_blocks = ends[0] in safe
        prompt, _ = render([{"role": "user", "content": "x"}], prompt=True)
        lead = _pieces(prompt, control)[-1][1]
        reply_marks = [mark for m, mark in zip(messages, marks) if m["role"] == "assistant"]
        if lost := [mark for mark in reply_marks if mark not in marked and not has_blocks]:
            raise DataError(f"turn {marks.index(lost[0]) + 1}: the chat template does not show the reply as it is")
        parts, inside, trained = [], False, False
        for (name, text), (_, frame) in zip(pieces, expected, strict=True):
            if name is not None:
                parts.append(Part(name, True, inside if has_blocks else trained))
            trained = False
            if has_blocks:
                for piece in re.split(f"({'|'.join(map(re.escape, ends))})", text):
                    if piece in ends:
                        inside = piece == ends[0]
                    elif piece:
                        parts.append(Part(_restore(piece, hidden), False, inside))
                continue
            if found := [mark for mark in reply_marks if mark in frame]:
                before = frame[: frame.index(found[0])]
                before = lead if lead and before.startswith(lead) else before
                if not text.startswith(before):
                    turn = marks.index(found[0]) + 1
                    raise DataError(f"turn {turn}: the chat template changes the reply beyond recognition")
                parts.append(Part(_restore(before, hidden)))
                text, trained = text[len(before) :], True
            parts.append(Part(_restore(text, hidden), False, trained))
        return [p for p in parts if p.text]

    def _render(
        self, messages: Sequence[Message], prompt: bool, *, named: Mapping[str, Any], date: str
    ) -> tuple[str, tuple[str, str]]:
        """The rendering with a mark before and after each generation block, and these two marks."""
        ends = (_mark(), _mark())
        variables = {
            "tools": None,
            "documents": None,
            **named,
            **self.variables,
            "messages": [dict(m) for m in messages],
            "add_generation_prompt": prompt,
            "_generation_marks": ends,
        }
        return jinja_process.render(self.source, variables, date), ends


def model_template(name: str, source: str | None) -> ChatTemplate:
    """The template to talk to a model with: by name, or with `auto` its own Jinja `source`, `plain` if it has none."""
    if name != "auto":
        return chat_template(name)
    return JinjaTemplate(source) if source else Plain()


def _mark() -> str:
    return f"\ue000{secrets.token_hex(16)}\ue001"


def _without(text: str, marks: Sequence[str]) -> str:
    for mark in marks:
        text = text.replace(mark, "")
    return text


def _pattern(control: Mapping[str, int]) -> re.Pattern:
    # An empty set of alternatives must match nothing.
    return re.compile("|".join(re.escape(t) for t in sorted(control, key=len, reverse=True) if t) or "(?!)")


def _pieces(text: str, control: re.Pattern) -> list[tuple[str | None, str]]:
    """Control tokens, each with the text up to the next; the first piece has none."""
    found, start, name = [], 0, None
    for match in control.finditer(text):
        found.append((name, text[start : match.start()]))
        start, name = match.end(), match[0]
    return [*found, (name, text[start:])]


def _restore(text: str, hidden: Mapping[str, str]) -> str:
    return _MARK.sub(lambda m: hidden.get(m[0], m[0]), text)


def _with_blocks(
    marked: str,
    messages: Sequence[Message],
    marks: Sequence[str],
    ends: Sequence[str],
    control: re.Pattern,
    render: Callable,
) -> str:
    """A rendering with marks, as if its template had generation blocks.

    A reply begins where the generation prompt of the messages before it ends, if the chat begins with that prompt,
    otherwise with its content; it ends with the control token that follows before any other content.
    """
    for i, (message, mark) in reversed(list(enumerate(zip(messages, marks)))):
        start = marked.find(mark)
        if message["role"] != "assistant" or start < 0:
            continue
        stop = start + len(mark)
        after, other = control.search(marked, stop), _MARK.search(marked, stop)
        if after and (other is None or after.start() < other.start()):
            stop = after.end()
        try:
            prompt = _without(*render(messages[:i], True)) if i else ""
        except DataError:
            prompt = ""
        if prompt and marked.startswith(prompt) and not _MARK.search(marked[len(prompt) : start]):
            start = min(start, len(prompt))
        marked = marked[:start] + ends[0] + marked[start:stop] + ends[1] + marked[stop:]
    return marked


def _split(marked: str, contents: Mapping[str, str], ends: Sequence[str], control: re.Pattern) -> list[Part]:
    """The parts of a rendering with marks: contents in their places, control tokens in the rest."""
    parts: list[Part] = []
    inside = False
    for piece in _MARK.split(marked):
        if piece in ends:
            inside = piece == ends[0]
        elif piece in contents:
            parts.append(Part(contents[piece], False, inside))
        else:
            for name, text in _pieces(piece, control):
                parts += [Part(name, True, inside)] if name is not None else []
                parts += [Part(text, False, inside)] if text else []
    return parts
