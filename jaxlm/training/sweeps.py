"""Sweeps over hyperparameters on top of populations: grids, random search, coordinate search, paired seeds.

    sweep = Sweep(make, traced=("learning_rate", "weight_decay"), seeds=(0, 1), folder=out / "sweep")
    found = sweep.run(grid({"learning_rate": (1e-3, 3e-3), "weight_decay": (0.1, 0.4), "embed_dim": (64, 128)}))
    found.best().point, found.mean(point), found.deviation(point)

A point gives each hyperparameter a value. Those that are `traced` are numbers that a compiled program takes, so points
that agree in all others are trained as one population; for the others `make` builds the program. Every point is
trained with the same seeds, so points can be compared seed by seed. What is finished stays in `folder` and is never
trained again. `jaxlm.reporting.sweeps` draws the table and the figure.
"""

import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxlm.core.configs import fingerprint
from jaxlm.core.errors import ConfigError, nearest
from jaxlm.training.populations import Member, Outcome, Population

Value = float | int | str | bool
Point = Mapping[str, Value]
Range = tuple[float, float, str]
"""`(low, high, "log")` or `(low, high, "linear")`."""

SCALES = ("log", "linear")


def grid(space: Mapping[str, Sequence[Value]]) -> list[Point]:
    """Every combination of values, the last hyperparameter varying fastest.

    Raises `ConfigError` for a space without hyperparameters, one without values, or a value given twice.
    """
    if not space:
        raise ConfigError("the grid is empty: it has no hyperparameters")
    for name, values in space.items():
        if isinstance(values, str) or not len(values):
            raise ConfigError(f"the grid is empty: '{name}' is {values!r}, expected a list of values")
        if len(set(values)) < len(values):
            raise ConfigError(f"the grid has a value of '{name}' twice: {tuple(values)}")
        if len(values) == 3 and values[2] in SCALES and isinstance(values[2], str):
            raise ConfigError(f"'{name}' is the range {tuple(values)}: a grid takes values; see random_points")
    return [dict(zip(space, values)) for values in itertools.product(*space.values())]


def random_points(space: Mapping[str, Sequence[Value] | Range], count: int, seed: int = 0) -> list[Point]:
    """Different points drawn at random: from lists of values, and between bounds, evenly in their scale.

    The first n of a greater `count` are the points of `count` n, so that a search can go on (Bergstra and Bengio 2012,
    "Random Search for Hyper-Parameter Optimization").

    Raises `ConfigError` for an empty space, bad bounds, or more points than there are.
    """
    if not space or count < 1:
        raise ConfigError(f"{count} points of a space of {len(space)} hyperparameters: expected at least one of each")
    draws = {name: _draw(name, values) for name, values in space.items()}
    rng, found = random.Random(seed), {}
    for _ in range(1000 * count):
        point = {name: draw(rng) for name, draw in draws.items()}
        found.setdefault(tuple(point.values()), point)
        if len(found) == count:
            return list(found.values())
    raise ConfigError(f"the space has {len(found)} points, fewer than {count}")


def steps_for(tokens: int, tokens_per_step: int) -> int:
    """Steps that train on exactly so many tokens: equal budgets for runs whose batches differ.

    Raises `ConfigError` where the budget does not divide.
    """
    if tokens_per_step < 1 or tokens < 1 or tokens % tokens_per_step:
        raise ConfigError(f"a budget of {tokens} tokens does not divide into steps of {tokens_per_step}")
    return tokens // tokens_per_step


@dataclasses.dataclass(frozen=True)
class Trial:
    """A point with the outcomes of its runs, one a seed."""

    point: Point
    outcomes: tuple[Outcome, ...]
    tokens: int | None
    """Of each run, where the population says how many a step has."""

    def values(self, metric: str) -> tuple[float, ...]:
        """A result of each run; `ConfigError` for one that there is not."""
        for outcome in self.outcomes:
            if metric not in outcome.results:
                raise ConfigError(f"no result '{metric}': {nearest(metric, outcome.results)}")
        return tuple(outcome.results[metric] for outcome in self.outcomes)


