"""Tables, figures and laws of `experiments.optimization.infinite_compute`."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.optimization.infinite_compute_runs import Results, Tuned
from jaxlm.evals.scaling import PowerLaw, bootstrap_fit, data_efficiency, fit_power_law, nested_asymptote
from jaxlm.reporting import Claim, Figure, Report, Series, Table

if TYPE_CHECKING:
    from experiments.optimization.infinite_compute import Config


class Laws:
    """What is fitted to the results. `size`: loss of one regularized model by parameters. `members`: of an ensemble by
    number of members, of each size; `joint`: their limits by parameters. `tokens`: of the standard recipe."""

    def __init__(self, config: "Config", results: Results):
        self.single = [statistics.fmean(results.single["regularized", i]) for i in range(len(config.widths))]
        self.standard = [statistics.fmean(results.single["standard", i]) for i in range(len(config.widths))]
        self.counts = tuple(range(1, len(config.seeds) + 1))
        self.size = fit_power_law(results.params, self.single)
        self.members, self.joint = nested_asymptote(results.params, self.counts, results.ensembles)
        tokens, losses = zip(*results.budgets, strict=True)
        self.tokens = fit_power_law(tokens, losses)

    def efficiency(self, results: Results, loss: float) -> float:
        """How many times the corpus the standard recipe needs for a loss."""
        return data_efficiency(self.tokens, loss, results.tokens)


def report(config: "Config", results: Results, claims: Sequence[Claim]) -> Report:
    """Tables and figures of finished runs, beside the claims."""
    laws = Laws(config, results)
    names = [name for name, _ in config.models()]
    recipes = [
        (name, label, n, tuned.point["epochs"], tuned.point["learning_rate"], tuned.point["weight_decay"],
         statistics.fmean(results.single[label, i]), _apart(results.single[label, i]), ", ".join(tuned.edges))
        for i, (name, n) in enumerate(zip(names, results.params, strict=True))
        for label, tuned in (("standard", results.standard[i]), ("regularized", results.regularized[i]))
    ]  # fmt: skip
    tokens, losses = zip(*results.budgets, strict=True)
    fitted = (
        ("one regularized model, by parameters", laws.size, (results.params, laws.single)),
        *(
            (f"ensembles, by members, {name}", law, (laws.counts, losses))
            for name, law, losses in zip(names, laws.members, results.ensembles, strict=True)
        ),
        ("limits of ensembles, by parameters", laws.joint, (results.params, [law.asymptote for law in laws.members])),
        (f"standard, by tokens, {names[config.at]}", laws.tokens, (tokens, losses)),
    )
    reached = {
        "regularized": laws.single[config.at],
        f"ensemble of {len(config.seeds)}": results.ensembles[config.at][-1],
        "student of the ensemble": statistics.fmean(results.students["ensemble"]),
        "student of one model": statistics.fmean(results.students["single"]),
        "limit of ensembles and sizes": laws.joint.asymptote,
    }
    searches = [
        (name, *(neighbor[k] for k in ("epochs", "learning_rate", "weight_decay")), worse)
        for name, tuned in zip(names, results.regularized, strict=True)
        for neighbor, worse in tuned.certificate
    ]
    tables = (
        Table(
            "Tuned recipes",
            ("size", "recipe", "parameters", "epochs", "learning rate", "weight decay", "loss", "seeds apart", "edges"),
            tuple(recipes),
            "Nats a byte of held-out text that nothing was tuned on, mean over seeds. Edges: what has its best value "
            "at an end of the grid.",
        ),
        Table(
            "Ensembles",
            ("size", *(f"{k} members" for k in laws.counts)),
            tuple((name, *row) for name, row in zip(names, results.ensembles, strict=True)),
            f"Logits averaged; mean over orders of the members. At {names[config.at]}, with probabilities averaged: "
            f"{results.probabilities:.4f}; with members trained twice as long at half the decay: "
            f"{', '.join(f'{loss:.4f}' for loss in results.overfit)}.",
        ),
        Table(
            f"At {names[config.at]}",
            ("recipe", "loss", "times the corpus"),
            (
                ("standard", laws.standard[config.at], laws.efficiency(results, laws.standard[config.at])),
                *((name, loss, laws.efficiency(results, loss)) for name, loss in reached.items()),
            ),
            "How much text the standard recipe would need for each loss, by its law.",
        ),
        Table(
            "Laws",
            ("law", "amplitude", "exponent", "asymptote", "low", "high"),
            tuple((name, *_law_row(law, points)) for name, law, points in fitted),
            "Loss = amplitude * x^-exponent + asymptote; interval of 90 % of the asymptote.",
        ),
        Table(
            "Neighbors of the regularized recipes",
            ("size", "epochs", "learning rate", "weight decay", "worse by"),
            tuple(searches),
            "Nats a byte of the tuning text. No neighbor is better."
            if all(tuned.certified for tuned in results.regularized)
            else "Some searches ended before it was sure.",
        ),
    )
    return Report(
        title="Pre-training under infinite compute",
        summary="Weight decay tuned with epochs and learning rate; ensembles; students of what they write.",
        numbers={
            "tokens of the corpus": results.tokens,
            "asymptote of one model": laws.size.asymptote,
            f"asymptote of ensembles, {names[config.at]}": laws.members[config.at].asymptote,
            "asymptote of both": laws.joint.asymptote,
            "share of the ensemble's gain that the student keeps": _kept(laws, config, results),
        },
        claims=tuple(claims),
        tables=tables,
        figures=_figures(config, results, laws),
    )


def best_by(tuned: Tuned, name: str) -> dict[float, float]:
    """The judged loss at each value of a coordinate, of the trial that is the best on the tuning text."""
    found: dict[float, tuple[float, float]] = {}
    for point, tuning, judge in tuned.trials:
        found[point[name]] = min(found.get(point[name], (math.inf, math.inf)), (tuning, judge))
    return {value: judge for value, (_, judge) in sorted(found.items())}


def shown(values: Sequence[float]) -> str:
    """Losses as text."""
    return ", ".join(f"{v:.4f}" for v in values)


def _figures(config: "Config", results: Results, laws: Laws) -> tuple[Figure, ...]:
    names = [name for name, _ in config.models()]
    tokens, losses = zip(*results.budgets, strict=True)
    ahead = range(1, 2 * len(laws.counts) + 1)
    return (
        Figure(
            "Standard weight decay",
            tuple(
                Series(name, *_finite(best_by(tuned, "epochs")), "points")
                for name, tuned in zip(names, results.standard, strict=True)
            ),
            "epochs",
            "nats a byte",
            x_scale="log",
            caption=f"Weight decay {config.standard_decay:g}, the best learning rate of each; of the runs that were "
            "tuned, on text that nothing was tuned on.",
        ),
        Figure(
            "Weight decay",
            tuple(
                Series(name, *_finite(best_by(tuned, "weight_decay")), "points")
                for name, tuned in zip(names, results.regularized, strict=True)
            ),
            "weight decay",
            "nats a byte",
            x_scale="log",
            caption="The best of the points that a search tried; of the runs that were tuned, on text that nothing was "
            "tuned on.",
        ),
        Figure(
            "Sizes",
            (
                Series("standard", results.params, laws.standard, "points"),
                Series("regularized", results.params, laws.single, "points"),
                Series("regularized, law", results.params, laws.size.loss(results.params), "faint"),
                Series(f"ensembles of {len(config.seeds)}", results.params, [e[-1] for e in results.ensembles],
                       "points"),
                Series("limits of ensembles", results.params, [law.asymptote for law in laws.members], "points"),
            ),
            "parameters of a model",
            "nats a byte",
            x_scale="log",
        ),
        Figure(
            "Ensembles",
            tuple(
                line
                for name, law, found in zip(names, laws.members, results.ensembles, strict=True)
                for line in (
                    Series(name, laws.counts, found, "points"),
                    Series(f"{name}, law", ahead, law.loss(ahead), "faint"),
                )
            ),
            "members",
            "nats a byte",
        ),
        Figure(
            "Text",
            (
                Series("standard", tokens, losses, "points"),
                Series("law", tokens, laws.tokens.loss(tokens), "faint"),
                Series("regularized", [results.tokens], [laws.single[config.at]], "points"),
                Series("ensemble", [results.tokens], [results.ensembles[config.at][-1]], "points"),
                Series("student", [results.tokens], [statistics.fmean(results.students["ensemble"])], "points"),
            ),
            "tokens",
            "nats a byte",
            x_scale="log",
        ),
    )  # fmt: skip


def _kept(laws: Laws, config: "Config", results: Results) -> float:
    """The student's gain over one model as a share of the ensemble's."""
    alone = laws.single[config.at]
    gain = alone - results.ensembles[config.at][-1]
    return (alone - statistics.fmean(results.students["ensemble"])) / gain if gain > 0 else math.nan


def _law_row(law: PowerLaw, points: tuple[Sequence[float], Sequence[float]]) -> tuple[float, ...]:
    low, high = bootstrap_fit(fit_power_law, *points, resamples=60)["asymptote"]
    return law.amplitude, law.exponent, law.asymptote, low, high


def _finite(losses: Mapping[float, float]) -> tuple[list[float], list[float]]:
    points = [(x, y) for x, y in losses.items() if math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]


def _apart(losses: Sequence[float]) -> float:
    return max(losses) - min(losses)
