"""Continual pretraining: re-warming the learning rate, its spike, and what decides both losses.

Gupta, Thérien, Ibrahim, Richter, Anthony, Belilovsky, Rish and Lesort, "Continual Pre-Training of Large Language
Models: How to (re)warm your model?", 2023, arXiv 2308.04014. A trained model goes on with other data. Claims: the
length of the warm-up does not matter; re-warming and decaying learns the new data better than a constant small rate,
the more so the higher the peak, and forgets more of the old; from scratch is worse; re-warming alone makes the loss
jump, on the same data too; earlier checkpoints are no better starts.

    python -m experiments.optimization.rewarm

Here the old data are the code of the Python standard library without its docstrings, the new data its docstrings,
both as bytes; files that are held out are held out of both. The model of a cosine run on the code goes on with the
docstrings under all combinations, its moments fresh (as with published weights) or kept. The upstream peak is tuned
with a seed that is not judged; continued runs and runs from scratch have the same peaks to choose from, on the tuning
text. 480 steps upstream and 240 in each of 15 continuations, twice.

Expect of `small` (two x86 cores, jax 0.10.2, 2026-11; half an hour on a machine with much else to do), in nats a byte:
downstream 1.97 continued at the upstream peak, 2.29 from scratch, 2.15 with a constant rate; upstream 2.02 before and
2.13 after, with a jump of 0.29, 0.41 and 0.65 as the peak doubles. Two of seven claims hold, those on training from
scratch and on earlier checkpoints. Warm-ups end 0.012 apart where less than 0.01 is asked for; twice the upstream peak
is too high to be the best downstream, where nothing jumps but there. And the upstream run is far from done: on the same
data re-warming jumps by 0.18 and then gains (1.90, and 1.97 with a constant rate), and a constant rate forgets more
than small peaks do. The best upstream peak was the least of those tried. Fresh moments cost 0.002.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import runner
from experiments.checks import check_counts, check_rates, check_seeds
from experiments.optimization.rewarm_runs import (
    CONSTANT,
    KEPT,
    LEGS,
    SAME,
    SAME_CONSTANT,
    WARMUP,
    Course,
    Results,
    peak_name,
    scratch_name,
    start_name,
    train,
    warmup_name,
)
from jaxlm.core.errors import ConfigError
from jaxlm.data.prepare import DataConfig
from jaxlm.evals.forgetting import Spike, measure_spike
from jaxlm.models.config import DecoderConfig
from jaxlm.reporting import Claim, Figure, Report, Series, Table


@dataclasses.dataclass(frozen=True)
class Config:
    """A grid of continuations of one upstream run."""

    model: DecoderConfig
    upstream: DataConfig
    downstream: DataConfig
    upstream_steps: int = 480
    steps: int = 240
    """Of every continuation."""
    batch_size: int = 16
    upstream_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """Peaks that the upstream run is tuned over, with `tuning_seed`."""
    peaks: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Of continuations and of runs from scratch, as shares of the upstream peak."""
    warmups: tuple[float, ...] = (0.0, 0.005, 0.01, 0.02)
    """Shares of the steps; all with the upstream peak. The third, 1 %, is that of the other runs."""
    end_fraction: float = 0.1
    """Rate at the end of every cosine as a share of its peak; the constant rate is that of the upstream peak."""
    b2: float = 0.95
    weight_decay: float = 0.1
    judge_rows: int = 256
    """Rows of each held-out text to tune by, and as many to judge by."""
    track_rows: int = 32
    """Rows of those to judge by that are followed along a run."""
    track_every: int = 10
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2)
    """Each has an upstream run of its own."""

    def __post_init__(self):
        check_counts(self, "upstream_steps", "steps", "batch_size", "judge_rows", "track_rows", "track_every")
        check_rates(self, "upstream_rates")
        check_seeds(self.seeds, self.tuning_seed)
        if self.upstream_steps % LEGS:
            raise ConfigError(f"upstream_steps is {self.upstream_steps}, expected a multiple of {LEGS}")
        if len(self.peaks) < 2 or sorted(set(self.peaks)) != list(self.peaks) or 1.0 not in self.peaks:
            raise ConfigError(f"peaks are {self.peaks}, expected two or more that increase, 1.0 among them")
        if WARMUP not in self.warmups or not all(0 <= w < 1 for w in self.warmups):
            raise ConfigError(f"warmups are {self.warmups}, expected shares of the steps, {WARMUP} among them")
        if self.upstream.tokenizer != self.downstream.tokenizer or self.upstream.tokenizer == "sentencepiece":
            raise ConfigError("upstream and downstream need one tokenizer for both: 'byte', or the path of a saved one")


