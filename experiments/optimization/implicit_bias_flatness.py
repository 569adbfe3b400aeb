"""Models of one pretraining loss differ downstream, and the flatter ones transfer better.

Liu, Xie, Li and Ma, "Same Pre-training Loss, Better Downstream: Implicit Bias Matters for Language Models", ICML 2023,
arXiv 2210.14199. Among masked language models whose pretraining loss is the same (and minimal), the trace of the loss's
Hessian tracks downstream accuracy where the loss cannot. Training on after convergence and larger models give flatter
minima and better features; a lookup table has the least loss of all and no features.

    python -m experiments.optimization.implicit_bias_flatness                    # small
    python -m experiments.optimization.implicit_bias_flatness --preset paper     # the paper's model of 16 layers

Sentences are of a grammar whose exact conditional probabilities are known, so the least loss is too, and a model's
excess over it is measured one mask at a time. Downstream tasks ask for the symbol that spans the first words, from
frozen features of all tokens. Traces of narrower models are those of the same functions in the widest one's parameters.
The learning rate is constant after a warm-up. Seed 0 is for choosing settings.

The claims have not been judged yet: with seed 0 no model came near the band. The excess loss was 0.24 nats a word after
1000 steps at width 64; at width 32 after 4000 steps 0.14 on an easier grammar (3 symbols, 2 rules, 9 words) and 0.28 on
one of 4 symbols and 16 words. `small` needs many more steps, or faster learning, before models count as of equal loss.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import runner
from experiments.checks import check_counts, check_seeds
from experiments.optimization.implicit_bias_flatness_runs import TASKS, Measure, World, train_and_measure
from jaxlm.core.errors import ConfigError
from jaxlm.evals import FINE_TUNE, ProbeConfig
from jaxlm.optim.config import OptimizerConfig
from jaxlm.reporting import Claim, Figure, Report, Series, Table


@dataclasses.dataclass(frozen=True)
class GrammarConfig:
    """A random grammar in levels (`layered_grammar`)."""

    seed: int = 0
    levels: int = 3
    symbols: int = 5
    words: int = 40
    roots: int = 5
    rules: int = 6
    leaf_words: int = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Masked language models of several widths, looked at on their way."""

    grammar: GrammarConfig = GrammarConfig()
    sentences: int = 100_000
    """To train on."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Each a divisor of the last."""
    head_dim: int = 16
    layers: int = 2
    at: tuple[int, ...] = (1000, 2000, 3000, 4000, 5000)
    """Steps after which models are measured."""
    batch_size: int = 64
    mask_rate: float = 0.15
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=2e-3, warmup=0.04, decay=0.0, weight_decay=0.01, b2=0.98, eps=1e-6
    )
    band: float = 0.01
    """Models have the same loss if they are this close (nats a word) to the least loss there is."""
    judge_sentences: int = 500
    """To measure losses on."""
    probe_sentences: int = 6000
    """For the downstream tasks, a third of them to test on."""
    probe: ProbeConfig = ProbeConfig()
    fine_tune: ProbeConfig = dataclasses.replace(FINE_TUNE, epochs=3)
    """Of the last model of each run."""
    trace_draws: int = 256
    trace_batch: int = 64
    seeds: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if not self.widths or any(self.widths[-1] % w or w % self.head_dim for w in self.widths):
            raise ConfigError(f"widths are {self.widths}: each must divide the last, and head_dim {self.head_dim} each")
        check_counts(self, "sentences", "layers", "batch_size", "judge_sentences", "probe_sentences")
        check_counts(self, "trace_draws", "trace_batch")
        check_seeds(self.seeds)
        if not self.at or sorted(set(self.at)) != list(self.at) or self.at[0] < 1:
            raise ConfigError(f"at is {self.at}, expected steps that increase")
        if self.band <= 0:
            raise ConfigError(f"band is {self.band}, expected above 0")


PRESETS: Mapping[str, Config] = {
    "smoke": Config(
        grammar=GrammarConfig(levels=3, symbols=2, words=4, roots=2, rules=2, leaf_words=2),
        sentences=200, widths=(8, 16), head_dim=8, layers=1, at=(2, 4), batch_size=8, judge_sentences=8,
        probe_sentences=60, probe=ProbeConfig(batch_size=16, epochs=1), fine_tune=ProbeConfig(batch_size=16, epochs=1),
        trace_draws=2, trace_batch=4, seeds=(1,),
    ),
    "small": Config(),
    "paper": Config(
        grammar=GrammarConfig(levels=4, symbols=10, words=200, roots=9, rules=20, leaf_words=80),
        sentences=20_000_000, widths=(1024,), head_dim=64, layers=16, at=(5000, 10_000, 15_000, 20_000, 25_000),
        batch_size=4096,
        optimizer=OptimizerConfig(
            learning_rate=5e-4, warmup=3333 / 25_000, decay=0.0, weight_decay=0.01, b2=0.98, eps=1e-6
        ),
        judge_sentences=1000, probe_sentences=15_000, fine_tune=FINE_TUNE, trace_draws=50_000, trace_batch=128,
        seeds=(1,),
    ),
}  # fmt: skip


