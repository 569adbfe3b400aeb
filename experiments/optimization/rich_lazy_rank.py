"""Rank of the initial weights decides how richly a network learns: low rank changes much, high rank little.

Liu, Baratin, Cornford, Mihalas, Shea-Brown and Lajoie, "How connectivity structure shapes rich and lazy learning in
neural circuits", ICLR 2024, arXiv 2310.08513. At equal Frobenius norm, recurrent networks that start with low-rank
weights move further in weights, representations and tangent kernel (rich) than those of high rank (lazy). In a
two-layer linear network it is a theorem, in expectation over tasks; low-rank weights aligned with the task stay lazy.

    python -m experiments.optimization.rich_lazy_rank                    # small
    python -m experiments.optimization.rich_lazy_rank --preset llama     # a small Llama as well
    python -m experiments.optimization.rich_lazy_rank --preset paper     # 300 units, three tasks, 10,000 iterations

Three testbeds: linear networks trained to zero loss; recurrent networks on cognitive tasks, each stopped at the same
loss; and, beyond the paper, a small Llama whose kernels start at low rank. Settings and the loss to stop at were chosen
with seed 0, which is not judged.

Expect of `small` (two x86 cores, about 3 minutes; its kept result reused finished networks, so its seconds are less):
at equal Frobenius norm kernel alignment rises with rank in linear networks of norm 1 (0.14 to 0.71) and on all tasks
(0.36 to 0.50, 0.32 to 0.53, 0.18 to 0.40).
Rank 1 changes its weights most, but ranks 8 and 64 are about equal on two of three tasks, so that
order does not hold in full; nor does it for representations of linear networks at norm 3. At equal spectral norm
kernel alignments have no order, and rank 1 does not learn to match in these steps.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import runner
from experiments.bases import StudyConfig
from experiments.checks import check_counts, check_seeds
from experiments.optimization.rich_lazy_rank_runs import (
    Measure,
    Measures,
    train_decoder,
    train_linear,
    train_recurrent,
)
from jaxlm.core.errors import ConfigError
from jaxlm.data.prepare import DataConfig
from jaxlm.data.synthetic.cognitive_tasks import CognitiveTask
from jaxlm.models.config import DecoderConfig
from jaxlm.reporting import Claim, Figure, Report, Series, Table


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """Two-layer linear networks of `width` inputs and units; full-batch gradient descent on whitened inputs."""

    width: int = 40
    ranks: tuple[int, ...] = (1, 4, 10, 40)
    norms: tuple[float, ...] = (1.0, 3.0)
    """Frobenius norms of the first layer."""
    learning_rate: float = 0.02
    max_steps: int = 20_000
    """Steps at most; training ends at a loss of 1e-6."""

    def __post_init__(self):
        check_counts(self, "width", "max_steps")
        if not self.ranks or max(self.ranks) > self.width or min(self.ranks) < 1:
            raise ConfigError(f"ranks are {self.ranks}, expected 1 to {self.width}")
        if not self.norms or not min(self.norms) > 0:
            raise ConfigError(f"norms are {self.norms}, expected positive ones")


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """Recurrent networks on cognitive tasks, trained by SGD with momentum."""

    tasks: tuple[str, ...] = ("choice", "match", "context")
    hidden: int = 64
    ranks: tuple[int, ...] = (1, 8, 64)
    gain: float = 1.25
    iterations: int = 3000
    batch_size: int = 32
    learning_rate: float = 0.01
    momentum: float = 0.9
    stop_at: tuple[float, ...] = (0.042, 0.01, 0.045)
    """Training loss (a running mean over about 50 batches) at which a run of each task ends; 0: it runs through."""
    spectral: bool = True
    """Also compares ranks at equal spectral norm: scaling to equal Frobenius norm raises it at low rank."""

    def __post_init__(self):
        if len(self.stop_at) != len(self.tasks):
            raise ConfigError(f"stop_at has {len(self.stop_at)} losses for {len(self.tasks)} tasks")
        for name in self.tasks:
            CognitiveTask(name)
        check_counts(self, "hidden", "iterations", "batch_size")
        if not self.ranks or max(self.ranks) > self.hidden or min(self.ranks) < 1:
            raise ConfigError(f"ranks are {self.ranks}, expected 1 to {self.hidden}")


@dataclasses.dataclass(frozen=True)
class Config:
    """Three testbeds; every network is trained once a seed and rank."""

    linear: LinearConfig = LinearConfig()
    recurrent: RecurrentConfig = RecurrentConfig()
    decoder: StudyConfig | None = None
    """Text, model and steps of the small Llama; None leaves it out."""
    decoder_ranks: tuple[int, ...] = (2, 8, 64)
    decoder_rate: float = 1e-3
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)

    def __post_init__(self):
        check_seeds(self.seeds)


SMALL = Config()

LLAMA = Config(
    decoder=StudyConfig(
        model=DecoderConfig(vocab_size=1024, num_layers=2, embed_dim=64, num_heads=4, mlp_dim=192, max_length=48),
        data=DataConfig(vocab_size=1024, sequence_length=48),
        steps=150,
        judge_rows=64,
    ),
)

PRESETS: Mapping[str, Config] = {
    "smoke": Config(
        linear=LinearConfig(width=6, ranks=(1, 6), norms=(3.0,), max_steps=2000),
        recurrent=RecurrentConfig(("match",), hidden=8, ranks=(1, 8), iterations=5, stop_at=(0.0,), spectral=False),
        decoder=StudyConfig(
            model=DecoderConfig(vocab_size=512, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16, max_length=32),
            data=DataConfig(tokenizer="byte", sequence_length=32),
            steps=2,
            batch_size=4,
            judge_rows=8,
        ),
        decoder_ranks=(1, 16),
        seeds=(1,),
    ),
    "small": SMALL,
    "llama": LLAMA,
    "paper": Config(
        recurrent=RecurrentConfig(
            ("choice", "match", "context"), 300, (1, 30, 100, 300), iterations=10_000, learning_rate=0.003,
            stop_at=(0.0, 0.0, 0.0), spectral=False,
        ),
        seeds=tuple(range(1, 11)),
    ),
}  # fmt: skip


def run(config: Config, out: Path) -> Report:
    """Trains and measures every network; recurrent ones and decoders that are finished in `out` are not repeated."""
    linear, aligned = {}, {}
    for norm in config.linear.norms:
        linear[norm] = {rank: train_linear(config, norm, rank) for rank in config.linear.ranks}
        aligned[norm] = train_linear(config, norm, None)
    matches = ("frobenius", "spectral") if config.recurrent.spectral else ("frobenius",)
    kinds = [(task, match) for match in matches for task in config.recurrent.tasks]
    recurrent = {kind: train_recurrent(config, *kind, out) for kind in kinds}
    decoder = {} if config.decoder is None else train_decoder(config, out)
    return report(linear, aligned, recurrent, decoder)


def report(
    linear: Mapping[float, Measures],
    aligned: Mapping[float, Sequence[Measure]],
    recurrent: Mapping[tuple[str, str], Measures],
    decoder: Measures,
) -> Report:
    """Tables, figures and claims of what was measured."""
    rows = []
    for norm, measures in linear.items():
        rows += [("linear", f"norm {norm:g}", str(rank), *_means(found)) for rank, found in measures.items()]
        rows.append(("linear", f"norm {norm:g}", "1, aligned", *_means(aligned[norm])))
    for (task, match), measures in recurrent.items():
        rows += [(task, f"equal {match} norm", str(rank), *_means(found)) for rank, found in measures.items()]
    rows += [("decoder", "equal frobenius norm", str(rank), *_means(found)) for rank, found in decoder.items()]
    columns = (
        "network", "initial weights", "rank", "kernel alignment", "representation alignment", "weight change",
        "sign similarity", "loss", "steps",
    )  # fmt: skip
    lines = {f"linear, norm {norm:g}": measures for norm, measures in linear.items()}
    lines |= {task: measures for (task, match), measures in recurrent.items() if match == "frobenius"}
    lines |= {"decoder": decoder} if decoder else {}
    figures = [
        _figure("Kernel alignment", lines, "kernel", "cosine of kernels after and before"),
        _figure("Representation alignment", lines, "representation", "cosine of similarities after and before"),
        _figure("Weight change", lines, "weights", "Frobenius norm of the change"),
    ]
    return Report(
        title="Rich and lazy learning by initial rank",
        summary="Linear networks, recurrent networks on cognitive tasks and a small Llama from weights of low and "
        "high rank and equal norm: how far training moves weights, representations and tangent kernel.",
        numbers={f"networks, {name}": sum(len(found) for found in m.values()) for name, m in lines.items()},
        claims=tuple(claims(linear, aligned, recurrent, decoder)),
        tables=(Table("Before and after training, means over seeds", columns, tuple(rows)),),
        figures=tuple(figures),
    )


def claims(
    linear: Mapping[float, Measures],
    aligned: Mapping[float, Sequence[Measure]],
    recurrent: Mapping[tuple[str, str], Measures],
    decoder: Measures,
) -> list[Claim]:
    """What the paper says that these networks can judge. An order holds if it does between the means of all ranks."""
    found = []

    def order(statement: str, measures: Measures, name: str, paper: str | None, rising: bool) -> None:
        common, note = _comparable(measures)
        means = [_mean(common[rank], name) for rank in sorted(common)]
        ordered = all((a < b) if rising else (a > b) for a, b in zip(means, means[1:]))
        shown = ", ".join(f"{mean:.3g} (rank {rank})" for rank, mean in zip(sorted(common), means))
        found.append(Claim(statement, paper, shown, bool(means) and ordered and not math.isnan(sum(means)), note))

    smallest, largest = min(linear), max(linear)
    theorem = "theorem, in expectation over tasks"
    at = f"Linear networks of norm {smallest:g}"
    order(f"{at}: kernel alignment rises with rank.", linear[smallest], "kernel", theorem, True)
    order(f"{at}: weights change less at higher rank.", linear[smallest], "weights", theorem, False)
    order(
        f"Linear networks of norm {largest:g}: representation alignment rises with rank.",
        linear[largest], "representation", None, True,
    )  # fmt: skip
    stays, random = _mean(aligned[largest], "kernel"), _mean(linear[largest][min(linear[largest])], "kernel")
    found.append(
        Claim(
            "Low-rank weights aligned with the task stay lazy (kernel alignment above 0.95).",
            "exception named by the paper",
            f"{stays:.3g} aligned, {random:.3g} random",
            stays > 0.95 > random,
        )
    )
    for (task, match), measures in recurrent.items():
        where = f"Recurrent, {task}" + ("" if match == "frobenius" else ", equal spectral norms")
        paper = "as stated (figure 2)" if match == "frobenius" else None
        order(f"{where}: weights change less at higher rank.", measures, "weights", paper, False)
        order(f"{where}: kernel alignment rises with rank.", measures, "kernel", paper, True)
        if match == "frobenius":
            order(f"{where}: representation alignment rises with rank.", measures, "representation", paper, True)
    if decoder:
        order("Small Llama: kernel alignment rises with rank.", decoder, "kernel", None, True)
        order("Small Llama: weights change less at higher rank.", decoder, "weights", None, False)
    return found


def _comparable(measures: Measures) -> tuple[Measures, str]:
    """The seeds with which networks of every rank reached the loss that they are compared at."""
    seeds = range(min(len(found) for found in measures.values()))
    kept = [i for i in seeds if all(found[i].reached for found in measures.values())]
    note = "" if len(kept) == len(seeds) else f"Of {len(seeds)} seeds, {len(kept)} reach the same loss at all ranks."
    return {rank: [found[i] for i in kept] for rank, found in measures.items()}, note


def _mean(found: Sequence[Measure], name: str) -> float:
    return statistics.fmean(getattr(m, name) for m in found) if found else math.nan


def _means(found: Sequence[Measure]) -> tuple[float | None, ...]:
    values = [_mean(found, name) for name in ("kernel", "representation", "weights", "signs", "loss", "steps")]
    return tuple(None if math.isnan(value) else value for value in values)


def _figure(title: str, lines: Mapping[str, Measures], name: str, label: str) -> Figure:
    series = tuple(
        Series(line, tuple(measures), tuple(_mean(found, name) for found in measures.values()), style="points")
        for line, measures in lines.items()
    )
    return Figure(title, series, "rank of the initial weights", label, x_scale="log")


if __name__ == "__main__":
    runner.main(__name__)
