"""A conversation with a model: what was said, and the next reply as it is made."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.chat import ChatTemplate, stop_ids
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding.generate import GenerationConfig
from jaxlm.decoding.stepper import DecoderStepper
from jaxlm.decoding.text import stream_text


@dataclasses.dataclass
class ChatSession:
    """Messages that grow by turns.

    `config.max_new_tokens` bounds a reply. Where conversation and reply would not fit in the model's context, the
    oldest exchanges are left out of what the model sees (the system message stays).
    """

    model: Any
    params: Any
    tokenizer: Tokenizer
    template: ChatTemplate
    config: GenerationConfig
    stops: Sequence[int] = ()
    system: str = ""

    def __post_init__(self):
        if self.tokenizer is None:
            raise ConfigError("the model comes without a tokenizer")
        self._stops = tuple({*self.stops, *stop_ids(self.template, self.tokenizer)})
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def send(self, text: str) -> Iterator[str]:
        """Pieces of the reply to a user's turn. A reply that is not read to its end is kept as far as it got."""
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        try:
            ids = self._prompt()
            stepper = DecoderStepper(self.model)
            for piece in stream_text(stepper, self.params, self.tokenizer, ids, self.config, stop_ids=self._stops):
                said.append(piece)
                yield piece
        finally:
            reply = "".join(said)
            if reply.strip():
                self.messages.append({"role": "assistant", "content": reply})
            else:
                self.messages.pop()

    def _prompt(self) -> list[int]:
        """The ids of the conversation, as much of its end as leaves room for a reply."""
        first = 1 if self.messages[0]["role"] == "system" else 0
        room = self.model.config.max_length - self.config.max_new_tokens
        for start in range(first, len(self.messages), 2):
            kept = [*self.messages[:first], *self.messages[start:]]
            ids = self.template.encode(self.tokenizer, kept, add_generation_prompt=True).ids
            if len(ids) <= room:
                return ids.tolist()
        raise DataError(
            f"the message has {len(ids)} tokens and {self.config.max_new_tokens} are kept for the reply, but the "
            f"model's context is {self.model.config.max_length}"
        )
