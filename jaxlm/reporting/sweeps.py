"""A sweep's results as a table and as figures."""

import math
from typing import TYPE_CHECKING

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.reporting.report import Cell, Figure, Series, Table

if TYPE_CHECKING:  # reports need no JAX
    from jaxlm.training.sweeps import Results, Search


def sweep_table(results: "Results", title: str = "Sweep", caption: str = "") -> Table:
    """A row a point, the best first: its hyperparameters, mean and standard deviation over seeds, tokens of a run."""
    names = _names(results)
    rows: list[tuple[Cell, ...]] = []
    for trial in sorted(results.trials, key=lambda trial: results.mean(trial.point)):
        mean, deviation = results.mean(trial.point), results.deviation(trial.point)
        point = [trial.point.get(name) for name in names]
        rows.append((*point, mean, deviation, len(trial.outcomes), trial.tokens))
    columns = (*names, results.metric, "standard deviation", "seeds", "tokens")
    return Table(title, columns, tuple(rows), caption)


def certificate_table(search: "Search", title: str = "Local optimum") -> Table:
    """The best point of a coordinate search, and its neighbors with how much worse they are."""
    names = list(search.best)
    rows = [(*[search.best[n] for n in names], search.value, 0.0)]
    rows += [(*[point[n] for n in names], value, value - search.value) for point, value in search.certificate]
    said = "No neighbor is better." if search.certified else "The search was ended before it was sure."
    if search.edges:
        said += f" At an edge of the values tried: {', '.join(search.edges)}."
    return Table(title, (*names, search.results.metric, "worse by"), tuple(rows), said)


def sweep_figure(results: "Results", x: str, title: str = "Sweep", y_label: str = "") -> Figure:
    """Means over seeds by hyperparameter `x`, a line for each combination of the others; what diverged is left out.

    Raises `ConfigError` for an unknown `x`, one that is no number, or if nothing is finite.
    """
    names = _names(results)
    if x not in names:
        raise ConfigError(f"no hyperparameter '{x}': {nearest(x, names)}")
    lines: dict[str, list[tuple[float, float]]] = {}
    for trial in results.trials:
        at = trial.point[x]
        if isinstance(at, (bool, str)):
            raise ConfigError(f"'{x}' is {at!r}, expected a number to draw along")
        others = ", ".join(f"{name} {trial.point[name]}" for name in names if name != x and _varies(results, name))
        if math.isfinite(results.mean(trial.point)):
            lines.setdefault(others or results.metric, []).append((at, results.mean(trial.point)))
    if not lines:
        raise ConfigError(f"figure '{title}': every run diverged")
    series = tuple(Series(name, *zip(*sorted(points))) for name, points in lines.items())
    values = [value for line in series for value in line.x]
    log = min(values) > 0 and max(values) >= 8 * min(values)
    return Figure(title, series, x, y_label or results.metric, x_scale="log" if log else "linear")


def _names(results: "Results") -> list[str]:
    return list(dict.fromkeys(name for trial in results.trials for name in trial.point))


def _varies(results: "Results", name: str) -> bool:
    return len({trial.point.get(name) for trial in results.trials}) > 1
