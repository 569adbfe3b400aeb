"""What a loader of a foreign checkpoint returns."""

import dataclasses
from typing import Any

from jaxlm.data.tokenizers import Tokenizer
from jaxlm.models import Decoder, DecoderConfig


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with what it takes to use it."""

    config: DecoderConfig
    params: dict[str, Any]
    """The parameters of `Decoder(config)`; kernels may be packed weights."""
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    """The model's own chat template, Jinja source."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end a generation: end of text, end of turn."""
    add_bos: bool = False
    """Whether the model expects BOS before a text that is not a chat: Llama and Gemma do, Qwen and SmolLM2 do not."""

    @property
    def model(self) -> Decoder:
        return Decoder(self.config)
