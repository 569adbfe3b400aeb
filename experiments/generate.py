"""Samples text from a training run, streaming to the terminal.

python -m experiments.generate --checkpoint runs/pretrain-small --prompt "def "
python -m experiments.generate --checkpoint RUN --prompt "import " --temperature 0 --stop "\\n\\n"
python -m experiments.generate --checkpoint RUN --prompt "class " --num_samples 4 --top_p 0.9 --seed 1
"""

import dataclasses
import sys
from typing import Any

from experiments import runner
from jaxlm.core.errors import ConfigError
from jaxlm.decoding import GenerationConfig


@dataclasses.dataclass(frozen=True)
class Config(GenerationConfig):
    """Where to sample from, and how."""

    checkpoint: str = ""
    """Run folder of `experiments.pretrain`."""
    prompt: tuple[str, ...] = ("",)
    """Texts to continue; an empty one starts a document."""
    step: int | None = None
    """Checkpoint to use; by default the newest good one."""
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_p: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        if not self.checkpoint:
            raise ConfigError("which run? give its folder: --checkpoint runs/pretrain-small")


def run(config: Config) -> None:
    """Prints each prompt with its continuation; several samples are numbered."""
    from jaxlm.decoding import DecoderStepper, generate_text, stream_text
    from jaxlm.training.runs import load_run

    found = load_run(config.checkpoint, step=config.step)
    stepper = DecoderStepper(found.model)
    settings = GenerationConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(GenerationConfig)})
    arguments: tuple[Any, ...] = (stepper, found.params, found.tokenizer)
    if len(config.prompt) == 1 and config.num_samples == 1:
        sys.stdout.write(config.prompt[0])
        for piece in stream_text(*arguments, config.prompt[0], settings):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
        return
    for prompt, samples in zip(config.prompt, generate_text(*arguments, list(config.prompt), settings), strict=True):
        for i, sample in enumerate(samples, 1):
            label = f"{prompt!r} sample {i}" if len(config.prompt) > 1 else f"sample {i}"
            print(f"--- {label} ({len(sample.tokens)} tokens, {sample.finish_reason})")
            print(prompt + sample.text)


if __name__ == "__main__":
    runner.tool(__name__)
