"""Shows the batch of any step of a run as the model saw it: texts, sources, loss weights, masks.

    python -m experiments.inspect_batch runs/pretrain-small --step 17
    python -m experiments.inspect_batch RUN --step 17 --rows 0 5 --json batch.json

The batch is made again from what the run folder records (configuration, state of the data, mixture) and from the data
themselves; data that have changed are refused. Runs of `experiments.pretrain` and `experiments.finetune`.
"""

import dataclasses
import importlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from experiments import runner
from jaxlm.core.configs import from_dict
from jaxlm.core.errors import CheckpointError, ConfigError

EXPERIMENTS = ("pretrain", "finetune")
"""Modules of `experiments` with `Config` and `recorded_batches`."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Which batch to show."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    step: int = 1
    """Number of the step, from 1; steps that are not trained yet can be looked at as well."""
    rows: tuple[int, ...] = ()
    """Rows of the batch to show, from 0; by default all."""
    json: str = ""
    """File to write it to as well, with the arrays themselves."""


def run(config: Config) -> None:
    """Prints the batch."""
    from jaxlm.core.json_files import write_json

    found = rebuild(config.run, config.step)
    rows = found.check_rows(config.rows)
    print(found.title)
    for row in rows:
        for line in found.describe(row):
            print(line)
    if config.json:
        chosen = {name: x[list(rows)].tolist() for name, x in found.batch.items()}
        batch = {**found.provenance, "rows": [found.provenance["rows"][row] for row in rows]}
        facts = {"run": str(config.run), "step": config.step, "learning_rate": found.learning_rate}
        write_json(config.json, {**facts, "logged": found.logged, "numbers": rows, "batch": batch, "arrays": chosen})


@dataclasses.dataclass(frozen=True)
class Found:
    """A batch made again. `batch`: the arrays of all rows, of all processes; `provenance`: where they come from;
    `logged`: what the run measured at that step, if it came so far."""

    title: str
    batch: Mapping[str, np.ndarray]
    provenance: Mapping[str, Any]
    learning_rate: float
    logged: Mapping[str, Any] | None
    tokenizer: Any

    def check_rows(self, rows: tuple[int, ...]) -> list[int]:
        """The rows to show; `ConfigError` for one that is not there."""
        count = len(self.batch["inputs"])
        for row in rows:
            if not 0 <= row < count:
                raise ConfigError(f"--rows {row}: the batch has {count} rows, expected 0 to {count - 1}")
        return list(rows) or list(range(count))

    def describe(self, row: int) -> Iterator[str]:
        """The lines that show a row."""
        about = self.provenance["rows"][row]
        source = f"{about['source']}, " if "source" in about else ""
        label = f"; label {self.batch['labels'][row]:g}" if "labels" in self.batch else ""
        place = f"{source}row {about['row']} of the data, epoch {about['epoch']}"
        yield f"row {row}: {place}; loss weight {about['weight']:g}{label}"
        pieces = iter(about["pieces"])
        unit = "document" if "source" in about else "example"
        for prefix in ("", "kl_"):
            if f"{prefix}inputs" not in self.batch:
                continue
            arrays = {name: self.batch[prefix + name][row] for name in _ARRAYS}
            members = arrays["inputs"].ndim == 2
            for member in range(len(arrays["inputs"]) if members else 1):
                name = ("chosen" if member == 0 else "rejected") if members else "mismatched" if prefix else ""
                shown = {key: x[member] if members else x for key, x in arrays.items()}
                yield from self._segments(shown, name, unit, pieces if not prefix else iter(()))

    def _segments(self, arrays: Mapping[str, np.ndarray], name: str, unit: str, pieces: Iterator) -> Iterator[str]:
        segments = arrays["segment_ids"]
        for segment in range(1, int(segments.max(initial=0)) + 1):
            inside = np.flatnonzero(segments == segment)
            positions = arrays["positions"][inside]
            where = next(pieces, None)
            origin = f" of {unit} {where[0]}, pairs {where[1]} to {where[2] - 1}" if where else ""
            yield (
                f"  {f'{name}, ' if name else ''}segment {segment}{origin}; columns {inside[0]} to {inside[-1]}, "
                f"positions {positions[0]} to {positions[-1]}"
            )
            yield f"    inputs: {self._text(arrays['inputs'][inside])!r}"
            weights = arrays["loss_weights"][inside]
            for weight, group in itertools.groupby(range(len(inside)), key=lambda i: weights[i]):
                at = inside[list(group)]
                yield f"    targets, weight {weight:g} x {len(at)}: {self._text(arrays['targets'][at])!r}"
        if padding := int((segments == 0).sum()):
            yield f"  {f'{name}, ' if name else ''}padding: {padding} columns"

    def _text(self, ids: np.ndarray) -> str:
        """Text with the special tokens by name, `<bos>`, which text itself never yields."""
        names = reversed(list(self.tokenizer.special_ids.items()))  # roles that share an id: the first one
        special = {i: name if "<" in name else f"<{name}>" for name, i in names}
        parts = itertools.groupby(ids.tolist(), key=lambda i: special.get(i))
        return "".join(name * len(list(run)) if name else self.tokenizer.decode(run) for name, run in parts)


_ARRAYS = ("inputs", "targets", "loss_weights", "segment_ids", "positions")


def rebuild(folder: Path, step: int) -> Found:
    """The batch of a step (the first is 1) of the run in `folder`.

    Raises:
      CheckpointError: the folder is not a run's, or of another kind of experiment.
      ConfigError: a step that the run does not have.
      DataError: the data, tokenizer or settings are not those that the run was trained with; says what differs.
    """
    from jaxlm.reporting.run_folder import read_metrics

    name, settings, state = _recorded(folder)
    batches, tokenizer, steps = importlib.import_module(f"experiments.{name}").recorded_batches(settings, folder)
    if not 1 <= step <= steps:
        raise ConfigError(f"--step {step}: the run has {steps} steps, expected 1 to {steps}")
    batches.set_state({**state, "next_step": step - 1})
    batch, provenance = next(batches), batches.provenance(step - 1)
    batches.close()
    rate = float(settings.optimizer.schedule(steps)(step - 1))
    logged = next((row for row in read_metrics(folder) if row["step"] == step and "train/loss" in row), None)
    shape = " x ".join(map(str, batch["inputs"].shape))
    mixture = ", ".join(f"{source} {weight:g}" for source, weight in provenance.get("mixture", {}).items())
    lines = [
        f"step {step} of {steps}, {name} in {folder}: {shape} tokens, learning rate {rate:g}",
        f"mixture ({provenance['unit']}): {mixture}" if mixture else "",
        f"loss {logged['train/loss']:g}, gradient norm {logged['grad_norm']:g}" if logged else "not trained yet",
    ]
    return Found("\n".join(filter(None, lines)), batch, provenance, rate, logged, tokenizer)


def _recorded(folder: Path) -> tuple[str, Any, Mapping[str, Any]]:
    """Of a run folder: the experiment, its settings, and the state of its data with the whole schedule."""
    from jaxlm.core.json_files import read_json
    from jaxlm.training import load_meta

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a run folder: it has no config.json")
    values = read_json(folder / "config.json")
    for name in EXPERIMENTS:
        kind = importlib.import_module(f"experiments.{name}").Config
        if set(values) <= {field.name for field in dataclasses.fields(kind)}:
            break
    else:
        raise CheckpointError(f"{folder} is a run of another experiment: expected one of {', '.join(EXPERIMENTS)}")
    settings = from_dict(kind, values, str(folder / "config.json"))
    if any(path.name.isdigit() for path in (folder / "checkpoints").glob("*")):
        return name, settings, load_meta(folder / "checkpoints")[1]["data"]
    if not (folder / "data.json").is_file():
        raise CheckpointError(f"{folder} has no data.json: the run ended before its data were ready")
    return name, settings, read_json(folder / "data.json")


if __name__ == "__main__":
    runner.tool(__name__)
