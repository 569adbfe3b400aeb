"""MiniCPM: warm up, stay, decay; rates that hold for all widths; scaling laws from one run; data for the decay.

Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies", 2024, arXiv
2404.06395. Claims: a tenth of the tokens in a decay brings any checkpoint of a run with constant rate to the loss of a
cosine of that length, and a fortieth is too short; under its parametrization the best learning rate does not depend on
the width; decayed branches of one run per size give a scaling law; instruction data in the decay, before fine-tuning on
them, is better than in fine-tuning alone; as the rate decays, the loss curves more along the trajectory.

    python -m experiments.optimization.minicpm

The text is the code of the Python standard library as bytes; instructions are questions and answers about its
functions. Both schedules are tuned over the same rates at the shortest length, with a seed that is not judged. The best
rate of the narrowest model is that of all sizes of the scaling law.

Expect of `small` (two x86 cores, jax 0.10.2, 2026-11; ten minutes on a machine with much else to do), in nats a byte:
after 640 steps 1.99 with a decay of 10 %, 2.06 with 2.5 %, 2.10 with none, 1.94 with a cosine, so that six of seven
claims hold, and the first does not: decayed branches stay 0.03 to 0.06 behind cosine. Both schedules were best at the
least rate tried. With the rules 0.0025 is best at widths 32, 64 and 128; without, 0.02, 0.0025 and 0.00125, where the
narrowest is flat and uneven. Instructions 1.77 with them in the decay, 2.00 without (which has seen fewer of them). The
scaling law is uncertain: its asymptote is 0, and 780 tokens a parameter are within what twelve points may give.

Sparse upcycling (MiniCPM-MoE) is not here: the decoder has no experts. `jaxlm.models.extend_context` and `untie_head`
are what MiniCPM-128K needs, `jaxlm.objectives` has DPO, the published sizes are presets of `jaxlm.models`.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import bases, runner
from experiments.checks import check_counts, check_rates, check_seeds
from experiments.optimization.minicpm_runs import HORIZONS, Lab, read_stream, schedule_name
from jaxlm.core.errors import ConfigError
from jaxlm.core.json_files import number
from jaxlm.data.prepare import DataConfig
from jaxlm.evals.scaling import bootstrap_fit, fit_chinchilla
from jaxlm.models.config import DecoderConfig
from jaxlm.models.scaling_rules import ScalingRules
from jaxlm.reporting import Claim, Figure, Report, Series, Table

HEAD_DIM = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared, and at which sizes."""

    data: DataConfig
    instructions: DataConfig
    rules: ScalingRules = ScalingRules()
    num_layers: int = 2
    width: int = 96
    """Of the model that schedules and stages are compared with."""
    steps: int = 160
    """The shortest length; the others are twice and four times it."""
    rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
    """That both schedules are tuned over."""
    widths: tuple[int, ...] = (32, 64, 128)
    """That the best rate is compared over, and sizes of the scaling law."""
    width_steps: int = 96
    width_rates: tuple[float, ...] = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
    law_steps: int = 80
    """The shortest branch; the others are two, four and eight times it."""
    sft_steps: int = 32
    instruction_rows: int = 5
    """Of each batch of the decay that has instructions in it."""
    batch_size: int = 16
    judge_rows: int = 256
    """Rows of held-out text to tune by, and as many to judge by."""
    probes: int = 8
    """Updates that the curvature is the median of."""
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        for name in ("steps", "law_steps"):
            if getattr(self, name) < 1 or getattr(self, name) % 10:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected a multiple of 10, for decays of a tenth")
        check_counts(self, "num_layers", "width_steps", "sft_steps", "batch_size", "judge_rows", "probes")
        check_rates(self, "rates", "width_rates")
        check_seeds(self.seeds, self.tuning_seed)
        if not 0 < self.instruction_rows < self.batch_size:
            raise ConfigError(f"instruction_rows is {self.instruction_rows}, expected from 1 to {self.batch_size - 1}")
        if any(w % HEAD_DIM for w in (self.width, *self.widths)) or len(set(self.widths)) < 3:
            raise ConfigError(f"widths {self.widths}, width {self.width}: expected 3 or more, multiples of {HEAD_DIM}")
        if {self.data.tokenizer, self.instructions.tokenizer} != {"byte"}:
            raise ConfigError("data and instructions need the tokenizer 'byte': losses here are nats a byte")

    def model(self, width: int, *, with_rules: bool = True) -> DecoderConfig:
        """The decoder of a width, in the paper's proportions; without the rules as a Llama."""
        plain = DecoderConfig(
            vocab_size=260,
            num_layers=self.num_layers,
            embed_dim=width,
            num_heads=width // HEAD_DIM,
            mlp_dim=5 * width // 2,
            max_length=self.data.sequence_length,
            tie_embeddings=True,
        )
        return self.rules.apply(plain) if with_rules else plain


