"""Infinite compute on a fixed corpus: far more weight decay, ensembles, and one small model taught by them.

Kim, Kotha et al., "Pre-training under infinite compute", 2025, arXiv 2509.14786. When text is scarce and compute is
not, more epochs and larger models overfit with the usual settings. Claims: with weight decay tuned (up to 30 times the
usual 0.1) the loss falls with the size of the model; an ensemble of models that differ in seed and order of data has a
lower limit still, below that of any single model; members should overfit a little; a student of what the ensemble
writes keeps most of the gain, and of what a model of its own size writes it is no worse than that model.

    python -m experiments.optimization.infinite_compute                  # small
    python -m experiments.optimization.infinite_compute --preset wide    # for an accelerator: more text, larger models

The text is a sample of windows of the code of the Python standard library, as bytes; windows of held-out files are to
tune by, and others to judge by. The standard recipe has weight decay 0.1 and every number of epochs and learning rate
of the grid to choose from; the regularized one searches the same grid and weight decay, coordinate by coordinate, from
where the next smaller size ended, until no neighbor is better. Both are tuned with one seed and judged with others.
Students have the standard recipe's weight decay and learning rate, as in the paper.

The paper's own runs (150M to 1.4B parameters on 200M tokens of DCLM: `infinite-150m` to `infinite-1.4b` among the
presets of `jaxlm.models`) are not a preset: members here hold the corpus as a constant of their program, on a device
each.

Expect of `small` (two x86 cores, jax 0.10.2, 2026-11; 10 minutes): the four sizes end at 2.20, 2.12, 2.14 and 2.05 with
the usual decay, at 2.20, 2.08, 2.08 and 2.08 with decay tuned (0.1 to 6.4, growing with the size); ensembles of the
third tend to 1.91, single models to 2.08, and 1.8 times the text would be needed without. Six of twelve claims hold.
Students do not reach their teachers here.
"""

import dataclasses
import statistics
from collections.abc import Mapping
from pathlib import Path

from experiments import runner
from experiments.checks import check_counts
from experiments.optimization.infinite_compute_report import Laws, best_by, report, shown
from experiments.optimization.infinite_compute_runs import Point, Results, train
from jaxlm.core.errors import ConfigError
from jaxlm.data.prepare import DataConfig
from jaxlm.models.config import DecoderConfig
from jaxlm.reporting import Claim, Report