SMALL = Config(
    model=DecoderConfig(vocab_size=260, num_layers=2, embed_dim=128, num_heads=4, mlp_dim=344, max_length=64),
    upstream=DataConfig(library="code", tokenizer="byte", sequence_length=64, validation_fraction=0.1),
    downstream=DataConfig(library="docstrings", tokenizer="byte", sequence_length=64, validation_fraction=0.1),
)


PRESETS: Mapping[str, Config] = {
    "smoke": dataclasses.replace(
        SMALL,
        model=DecoderConfig(vocab_size=260, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, max_length=16),
        upstream=dataclasses.replace(SMALL.upstream, library="instructions", sequence_length=16),
        downstream=dataclasses.replace(SMALL.downstream, library="docstrings", sequence_length=16),
        upstream_steps=4,
        steps=4,
        batch_size=4,
        upstream_rates=(4e-3,),
        judge_rows=8,
        track_rows=4,
        track_every=2,
        seeds=(1,),
    ),
    "small": SMALL,
}


def run(config: Config, out: Path) -> Report:
    """Trains upstream, then every continuation; what is finished in `out` is not repeated."""
    return report(config, train(config, out / "members"))


def report(config: Config, results: Results) -> Report:
    """Tables, figures and claims of finished runs."""
    courses = results.courses
    rows = []
    for name, course in courses.items():
        spikes = _spikes(results, name)
        up, down = spikes["upstream"], spikes["downstream"]
        back = up.recovery_tokens if math.isfinite(up.recovery_tokens) else "never"
        rows.append((name, *course.loss.values(), _apart(course), up.height, down.height, back, up.forgetting))
    table = Table(
        "Held-out losses of the continuations, nats a byte",
        ("run", "upstream", "downstream", "seeds apart, downstream", "upstream spike", "downstream spike",
         "upstream recovered at token", "forgotten upstream"),
        tuple(rows),
        "Spikes are measured on fewer rows, along the mean course of the seeds.",
    )  # fmt: skip
    tuned = Table("Upstream loss by peak", ("peak", "loss"), tuple(results.tuned.items()), "On the tuning text.")
    numbers: dict[str, Any] = {"upstream peak": results.peak}
    kept = courses[KEPT].loss["downstream"] - courses[peak_name(1.0)].loss["downstream"]
    numbers["downstream loss, moments kept less moments fresh"] = kept
    return Report(
        title="Continual pretraining: how to re-warm",
        summary="A model of code goes on with prose, under learning rates that rise again or do not.",
        numbers=numbers,
        claims=tuple(claims(config, results)),
        tables=(table, tuned),
        figures=tuple(_figures(config, results)),
    )