SMALL = Config(
    data=DataConfig(library="code", tokenizer="byte", sequence_length=64, validation_fraction=0.1),
    instructions=DataConfig(library="instructions", tokenizer="byte", sequence_length=64, validation_fraction=0.1),
)

PRESETS: Mapping[str, Config] = {
    "smoke": dataclasses.replace(
        SMALL,
        data=dataclasses.replace(SMALL.instructions, sequence_length=16),
        instructions=dataclasses.replace(SMALL.instructions, sequence_length=16),
        num_layers=1,
        width=16,
        steps=10,
        rates=(1e-2,),
        widths=(16, 32, 48),
        width_steps=2,
        width_rates=(1e-2, 2e-2),
        law_steps=10,
        sft_steps=1,
        instruction_rows=1,
        batch_size=2,
        judge_rows=4,
        probes=2,
        seeds=(1,),
    ),
    "small": SMALL,
}


class Results(NamedTuple):
    """Losses in nats a byte of held-out text.

    `tuned`: by schedule and rate. `schedules`: by name (`schedule_name`) a loss a seed. `widths`: by `(with rules,
    width)` a loss a rate. `law`: `(parameters without embeddings, tokens, loss)`. `instructions`: by `plain` and
    `mixed` decay, after fine-tuning, a loss a seed. `probes`: by stage and quantity, median over updates, a seed each.
    """

    tuned: Mapping[str, Mapping[float, float]]
    schedules: Mapping[str, Sequence[float]]
    widths: Mapping[tuple[bool, int], Sequence[float]]
    law: Sequence[tuple[float, float, float]]
    instructions: Mapping[str, Sequence[float]]
    probes: Mapping[str, Mapping[str, Sequence[float]]]


def run(config: Config, out: Path) -> Report:
    """All comparisons; what is finished in `out` is not repeated."""
    return report(config, _train(config, out / "members"))