def run(config: Config, out: Path) -> Report:
    """Trains and measures all models; snapshots and measures that are in `out` are not made again."""
    world = World(config)
    measures = [
        m
        for width in config.widths
        for seed in config.seeds
        for m in train_and_measure(config, world, width, seed, out)
    ]
    return report(config, measures, world.least_loss, world.table_accuracy(), world.majority())


def report(
    config: Config,
    measures: Sequence[Measure],
    least_loss: float,
    table: Mapping[str, float],
    majority: Mapping[str, float],
) -> Report:
    """Tables, figures and claims of what was measured."""
    columns = ("width", "seed", "steps", "excess loss", "trace", "error of trace", *measures[0].accuracy, "fine-tuned")
    rows = [(*m[:6], *m.accuracy.values(), m.fine_tuned) for m in measures]
    others = [
        ("lookup table", None, None, 0.0, None, None, *table.values(), None),
        ("most frequent label", None, None, None, None, None, *majority.values(), None),
    ]
    by_width = {w: [m for m in _matched(config, measures) if m.width == w] for w in config.widths}
    points = [
        Series(f"width {w}", [m.trace for m in found], [_downstream(m) for m in found], style="scatter")
        for w, found in by_width.items()
        if found
    ]
    runs = {(m.width, m.seed): [n for n in measures if n[:2] == m[:2]] for m in measures}
    figures = [Figure("Accuracy by trace, at matched loss", tuple(points), "trace", "accuracy")] if points else []
    for title, name in (("Trace", "trace"), ("Excess loss", "excess")):
        lines = [
            Series(f"width {w}, seed {s}", [m.step for m in ms], [getattr(m, name) for m in ms], style="points")
            for (w, s), ms in runs.items()
        ]
        figures.append(Figure(f"{title} in training", tuple(lines), "step", title.lower(), y_scale="log"))
    return Report(
        title="Flatness and downstream accuracy at equal loss",
        summary="Masked language models on sentences of a grammar: loss above the exact least one, trace of the "
        "Hessian, and accuracy of linear probes for the grammar's symbols.",
        numbers={"least loss": least_loss, "models": len(measures), "of equal loss": len(_matched(config, measures))},
        claims=tuple(claims(config, measures, table)),
        tables=(Table("Models", columns, (*rows, *others)),),
        figures=tuple(figures),
    )


def claims(config: Config, measures: Sequence[Measure], table: Mapping[str, float]) -> list[Claim]:
    """What the paper says of models of equal loss, on those within the band."""
    matched = _matched(config, measures)
    note = f"{len(matched)} of {len(measures)} models are within {config.band:g} of the least loss."
    accuracies = [_downstream(m) for m in matched]
    by_trace, by_loss = math.nan, math.nan
    if len(matched) > 2:
        from jaxlm.evals import spearman

        by_trace = spearman([m.trace for m in matched], accuracies)
        by_loss = spearman([m.excess for m in matched], accuracies)
    found = [
        Claim(
            "At equal loss, flatter models are more accurate (rank correlation of trace and accuracy below -0.5).",
            "negative (figures 2 to 4)", _number(by_trace), by_trace < -0.5, note,
        ),
        Claim(
            "At equal loss, the loss does not tell (rank correlation of loss and accuracy within 0.3 of 0).",
            "none", _number(by_loss), abs(by_loss) <= 0.3, note,
        ),
    ]  # fmt: skip
    ratios = {}
    for m in matched:
        later = [n for n in matched if n[:2] == m[:2] and n.step > m.step]
        if later and m[:2] not in ratios:
            ratios[m[:2]] = later[-1].trace / m.trace
    shown = ", ".join(f"{ratio:.3g} (width {w})" for (w, _), ratio in ratios.items()) or "no run is long in the band"
    falls = bool(ratios) and all(ratio < 1 for ratio in ratios.values())
    found.append(Claim("Training on at the least loss lowers the trace, in every run.", "falls", shown, falls, note))
    widths = sorted({m.width for m in matched})
    if len(config.widths) > 1:
        groups = {w: [m for m in matched if m.width == w] for w in widths}
        for name, value, rising in (("trace", lambda m: m.trace, False), ("accuracy", _downstream, True)):
            means = [statistics.fmean(map(value, groups[w])) for w in widths]
            ordered = all((a < b) if rising else (a > b) for a, b in zip(means, means[1:]))
            shown = ", ".join(f"{mean:.3g} (width {w})" for w, mean in zip(widths, means)) or "none is in the band"
            statement = f"At equal loss, larger models have a {'higher' if rising else 'lower'} {name}."
            found.append(Claim(statement, "as stated", shown, len(widths) > 1 and ordered, note))
    worst = min(accuracies, default=math.nan)
    measured = statistics.fmean(table[task] for task in TASKS)
    found.append(
        Claim(
            "A lookup table, whose loss is the least, is less accurate than every trained model of equal loss.",
            "as stated", f"{measured:.3g}, others {_number(worst)} or more", measured < worst, note,
        )
    )  # fmt: skip
    return found


def _matched(config: Config, measures: Sequence[Measure]) -> list[Measure]:
    return [m for m in measures if m.excess <= config.band]


def _downstream(measure: Measure) -> float:
    return statistics.fmean(measure.accuracy[task] for task in TASKS)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


if __name__ == "__main__":
    runner.main(__name__)