def claims(config: Config, results: Results) -> list[Claim]:
    """The paper's claims, judged on the held-out losses."""
    courses = results.courses
    found = []

    def losses(names: Sequence[str], stream: str) -> list[float]:
        return [courses[name].loss[stream] for name in names]

    def shown(values: Sequence[float]) -> str:
        return ", ".join(f"{v:.4f}" for v in values)

    warmups = [warmup_name(w) for w in config.warmups]
    spreads = {s: max(losses(warmups, s)) - min(losses(warmups, s)) for s in ("upstream", "downstream")}
    found.append(
        Claim(
            "The length of the warm-up does not matter: final losses are less than 0.01 nats apart.",
            "no significant effect",
            ", ".join(f"{s} {v:.4f} apart" for s, v in spreads.items()),
            all(v < 0.01 for v in spreads.values()),
        )
    )
    peaks = [peak_name(p) for p in config.peaks]
    down = losses([CONSTANT, *peaks], "downstream")
    found.append(
        Claim(
            "The higher the peak, the lower the downstream loss; a constant small rate is worst.",
            "larger is better",
            f"constant, then by peak: {shown(down)}",
            _strictly_falling(down),
        )
    )
    up = losses([CONSTANT, *peaks], "upstream")
    found.append(
        Claim(
            "The higher the peak, the higher the upstream loss; a constant small rate is best.",
            "larger is worse",
            f"constant, then by peak: {shown(up)}",
            _strictly_falling(up[::-1]),
        )
    )
    best = {kind: min(names, key=lambda n: statistics.fmean(courses[n].tuning)) for kind, names in (
        ("continued", peaks), ("scratch", [scratch_name(p) for p in config.peaks])
    )}  # fmt: skip
    continued, scratch = (courses[best[kind]].loss["downstream"] for kind in ("continued", "scratch"))
    found.append(
        Claim(
            "From scratch on downstream data alone is worse than continuing, each at its best peak.",
            "worse",
            f"{scratch:.4f} ({best['scratch']}) and {continued:.4f} ({best['continued']})",
            scratch > continued,
        )
    )
    heights = {s: [_spikes(results, name)[s].height for name in peaks] for s in ("upstream", "downstream")}
    found.append(
        Claim(
            "Re-warming makes the loss jump at first, on both streams, and the more the higher the peak.",
            "larger spikes",
            "; ".join(f"{s} by peak: {shown(v)}" for s, v in heights.items()),
            all(h[0] > 0 and _strictly_falling(h[::-1]) for h in heights.values()),
        )
    )
    spike = _spikes(results, SAME)["upstream"]
    same, constant = (courses[n].loss["upstream"] for n in (SAME, SAME_CONSTANT))
    found.append(
        Claim(
            "Re-warming on the same data spikes too, and ends above the run with a constant small rate.",
            "spikes, not recovered",
            f"spike {spike.height:.4f}; {same:.4f} and {constant:.4f}",
            spike.height > 0 and same > constant,
        )
    )
    starts = [start_name(leg) for leg in range(1, LEGS)]
    earlier = losses([name for name in starts if name in courses], "downstream")
    last = courses[peak_name(1.0)].loss["downstream"]
    found.append(
        Claim(
            "Earlier upstream checkpoints are no better to start from.",
            "no better",
            f"downstream loss from earlier ones {shown(earlier)}, from the last {last:.4f}",
            last <= min(earlier),
        )
    )
    return found


def _spikes(results: Results, name: str) -> dict[str, Spike]:
    return {s: measure_spike(results.tokens, losses) for s, losses in results.courses[name].tracked.items()}


def _apart(course: Course) -> float:
    return max(course.downstream) - min(course.downstream)


def _strictly_falling(values: Sequence[float]) -> bool:
    return all(a > b for a, b in zip(values, values[1:]))


def _figures(config: Config, results: Results) -> list[Figure]:
    def lines(names: Sequence[str], stream: str) -> tuple[Series, ...]:
        return tuple(Series(n, results.tokens, results.courses[n].tracked[stream]) for n in names)

    label, loss = "tokens of the continuation", "held-out loss, nats a byte"
    peaks = [CONSTANT, *map(peak_name, config.peaks)]
    by_warmup = tuple(
        dataclasses.replace(line, name=f"{100 * share:g} %")
        for share, line in zip(config.warmups, lines([warmup_name(w) for w in config.warmups], "downstream"))
    )
    return [
        Figure("Upstream, by peak", lines(peaks, "upstream"), label, loss),
        Figure("Downstream, by peak", lines([*peaks, scratch_name(1.0)], "downstream"), label, loss),
        Figure("Downstream, by warm-up", by_warmup, label, loss),
        Figure("On the same data", lines([SAME, SAME_CONSTANT], "upstream"), label, loss),
    ]


if __name__ == "__main__":
    runner.main(__name__)