def report(config: Config, results: Results) -> Report:
    """Tables, figures and claims of finished runs."""
    n, d, losses = zip(*results.law, strict=True)
    law = fit_chinchilla(n, d, losses)
    intervals = bootstrap_fit(fit_chinchilla, n, d, losses, resamples=60)
    fitted = [float(law.loss(*point)) for point in zip(n, d, strict=True)]
    coefficients = tuple(
        (field.name, getattr(law, field.name), *intervals[field.name]) for field in dataclasses.fields(law)
    )
    numbers: dict[str, Any] = {f"rate, {name}": _best(tuned) for name, tuned in results.tuned.items()}
    if law.amplitude_n > 0 and law.amplitude_d > 0:
        best = law.optimal_allocation(6 * max(x * y for x, y in zip(n, d, strict=True)))
        numbers["best tokens a parameter at the largest compute (192 in the paper)"] = best.tokens / best.params
    numbers["largest error of the scaling law, nats a byte"] = max(abs(a - b) for a, b in zip(fitted, losses))
    mean = {name: statistics.fmean(values) for name, values in results.schedules.items()}
    tables = (
        Table(
            "Schedules",
            ("schedule", "loss", "seeds apart"),
            tuple((name, mean[name], max(v) - min(v)) for name, v in results.schedules.items()),
            "Nats a byte; lengths in steps, decays in shares of the whole length.",
        ),
        Table(
            "Loss by learning rate and width",
            ("rules", "width", *(f"{rate:g}" for rate in config.width_rates)),
            tuple((rules, width, *losses) for (rules, width), losses in results.widths.items()),
        ),
        Table("Scaling law", ("coefficient", "value", "low", "high"), coefficients, "Intervals of 90 %."),
        Table(
            "What the law is fitted to",
            ("parameters", "tokens", "loss", "of the law"),
            tuple((*point, f) for point, f in zip(results.law, fitted, strict=True)),
        ),
        Table(
            "Along the trajectory",
            ("quantity", *results.probes),
            tuple(
                (name, *(statistics.fmean(found[name]) for found in results.probes.values()))
                for name in next(iter(results.probes.values()))
            ),
            "Median over updates, mean over seeds; gradients of held-out text.",
        ),
    )
    lengths = [h * config.steps for h in HORIZONS]
    figures = (
        Figure(
            "Schedules",
            (
                *(
                    Series(label, lengths, [mean[schedule_name(kind, h * config.steps)] for h in HORIZONS], "points")
                    for label, kind in (("cosine", "cosine"), ("WSD, decay of 10 %", "wsd 10 %"))
                ),
                *(
                    Series(label, lengths[-1:], [mean[schedule_name(kind, lengths[-1])]], "points")
                    for label, kind in (("WSD, decay of 2.5 %", "wsd 2.5 %"), ("not decayed", "stable"))
                ),
            ),
            "steps",
            "nats a byte",
            x_scale="log",
        ),
        *(
            Figure(
                f"Learning rate by width, {'with' if rules else 'without'} the rules",
                tuple(_curve(config, width, results.widths[rules, width]) for width in config.widths),
                "learning rate",
                "nats a byte",
                x_scale="log",
            )
            for rules in (True, False)
        ),
        Figure(
            "Scaling law",
            tuple(
                line
                for size in dict.fromkeys(n)
                for line in (
                    Series(f"{size:,.0f}, law", *_column(zip(n, d, fitted, strict=True), size), "faint"),
                    Series(f"{size:,.0f} parameters", *_column(results.law, size), "points"),
                )
            ),
            "thousand tokens",
            "nats a byte",
            x_scale="log",
        ),
    )
    return Report(
        title="MiniCPM: scalable training strategies",
        summary="Warm-up, stable, decay beside cosine; one learning rate for all widths; branches for a scaling law.",
        numbers=numbers,
        claims=tuple(claims(config, results)),
        tables=tables,
        figures=figures,
    )


def claims(config: Config, results: Results) -> list[Claim]:
    """The paper's claims, judged on the held-out losses."""
    mean = {name: statistics.fmean(values) for name, values in results.schedules.items()}
    lengths = [h * config.steps for h in HORIZONS]
    ours, cosine = (
        [mean[schedule_name(kind, length)] for length in lengths] for kind in ("wsd 10 %", "cosine")
    )
    longest, decayed = lengths[-1], ours[-1]
    stable, short = (mean[schedule_name(kind, longest)] for kind in ("stable", "wsd 2.5 %"))
    at_edge = [kind for kind, losses in results.tuned.items() if _is_at_an_edge(losses)]
    found = [
        Claim(
            "Branches with a decay of 10 % reach cosine's loss (within 0.02 nats) at every length.",
            "reach or exceed cosine",
            f"{_shown(ours)} and {_shown(cosine)}",
            all(a <= b + 0.02 for a, b in zip(ours, cosine, strict=True)),
            f"Best at an edge of the rates tried: {', '.join(at_edge)}." if at_edge else "",
        ),
        Claim(
            "It is the decay that does it: without, the same run is worse by more than 0.05 nats.",
            "a sharp drop",
            f"{stable:.4f} and {decayed:.4f}",
            stable > decayed + 0.05,
        ),
        Claim("A decay of 2.5 % is too short: worse than 10 %.", "falls short", f"{short:.4f} and {decayed:.4f}",
              short > decayed),
    ]  # fmt: skip
    places = {
        rules: [_place(results.widths[rules, width]) for width in config.widths] for rules in (True, False)
    }
    at = {rules: ", ".join(f"{config.width_rates[p]:g}" for p in found_) for rules, found_ in places.items()}
    edges = {0, len(config.width_rates) - 1}
    note = "Some best rates lie at an edge of the rates tried." if edges & {*places[True], *places[False]} else ""
    by_width = "by width " + ", ".join(map(str, config.widths))
    found += [
        Claim(
            "With the rules the best learning rate moves by a factor of 2 at most over all widths.",
            "0.01 at all sizes",
            f"{at[True]} {by_width}",
            max(places[True]) - min(places[True]) <= 1,
            note,
        ),
        Claim(
            "Without them it falls as models widen.", "falls", f"{at[False]} {by_width}",
            places[False][-1] < places[False][0] and sorted(places[False], reverse=True) == places[False], note,
        ),
    ]  # fmt: skip
    plain, mixed = (statistics.fmean(results.instructions[kind]) for kind in ("plain", "mixed"))
    found.append(
        Claim(
            "Instructions in the decay, and then in fine-tuning, beat fine-tuning alone on instructions.",
            "C-Eval 52.6 and 40.0, GSM8K 42.3 and 27.7",
            f"{mixed:.4f} and {plain:.4f} nats a byte",
            mixed < plain,
        )
    )
    curvature = {stage: statistics.fmean(x["curvature"]) for stage, x in results.probes.items()}
    found.append(
        Claim(
            "The loss curves more along the trajectory once the rate has decayed.",
            "rises in the decay",
            f"{curvature['decayed']:.3g} and {curvature['stable']:.3g}",
            curvature["decayed"] > curvature["stable"],
        )
    )
    return found


