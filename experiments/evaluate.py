"""Loss, perplexity and bits per byte of a training run on any text.

python -m experiments.evaluate --checkpoint runs/pretrain-small --data.path notes.txt
python -m experiments.evaluate --checkpoint RUN --data.path a.jsonl b/ --json results.json
"""

import dataclasses

from experiments import runner
from jaxlm.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text to evaluate on."""

    path: tuple[str, ...] = ()
    """Files, folders or globs, each a source: .txt .md .py .jsonl .parquet (.gz) or ArrayRecord."""
    text_field: str = "text"
    """Field of the text in records."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to evaluate, on what."""

    checkpoint: str = ""
    """Run folder of `experiments.pretrain`."""
    data: TextConfig = TextConfig()
    step: int | None = None
    """Checkpoint to use; by default the newest good one."""
    batch_size: int = 16
    sequence_length: int | None = None
    """Tokens in a row; by default as the run was trained."""
    max_batches: int | None = None
    """Stop early; by default all of the text is used."""
    json: str = ""
    """File to write the results to as well."""

    def __post_init__(self):
        if not self.checkpoint:
            raise ConfigError("which run? give its folder: --checkpoint runs/pretrain-small")
        if not self.data.path:
            raise ConfigError("on what text? give files or folders: --data.path notes.txt")


def run(config: Config) -> None:
    """Prints a line a source."""
    import jax
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from jaxlm.core.json_files import write_json
    from jaxlm.data.pipeline import eval_batches
    from jaxlm.data.prepare import DataConfig, prepare_evaluation
    from jaxlm.data.tokenizers import token_byte_lengths
    from jaxlm.evals import likelihood, make_sums
    from jaxlm.objectives import CausalLM
    from jaxlm.training.runs import load_run

    found = load_run(config.checkpoint, step=config.step)
    length = config.sequence_length or found.meta["config"]["data"]["sequence_length"]
    text = DataConfig(path=config.data.path, text_field=config.data.text_field)
    store = prepare_evaluation(text, found.tokenizer)
    lengths = token_byte_lengths(found.tokenizer)
    lengths = np.pad(lengths, (0, found.model.config.vocab_size - len(lengths)))
    sums = jax.jit(make_sums(CausalLM(found.model), lengths))
    table = Table(title=f"{config.checkpoint}, step {found.step}")
    for column in ("source", "loss", "perplexity", "bits per byte", "tokens", "bytes"):
        table.add_column(column, justify="left" if column == "source" else "right")
    results = {}
    for source in store.source_names:
        batches = eval_batches(
            store, source, batch_size=config.batch_size, length=length, max_batches=config.max_batches
        )
        r = likelihood(sums, found.params, batches)
        results[source] = dataclasses.asdict(r)
        cells = (f"{r.loss:.4f}", f"{r.perplexity:.2f}", f"{r.bits_per_byte:.4f}", f"{r.tokens:,}", f"{r.bytes:,}")
        table.add_row(source, *cells)
    Console().print(table)
    if config.json:
        write_json(config.json, {"checkpoint": config.checkpoint, "step": found.step, "results": results})


if __name__ == "__main__":
    runner.tool(__name__)
