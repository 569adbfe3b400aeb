"""Tables, figures and signals of `experiments.optimization.sft_recipe`."""

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.optimization.sft_recipe_runs import CONSTANT, PhaseRun, Results, Run, Scores, Setting, best_rate
from jaxlm.data.synthetic.skills import KINDS
from jaxlm.evals.early_signals import EarlyRun, Halving, early_mean, halve, halving_plan, samples_to_peak, signal_table
from jaxlm.evals.forgetting import measure_retention
from jaxlm.reporting import Figure, Series, Table

if TYPE_CHECKING:
    from experiments.optimization.sft_recipe import Config


def tables(config: "Config", results: Results, early: Sequence[EarlyRun]) -> tuple[Table, ...]:
    """All tables of the report."""
    return (
        _grid_table(config, results),
        _signal_table(early),
        _phase_table(config, results),
        _schedule_table(results),
        _halving_table(config, results),
    )


def figures(config: "Config", results: Results, early: Sequence[EarlyRun]) -> tuple[Figure, ...]:
    """All figures of the report."""
    lines = []
    for size in config.batch_sizes:
        rates = list(results.tuned[size])
        lines.append(
            Series(f"batch {size}", rates, [mean_quality(runs_of(results.grid, Setting(size, rate))) for rate in rates])
        )
    points = {
        signal: tuple(
            Series(f"batch {size}", [getattr(r, signal) for r in early if r.group == size],
                   [r.final for r in early if r.group == size], "scatter")
            for size in config.batch_sizes
            if any(r.group == size for r in early)
        )
        for signal in ("grad_norm", "loss")
    }  # fmt: skip
    courses = tuple(
        Series(name, runs[0].samples, [statistics.fmean(x) for x in zip(*(r.course for r in runs))])
        for name, runs in (("stacked", results.stacked), ("phased", results.phased))
    )
    label = "exact match"
    return (
        Figure("Learning rate", tuple(lines), "learning rate", label, x_scale="log"),
        Figure("Early gradient norm", points["grad_norm"], "early gradient norm", label, x_scale="log"),
        Figure("Early loss", points["loss"], "early training loss", label),
        Figure("Phased and stacked", courses, "samples seen", "exact match, to tune by"),
    )


def early_runs(config: "Config", runs: Sequence[Run]) -> list[EarlyRun]:
    """Early signals of the runs that did not diverge."""
    samples = round(config.early * config.samples)
    return [
        EarlyRun(
            _name(r),
            early_mean(r.grad_norms, r.setting.batch_size, samples),
            early_mean(r.losses, r.setting.batch_size, samples),
            r.scores.quality,
            r.setting.batch_size,
        )
        for r in runs
        if math.isfinite(r.scores.quality)
    ]