def _train(config: Config, folder: Path) -> Results:
    lab = Lab(config, {name: read_stream(config, name) for name in ("data", "instructions")})
    keep = bases.Keeper(folder, config)
    tuned = {
        kind: {rate: keep(f"tuning {kind} {rate:g}", lambda k=kind, r=rate: lab.tuning(k, r)) for rate in config.rates}
        for kind in ("cosine", "wsd")
    }
    rates = {kind: _best(losses) for kind, losses in tuned.items()}
    schedules: dict[str, list[float]] = {}
    instructions: dict[str, list[float]] = {"plain": [], "mixed": []}
    probes: dict[str, dict[str, list[float]]] = {"stable": {}, "decayed": {}}
    for seed in config.seeds:
        found = keep(f"cosine {seed}", lambda s=seed: lab.cosine(rates["cosine"], s))
        branches = keep(f"wsd {seed}", lambda s=seed: lab.branches(rates["wsd"], s))
        for name, loss in {**found, **branches["losses"]}.items():
            schedules.setdefault(name, []).append(number(loss))
        for kind, losses in instructions.items():
            losses.append(number(branches["instructions"][kind]))
        for stage, columns in probes.items():
            for name, value in branches["probes"][stage].items():
                columns.setdefault(name, []).append(number(value))
    widths = {
        (rules, width): keep(f"rates width {width} {rules}", lambda r=rules, w=width: lab.rates(w, r))
        for rules in (True, False)
        for width in config.widths
    }
    widths = {key: [number(x) for x in losses] for key, losses in widths.items()}
    narrowest = config.width_rates[_place(widths[True, min(config.widths)])]
    law = [
        tuple(point)
        for width in config.widths
        for point in keep(f"law width {width}", lambda w=width: lab.law(w, narrowest))
    ]
    return Results(tuned, schedules, widths, law, instructions, probes)


def _best(losses: Mapping[float, float]) -> float:
    """The rate with the least loss."""
    finite = {rate: number(loss) for rate, loss in losses.items() if math.isfinite(number(loss))}
    if not finite:
        raise ConfigError(f"every run diverges at the rates {list(losses)}: try smaller ones")
    return min(finite, key=finite.__getitem__)


def _is_at_an_edge(losses: Mapping[float, float]) -> bool:
    return len(losses) > 1 and _best(losses) in (min(losses), max(losses))


def _place(losses: Sequence[float]) -> int:
    return min(range(len(losses)), key=losses.__getitem__)


def _column(points: Any, size: float) -> tuple[list[float], list[float]]:
    chosen = [(tokens, loss) for n, tokens, loss in points if n == size]
    return [x / 1000 for x, _ in chosen], [y for _, y in chosen]


def _curve(config: Config, width: int, losses: Sequence[float]) -> Series:
    points = [(rate, loss) for rate, loss in zip(config.width_rates, losses, strict=True) if math.isfinite(loss)]
    return Series(f"width {width}", [x for x, _ in points], [y for _, y in points], "points")


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.4f}" for v in values)


if __name__ == "__main__":
    runner.main(__name__)