@dataclasses.dataclass(frozen=True)
class Results:
    """The trials of a sweep. The lower `metric`, the better; a run that diverged counts as infinite."""

    trials: tuple[Trial, ...]
    metric: str
    seeds: tuple[int, ...]

    def trial(self, point: Point) -> Trial:
        """The trial of a point; `ConfigError` for one that was not tried."""
        for trial in self.trials:
            if trial.point == point:
                return trial
        raise ConfigError(f"the point {describe(point)} was not tried")

    def mean(self, point: Point) -> float:
        """Mean of the metric over seeds."""
        return _mean(self.trial(point).values(self.metric))

    def deviation(self, point: Point) -> float:
        """Standard deviation of the metric over seeds (of the population that they sample); 0 of one seed."""
        return _deviation(self.trial(point).values(self.metric))

    def best(self) -> Trial:
        """The trial with the least mean. Raises `ConfigError` if every point diverged."""
        found = min(self.trials, key=lambda trial: _mean(trial.values(self.metric)))
        if not math.isfinite(_mean(found.values(self.metric))):
            raise ConfigError(f"each of the {len(self.trials)} points diverged: try smaller learning rates")
        return found

    def difference(self, point: Point, other: Point) -> tuple[float, float]:
        """Mean of `point`'s metric minus `other`'s, seed by seed, and the standard error of that mean.

        Where runs of one point alone diverged, the difference is infinite; where runs of both did, NaN.
        """
        ours, theirs = (self.trial(p).values(self.metric) for p in (point, other))
        means = _mean(ours), _mean(theirs)
        if math.inf in means:
            return means[0] - means[1], math.nan
        paired = [a - b for a, b in zip(ours, theirs)]
        return _mean(paired), _deviation(paired) / math.sqrt(len(paired))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What the points of a sweep have in common.

    Args:
      make: the population for the values of a point that are not `traced`.
      traced: hyperparameters that are `hparams` of members.
      metric: the result to go by, the lower the better.
      seeds: of every point's runs.
      folder: where finished runs are kept, a folder a program.
      budget: tokens that every run must train on; `steps_for` gives the steps.
      frozen, start: as of `Population.train`.
      keep_params: whether outcomes have parameters.
      report: called with each outcome.
      check_every, stop: as of `Population.train`.
    """

    make: Callable[[Point], Population]
    traced: tuple[str, ...]
    metric: str = "loss"
    seeds: tuple[int, ...] = (0,)
    folder: Path | None = None
    budget: int | None = None
    frozen: Any = None
    start: Any = None
    keep_params: bool = False
    report: Callable[[Outcome], None] | None = None
    check_every: int | None = None
    stop: Callable[[Member, Mapping], bool] | None = None

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds are {self.seeds}, expected different ones")

    def run(self, points: Sequence[Point], known: Iterable[str] | None = None) -> Results:
        """Trains every point with every seed; trials in the order of `points`.

        `known`: the names that points may have, by default those of the first and `traced`.

        Raises:
          ConfigError: no points, a point twice, a hyperparameter that is not known or lacks in a point, a traced one
            that is no number, a population that does not train on the budget.
          DataError: as `Population.train`.
        """
        self._check(points, known)
        groups: dict[str, list[Point]] = {}
        for point in points:
            groups.setdefault(describe(self._static(point)), []).append(point)
        populations = {name: self.make(self._static(group[0])) for name, group in groups.items()}
        tokens = {name: self._tokens(name, population) for name, population in populations.items()}
        found: dict[str, Trial] = {}
        for name, group in groups.items():
            members = [self._member(point, seed) for point in group for seed in self.seeds]
            outcomes = populations[name].train(
                members,
                frozen=self.frozen,
                start=self.start,
                folder=None if self.folder is None else Path(self.folder) / _folder_name(name),
                keep_params=self.keep_params,
                report=self.report,
                check_every=self.check_every,
                stop=self.stop,
            )
            for i, point in enumerate(group):
                runs = tuple(outcomes[i * len(self.seeds) : (i + 1) * len(self.seeds)])
                found[describe(point)] = Trial(point, runs, tokens[name])
        return Results(tuple(found[describe(point)] for point in points), self.metric, self.seeds)

    def _static(self, point: Point) -> Point:
        return {name: value for name, value in point.items() if name not in self.traced}

    def _member(self, point: Point, seed: int) -> Member:
        hparams = {name: float(point[name]) for name in self.traced}
        return Member(f"{describe(hparams)} seed {seed}", seed, hparams)

    def _tokens(self, name: str, population: Population) -> int | None:
        tokens = None if population.tokens_per_step is None else population.num_steps * population.tokens_per_step
        if self.budget is not None and tokens != self.budget:
            found = "does not say its tokens_per_step" if tokens is None else f"trains on {tokens} tokens"
            raise ConfigError(f"the population of '{name}' {found}, expected the budget of {self.budget}")
        return tokens

    def _check(self, points: Sequence[Point], known: Iterable[str] | None) -> None:
        if not points:
            raise ConfigError("there are no points to try")
        names = set(points[0]) | set(self.traced) if known is None else set(known) | set(self.traced)
        for point in points:
            for name in point:
                if name not in names:
                    raise ConfigError(f"unknown hyperparameter '{name}' in {describe(point)}: {nearest(name, names)}")
            if lacking := sorted((set(points[0]) | set(self.traced)) - set(point)):
                raise ConfigError(f"the point {describe(point)} lacks '{lacking[0]}'")
            for name in self.traced:
                value = point[name]
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                    raise ConfigError(f"'{name}' is {value!r}, expected a number: it is traced")
        described = [describe(point) for point in points]
        if twice := [name for name in dict.fromkeys(described) if described.count(name) > 1]:
            raise ConfigError(f"points that are there more than once: {'; '.join(twice)}")


@dataclasses.dataclass(frozen=True)
class Search:
    """What `coordinate_search` found.

    `certificate`: each point one step away in one coordinate, with its mean; none is better than `best`'s if the search
    is `certified`. `edges`: coordinates whose least or greatest value is the best, so that a better one may lie beyond.
    """

    best: Point
    value: float
    certificate: tuple[tuple[Point, float], ...]
    certified: bool
    edges: tuple[str, ...]
    results: Results


def coordinate_search(
    sweep: Sweep, axes: Mapping[str, Sequence[Value]], start: Point, *, max_points: int | None = None
) -> Search:
    """Goes to the best neighbor until none is better: a local optimum of the grid, with its certificate.

    A neighbor has the next or previous value of `axes` in one coordinate. All neighbors of a point that were not tried
    yet are trained together. (Kim, Kotha et al. 2025, arXiv 2509.14786, accept a setting of epochs, learning rate and
    weight decay when no neighbor is better.)

    Args:
      axes: ordered values of each hyperparameter.
      start: a point of the grid.
      max_points: to try at most; the search that reaches it is not certified.

    Raises `ConfigError` for a bad grid, a start that is not on it, or if every point tried diverged.
    """
    grid(axes)
    for name in start:
        if name not in axes:
            raise ConfigError(f"unknown hyperparameter '{name}' in the start: {nearest(name, axes)}")
    for name, values in axes.items():
        if start.get(name) not in values:
            raise ConfigError(f"the start has '{name}' at {start.get(name)!r}, expected one of {tuple(values)}")
    best: Point = {name: start[name] for name in axes}
    tried: dict[str, Trial] = {}

    def value(point: Point) -> float:
        return _mean(tried[describe(point)].values(sweep.metric))

    while True:
        around = _neighbors(axes, best)
        untried = [point for point in (best, *around) if describe(point) not in tried]
        complete = max_points is None or len(tried) + len(untried) <= max_points
        if not complete:
            untried = untried[: max_points - len(tried)]
        if untried:
            tried |= {describe(trial.point): trial for trial in sweep.run(untried, known=axes).trials}
        if describe(best) not in tried:
            raise ConfigError(f"max_points is {max_points}, expected at least 1")
        seen = [point for point in around if describe(point) in tried]
        better = min(seen, key=value, default=best)
        if not complete or not value(better) < value(best):
            break
        best = better
    best = min([best, *seen], key=value)
    if not math.isfinite(value(best)):
        raise ConfigError(f"each of the {len(tried)} points diverged: start from a smaller learning rate")
    certificate = tuple((point, value(point)) for point in _neighbors(axes, best) if describe(point) in tried)
    edges = tuple(name for name, values in axes.items() if len(values) > 1 and best[name] in (values[0], values[-1]))
    results = Results(tuple(tried.values()), sweep.metric, sweep.seeds)
    return Search(best, value(best), certificate, complete, edges, results)


def describe(point: Point) -> str:
    """A point as text, the same for equal points: `learning_rate=0.001, weight_decay=0.1`."""
    return ", ".join(f"{name}={_number(value)}" for name, value in sorted(point.items())) or "all"


def _neighbors(axes: Mapping[str, Sequence[Value]], point: Point) -> list[Point]:
    found = []
    for name, values in axes.items():
        at = list(values).index(point[name])
        found += [{**point, name: values[i]} for i in (at - 1, at + 1) if 0 <= i < len(values)]
    return found


def _draw(name: str, values: Sequence[Value] | Range) -> Callable[[random.Random], Value]:
    if len(values) == 3 and isinstance(values[2], str) and not any(isinstance(v, str) for v in values[:2]):
        low, high, scale = values
        if scale not in SCALES:
            raise ConfigError(f"the scale of '{name}' is '{scale}': {nearest(scale, SCALES)}")
        if not -math.inf < low < high < math.inf or (scale == "log" and low <= 0):
            raise ConfigError(f"the bounds of '{name}' are {low} and {high}, expected low < high, both > 0 for 'log'")
        if scale == "linear":
            return lambda rng: rng.uniform(low, high)
        return lambda rng: math.exp(rng.uniform(math.log(low), math.log(high)))
    grid({name: values})
    return lambda rng: rng.choice(list(values))


def _number(value: Value) -> str:
    return repr(float(value)) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _folder_name(name: str) -> str:
    return f"{''.join(c if c.isalnum() or c in '-+=.' else '_' for c in name)[:60]}-{fingerprint(name, 8)}"


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if all(map(math.isfinite, values)) else math.inf


def _deviation(values: Sequence[float]) -> float:
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0