def halve_by_norm(config: "Config", runs: Sequence[Run], seed: int) -> Halving:
    """What halving would have kept of a seed's runs: at each rung those with the lowest gradient norm so far."""
    mine = {_name(r): r for r in runs if r.seed == seed}

    def signal(name: str, samples: int) -> float:
        r = mine[name]
        steps = max(1, samples // r.setting.batch_size)
        return float(r.grad_norms[:steps].mean())

    plan = halving_plan(config.samples, len(mine), config.early)
    return halve(plan, list(mine), signal, config.samples)


def noise(config: "Config", runs: Sequence[Run]) -> float:
    """Two standard errors of the difference of two means over seeds: from the variance between the seeds of a setting,
    averaged over settings. NaN with one seed."""
    groups = [runs_of(runs, setting) for setting in dict.fromkeys(r.setting for r in runs)]
    values = [[r.scores.quality for r in group] for group in groups]
    variances = [statistics.variance(v) for v in values if len(v) > 1 and all(map(math.isfinite, v))]
    if not variances:
        return math.nan
    return 2 * math.sqrt(2 * statistics.fmean(variances) / len(config.seeds))


def runs_of(runs: Sequence[Run], setting: Setting) -> list[Run]:
    """The runs of a setting."""
    return [r for r in runs if r.setting == setting]


def mean_quality(runs: Sequence[Any]) -> float:
    """Mean exact match."""
    return statistics.fmean(r.scores.quality for r in runs)


def _name(r: Run) -> str:
    return f"batch {r.setting.batch_size}, rate {r.setting.rate:g}, seed {r.seed}"


def by_schedule(runs: Sequence[Run]) -> dict[tuple[float, float], list[Run]]:
    """Runs by warm-up and end of the schedule."""
    found: dict[tuple[float, float], list[Run]] = {}
    for r in runs:
        found.setdefault((r.setting.warmup, r.setting.end_fraction), []).append(r)
    return found


def regret(runs: Sequence[Run], seed: int, halved: Halving) -> float:
    """How far the best run that halving kept is behind the best run of a seed."""
    qualities = {_name(r): r.scores.quality for r in runs if r.seed == seed and math.isfinite(r.scores.quality)}
    return max(qualities.values()) - max(qualities.get(name, 0.0) for name in halved.kept)


def peak(r: PhaseRun) -> int:
    """Samples after which a run was within 0.01 of its best."""
    return samples_to_peak(r.samples, r.course, tolerance=0.01)


def _kept(results: Results, runs: Sequence[Any]) -> float:
    """Of what the base knew, the share that is left."""
    return statistics.fmean(_retention(results.before, r.scores) for r in runs)


def _retention(before: Scores, after: Scores) -> float:
    if not all(map(math.isfinite, after.plain.values())):
        return math.nan
    return measure_retention(before.plain, after.plain).kept


def _grid_table(config: "Config", results: Results) -> Table:
    signals = {r.name: r for r in early_runs(config, results.grid)}
    rows = []
    for setting in dict.fromkeys(r.setting for r in results.grid):
        runs = runs_of(results.grid, setting)
        tuned = results.tuned[setting.batch_size]
        mark = "best" if best_rate(tuned) == setting.rate else ""
        found = [signals[_name(r)] for r in runs if _name(r) in signals]
        means = [statistics.fmean(getattr(s, n) for s in found) if found else None for n in ("grad_norm", "loss")]
        kinds = [statistics.fmean(r.scores.judge[kind] for r in runs) for kind in KINDS]
        rows.append(
            (setting.batch_size, setting.rate, mark, tuned[setting.rate], mean_quality(runs), *kinds,
             _kept(results, runs), *means)
        )  # fmt: skip
    columns = ("batch", "rate", "", "tuned by", "exact match", *KINDS, "retained", "early gradient norm", "early loss")
    caption = "Means over seeds, but for the column of what is tuned by. Retained: of what the base knew."
    return Table("Batch sizes and rates at equal samples", columns, tuple(rows), caption)


def _signal_table(early: Sequence[EarlyRun]) -> Table:
    rows = tuple(
        (name.replace("grad_norm", "gradient norm"), c.value, c.low, c.high, c.within, c.runs)
        for name, c in signal_table(early).items()
    )
    columns = ("signal", "rank correlation with exact match", "low", "high", "at equal batch size", "runs")
    caption = "95 % intervals by bootstrap over runs. A gradient's norm also falls with the batch, through less noise."
    return Table("Early signals", columns, rows, caption)


def _phase_table(config: "Config", results: Results) -> Table:
    rows = []
    for name, runs in (("phased", results.phased), ("stacked", results.stacked)):
        for r in runs:
            kept = _retention(results.before, r.scores)
            marks = ", ".join(map(str, r.marks))
            rows.append((name, r.seed, r.scores.quality, *r.scores.judge.values(), kept, marks, peak(r)))
    columns = ("training", "seed", "exact match", *KINDS, "retained", "best checkpoints at", "samples to peak")
    rate = best_rate(results.phased_tuned)
    caption = f"Batches of {config.compare_batch}, each at its best rate ({rate:g} in phases)."
    return Table("Phased and stacked", columns, tuple(rows), caption)


def _schedule_table(results: Results) -> Table:
    rows = tuple(
        (warmup, "constant" if end == CONSTANT else "cosine", mean_quality(runs), min(r.scores.quality for r in runs),
         max(r.scores.quality for r in runs))
        for (warmup, end), runs in by_schedule(results.schedules).items()
    )  # fmt: skip
    return Table("Warm-up and schedule", ("warm-up", "schedule", "exact match", "least", "most"), rows)


def _halving_table(config: "Config", results: Results) -> Table:
    rows = []
    for seed in config.seeds:
        halved = halve_by_norm(config, results.grid, seed)
        rows.append((seed, ", ".join(halved.kept), regret(results.grid, seed, halved), halved.share))
    return Table("Halving by gradient norm", ("seed", "kept", "behind the best", "share of samples"), tuple(rows))