HEAD_DIM = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """A corpus, sizes of models, and the grid of recipes."""

    data: DataConfig
    rows: int = 256
    """Of the corpus, each `data.sequence_length` tokens."""
    batch_size: int = 8
    num_layers: int = 1
    widths: tuple[int, ...] = (16, 32, 64, 128)
    at: int = 2
    """Which of the widths, from 0, the law in tokens, the overfit members and the students have."""
    epochs: tuple[int, ...] = (8, 16, 32)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    decays: tuple[float, ...] = (0.1, 0.4, 1.6, 6.4, 25.6)
    standard_decay: float = 0.1
    budgets: tuple[float, ...] = (0.25, 0.5, 2.0)
    """Shares of the corpus that the standard recipe is also trained on, for its law in tokens."""
    synthetic: float = 0.75
    """Share of a student's tokens that a teacher wrote."""
    student_epochs: int = 8
    """Of the corpus; with what the teacher wrote a student takes `1 / (1 - synthetic)` times the steps."""
    teacher_rows: int = 2048
    """That a teacher writes."""
    teacher_batch: int = 256
    judge_rows: int = 256
    """Rows of held-out text to tune by, and as many to judge by."""
    judge_batch: int = 32
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    """Of regularized models; together they are the ensemble. The first two are those of all other judged runs."""
    how: str = "auto"
    """How members are trained together (`jaxlm.training.Population`)."""

    def __post_init__(self):
        check_counts(
            self, "rows", "batch_size", "num_layers", "student_epochs", "teacher_rows", "teacher_batch", "judge_rows",
            "judge_batch",
        )  # fmt: skip
        if len(self.widths) < 3 or sorted(set(self.widths)) != list(self.widths):
            raise ConfigError(f"widths are {self.widths}, expected three or more that increase")
        if bad := [w for w in self.widths if w < 1 or w % HEAD_DIM]:
            raise ConfigError(f"width {bad[0]}: expected a multiple of {HEAD_DIM}")
        if not 0 <= self.at < len(self.widths):
            raise ConfigError(f"at is {self.at}, expected 0 to {len(self.widths) - 1}: one of the widths")
        for name in ("epochs", "rates", "decays"):
            values = getattr(self, name)
            if not values or sorted(set(values)) != list(values) or values[0] <= 0:
                raise ConfigError(f"{name} are {values}, expected positive ones that increase")
        if self.standard_decay not in self.decays:
            raise ConfigError(f"standard_decay is {self.standard_decay}, expected one of the decays {self.decays}")
        if len({*self.budgets, 1.0}) < 3 or 1.0 in self.budgets or min(self.budgets) <= 0:
            raise ConfigError(f"budgets are {self.budgets}, expected two or more positive ones, none of them 1")
        if short := [share for share in (*self.budgets, 1.0) if self.rows_of(share) < self.batch_size]:
            raise ConfigError(f"a budget of {short[0]:g} x {self.rows} rows is less than a batch of {self.batch_size}")
        if not 0 < self.real_rows < self.batch_size:
            raise ConfigError(
                f"synthetic is {self.synthetic}: a batch of {self.batch_size} then has {self.real_rows} rows of the "
                "corpus, expected some and not all"
            )
        if len(set(self.seeds)) < max(3, len(self.seeds)) or self.tuning_seed in self.seeds:
            raise ConfigError(f"seeds are {self.seeds}, expected three or more, none of them {self.tuning_seed}")

    @property
    def standard_seeds(self) -> tuple[int, ...]:
        """Of judged runs that are no member of an ensemble."""
        return self.seeds[:2]

    @property
    def real_rows(self) -> int:
        """Rows of the corpus in each batch of a student."""
        return round((1 - self.synthetic) * self.batch_size)

    def rows_of(self, share: float) -> int:
        """Rows in a budget."""
        return round(share * self.rows)

    def start(self) -> Point:
        """Where the search of the smallest size starts: the middle of the grid."""
        axes = {"epochs": self.epochs, "learning_rate": self.rates, "weight_decay": self.decays}
        return {name: values[len(values) // 2] for name, values in axes.items()}

    def models(self) -> list[tuple[str, DecoderConfig]]:
        """Every size with its name: Llamas with tied embeddings, for bytes."""
        return [
            (
                f"width {width}",
                DecoderConfig(
                    vocab_size=260,
                    num_layers=self.num_layers,
                    embed_dim=width,
                    num_heads=width // HEAD_DIM,
                    mlp_dim=5 * width // 2,
                    max_length=self.data.sequence_length,
                    tie_embeddings=True,
                    remat="none",
                ),
            )
            for width in self.widths
        ]


SMALL = Config(data=DataConfig(library="code", tokenizer="byte", sequence_length=64, validation_fraction=0.1))

PRESETS: Mapping[str, Config] = {
    "smoke": dataclasses.replace(
        SMALL,
        data=DataConfig(library="instructions", tokenizer="byte", sequence_length=16, validation_fraction=0.1),
        rows=8,
        batch_size=4,
        widths=(16, 32, 48),
        at=0,
        epochs=(1,),
        rates=(3e-3,),
        decays=(0.1, 1.6),
        budgets=(0.5, 2.0),
        student_epochs=1,
        teacher_rows=4,
        teacher_batch=4,
        judge_rows=8,
        judge_batch=8,
        seeds=(1, 2, 3),
    ),
    "small": SMALL,
    "wide": dataclasses.replace(
        SMALL,
        data=dataclasses.replace(SMALL.data, sequence_length=128),
        rows=2048,
        batch_size=16,
        num_layers=4,
        widths=(32, 64, 128, 192),
        epochs=(4, 8, 16, 32, 64),
        rates=(3e-4, 1e-3, 3e-3, 1e-2),
        decays=(0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8),
        budgets=(0.25, 0.5, 2.0, 4.0),
        student_epochs=16,
        teacher_rows=32_768,
        teacher_batch=1024,
        judge_rows=1024,
        seeds=(1, 2, 3, 4, 5),
    ),
}


def run(config: Config, out: Path) -> Report:
    """Tunes, trains, combines, teaches; what is finished in `out` is not repeated."""
    results = train(config, out / "members")
    return report(config, results, claims(config, results))


def claims(config: Config, results: Results) -> list[Claim]:
    """The paper's claims, judged on held-out losses (nats a byte)."""
    laws, at = Laws(config, results), config.at
    most, largest = max(config.epochs), len(config.widths) - 1
    by_epochs = best_by(results.standard[largest], "epochs")
    at_most = [best_by(tuned, "epochs")[most] for tuned in results.standard]
    decays = [tuned.point["weight_decay"] for tuned in results.regularized]
    edges = sorted({edge for tuned in results.regularized for edge in tuned.edges})
    by_tuning = "Of the runs that were tuned, by their loss on other text."
    note = f"Best at an edge of the grid: {', '.join(edges)}." if edges else ""
    uncertified = [] if all(t.certified for t in results.regularized) else ["Some searches are not certified."]
    note = " ".join([*([note] if note else []), *uncertified])
    ensemble = results.ensembles[at]
    small, count = largest - 1, min(len(config.seeds), results.params[largest] // results.params[largest - 1])
    student, self_taught = (statistics.fmean(results.students[name]) for name in ("ensemble", "single"))
    teacher = results.single["regularized", at][0]
    worth = laws.efficiency(results, ensemble[-1])
    return [
        Claim(
            f"With weight decay {config.standard_decay:g} the largest model overfits: loss after the most epochs is "
            "more than 0.02 above the least.",
            "rises",
            ", ".join(f"{loss:.4f} after {epochs:g}" for epochs, loss in sorted(by_epochs.items())),
            by_epochs[most] > min(by_epochs.values()) + 0.02,
            by_tuning,
        ),
        Claim(
            "With it and the most epochs the largest model is more than 0.02 worse than a smaller one.",
            "rises",
            shown(at_most),
            at_most[-1] > min(at_most[:-1]) + 0.02,
            by_tuning,
        ),
        Claim(
            "With weight decay tuned the loss falls from each size to the next.",
            "0.05 / N^1.02 + 3.43",
            shown(laws.single),
            all(b < a for a, b in zip(laws.single, laws.single[1:])),
            note,
        ),
        Claim(
            "The best weight decay grows with the size, and is never the usual one.",
            "0.8 to 3.2",
            ", ".join(f"{decay:g}" for decay in decays),
            sorted(decays) == decays and decays[-1] > decays[0] and config.standard_decay not in decays,
            note,
        ),
        Claim(
            "The regularized recipe beats the standard one at every size.",
            "3.57 at 300M",
            f"{shown(laws.single)} and {shown(laws.standard)}",
            all(a < b for a, b in zip(laws.single, laws.standard, strict=True)),
            note,
        ),
        Claim(
            "Every member makes every ensemble better.",
            "0.25 / K^1.02 + 3.34",
            "; ".join(shown(losses) for losses in results.ensembles),
            all(b < a for losses in results.ensembles for a, b in zip(losses, losses[1:])),
        ),
        Claim(
            "Ensembles have a lower limit than single models.",
            "3.34 and 3.43",
            f"{laws.members[at].asymptote:.4f} and {laws.size.asymptote:.4f}",
            laws.members[at].asymptote < laws.size.asymptote,
        ),
        Claim(
            f"{count} models of {config.models()[small][0]} beat one of {config.models()[largest][0]} with no more "
            "parameters.",
            "300M ensembles beat larger models",
            f"{results.ensembles[small][count - 1]:.4f} and {laws.single[largest]:.4f}",
            results.ensembles[small][count - 1] < laws.single[largest],
        ),
        Claim(
            "Members that overfit a little (twice the epochs, half the decay) are better together.",
            "better",
            f"{results.overfit[-1]:.4f} and {ensemble[-1]:.4f}",
            results.overfit[-1] < ensemble[-1],
        ),
        Claim(
            "A student of what the ensemble writes beats one model of its size on real text alone.",
            "3.36 and 3.57",
            f"{student:.4f} and {laws.single[at]:.4f} (standard {laws.standard[at]:.4f})",
            student < laws.single[at],
        ),
        Claim(
            "A student of what a model of its own size writes is not more than 0.01 worse than that model.",
            "better",
            f"{self_taught:.4f} and {teacher:.4f}",
            self_taught <= teacher + 0.01,
        ),
        Claim(
            "The ensemble is worth more than 1.5 times the text.",
            "3.75 (5.17 in the limit)",
            f"{worth:.2f} ({laws.efficiency(results, laws.joint.asymptote):.2f} in the limit)",
            worth > 1.5,
        ),
    ]


if __name__ == "__main__":
    runner.main(__name__)
