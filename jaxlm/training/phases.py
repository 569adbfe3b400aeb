"""Training on several data sets: in phases, each from the best checkpoint of the one before, or on all at once.

    phases = [Phase("instructions", step, tx, rows, samples=6400, batch_size=64, evaluate=..., evaluate_every=640,
                    metric="instructions"), ...]
    phased = run_phased(phases, Member("a", seed=0, hparams={"learning_rate": 1e-3}), params, folder=out)
    stacked = run_phased([stack_phases(phases, metric="mean")], Member("b", ...), params, folder=out)

Phased training (Orca, LAB) teaches one kind of data after the other, each until its own validation peak, with the
schedule restarted and fresh moments; stacked training shuffles the union. Pareja et al. (2025, arXiv 2412.13337)
compare both at equal samples seen. A sample is a row of the data.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError
from jaxlm.data.resident import ResidentRows, join_rows
from jaxlm.training.populations import Evaluation, Member, Outcome, Population
from jaxlm.training.state import TrainState, init_state
from jaxlm.training.step import Step

EVALUATED = "evaluated/"
"""What names of measurements begin with in the history of a run that keeps its best."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Best:
    """The `extra` of a run that keeps its best: what was trained when `score` was highest, and the `extra` below."""

    score: Float[Array, ""]
    trainable: Any
    extra: Any = None


def start_best(trainable: Any, extra: Any = None) -> Best:
    """Before any evaluation."""
    return Best(jnp.asarray(-jnp.inf, jnp.float32), trainable, extra)


def keep_best(step: Step, evaluate: Evaluation, every: int, metric: str) -> Step:
    """`step`, which after every `every` steps evaluates what is trained and keeps it if it is the best so far.

    The state's `extra` is a `Best`. It is evaluated inside the compiled program, under one `lax.cond` on the state's
    own step, so that a resumed run keeps what the uninterrupted one does. The first of equals is kept; a score that is
    not a number never is. Metrics get `evaluated/NAME` for each of `evaluate`'s, of weight 0 on other steps.

    Raises `ConfigError` for an `every` below 1, and when traced, for a `metric` that `evaluate` does not give.
    """
    if every < 1:
        raise ConfigError(f"every is {every}, expected at least 1")

    def measure(trainable: Any, frozen: Any) -> tuple[Array, Mapping[str, Array]]:
        found = evaluate(trainable)
        _metric_index(metric, found)
        return found[metric], found

    return _keep_best(step, measure, every)


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """Training on one data set.

    Args:
      name: unique within a course.
      step: not compiled, of `make_step` with `tx`; the schedule reads this phase's number of steps from
        `hparams["steps"]`, and the state's step, which begins at 0.
      tx: the optimizer, whose state begins anew.
      rows: one sample each, shuffled in every epoch.
      samples: to be seen, a multiple of `evaluate_every`.
      batch_size: samples in a batch.
      evaluate: `(trainable) -> {name: scalar}`, traceable.
      evaluate_every: samples between two evaluations, a multiple of `batch_size`.
      metric: of these, the one whose maximum is this phase's validation peak.
      how: as of `Population`.
    """

    name: str
    step: Step
    tx: optax.GradientTransformation
    rows: ResidentRows
    samples: int
    batch_size: int
    evaluate: Evaluation
    evaluate_every: int
    metric: str
    how: str = "auto"

    def __post_init__(self):
        if self.batch_size < 1 or self.evaluate_every < 1 or self.evaluate_every % self.batch_size:
            raise ConfigError(
                f"phase '{self.name}': evaluate_every is {self.evaluate_every} samples, expected a multiple of the "
                f"batch of {self.batch_size}"
            )
        if self.samples < 1 or self.samples % self.evaluate_every:
            raise ConfigError(
                f"phase '{self.name}': samples is {self.samples}, expected a multiple of evaluate_every "
                f"{self.evaluate_every}"
            )

    @property
    def num_steps(self) -> int:
        return self.samples // self.batch_size

    def train(
        self,
        members: Sequence[Member],
        start: Any,
        *,
        frozen: Any = None,
        folder: Path | None = None,
        report: Callable[[Outcome], None] | None = None,
    ) -> list[Outcome]:
        """Trains members from `start`; their `params` are the best checkpoints, evaluations are in their histories.

        Phases with equal numbers of rows and samples, and the same other settings, are one compiled program. Arguments
        and errors are those of `Population.train`; `ConfigError` too for a metric that is not evaluated.
        """
        every = self.evaluate_every // self.batch_size
        population = _population(
            self.step, self.tx, self.rows.count, self.num_steps, self.batch_size, self.evaluate, every, self.how
        )
        index = _metric_index(self.metric, jax.eval_shape(lambda x: dict(self.evaluate(x)), start))
        given = {"frozen": frozen, "rows": self.rows.arrays, "metric": jnp.asarray(index, jnp.int32)}
        return population.train(members, start=start, frozen=given, folder=folder, keep_params=True, report=report)


class Course(NamedTuple):
    """What became of a run in phases.

    `samples`: seen when each evaluation was made, over all phases. `evaluations`: by name, at these. `best`: for each
    phase the index of the evaluation whose checkpoint the next one began with. `params`: that of the last. `outcomes`:
    of each phase.
    """

    samples: tuple[int, ...]
    evaluations: Mapping[str, Float[np.ndarray, "times"]]
    best: tuple[int, ...]
    params: Any
    outcomes: tuple[Outcome, ...]


def run_phased(
    phases: Sequence[Phase],
    member: Member,
    start: Any,
    *,
    frozen: Any = None,
    folder: Path | None = None,
    report: Callable[[Outcome], None] | None = None,
) -> Course:
    """Trains from `start` in each phase in turn, every one from the best checkpoint of the one before.

    The schedule restarts and moments are fresh in each phase. With a `folder`, phases that are finished are kept there
    and not trained again. A phase none of whose evaluations is a number leaves the parameters that it began with.

    Raises:
      ConfigError: no phases, two of one name, `hparams` that have "steps" already.
      DataError: as `Population.train`.
    """
    names = [phase.name for phase in phases]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"phases are {names}, expected one or more with different names")
    if "steps" in member.hparams:
        raise ConfigError("hparams have 'steps', which each phase has its own number of")
    params, seen = start, 0
    samples: list[int] = []
    best: list[int] = []
    columns: dict[str, list[np.ndarray]] = {}
    outcomes = []
    for phase in phases:
        hparams = {**member.hparams, "steps": float(phase.num_steps)}
        run = member._replace(name=f"{member.name} {phase.name}", hparams=hparams)
        (outcome,) = phase.train([run], params, frozen=frozen, folder=folder, report=report)
        every = phase.evaluate_every // phase.batch_size
        found = {
            name.removeprefix(EVALUATED): x[every - 1 :: every]
            for name, x in outcome.history.items()
            if name.startswith(EVALUATED)
        }
        scores = np.where(np.isnan(found[phase.metric]), -np.inf, found[phase.metric])
        best.append(len(samples) + int(np.argmax(scores)))
        samples += range(seen + phase.evaluate_every, seen + phase.samples + 1, phase.evaluate_every)
        for name, x in found.items():
            columns.setdefault(name, []).append(x)
        outcomes.append(outcome)
        params, seen = outcome.params, seen + phase.samples
    evaluations = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Course(tuple(samples), evaluations, tuple(best), params, tuple(outcomes))


def stack_phases(phases: Sequence[Phase], metric: str, name: str = "stacked") -> Phase:
    """One phase on the union of several, with as many samples as all of them; otherwise as the first.

    One phase stacked is itself, but for its name and metric.

    Raises `ConfigError` for no phases, or phases whose batches or evaluations differ.
    """
    if not phases:
        raise ConfigError("no phases to stack")
    for field in ("step", "tx", "batch_size", "evaluate", "evaluate_every", "how"):
        if any(getattr(phase, field) != getattr(phases[0], field) for phase in phases):
            raise ConfigError(f"phases that differ in {field} cannot be stacked")
    return dataclasses.replace(
        phases[0],
        name=name,
        metric=metric,
        rows=join_rows([phase.rows for phase in phases]),
        samples=sum(phase.samples for phase in phases),
    )


@functools.lru_cache(maxsize=32)
def _population(
    step: Step,
    tx: optax.GradientTransformation,
    count: int,
    num_steps: int,
    batch_size: int,
    evaluate: Evaluation,
    every: int,
    how: str,
) -> Population:
    """Runs of phases that differ in their rows and metric alone, which are arguments of the program."""
    numbers = ResidentRows({"row": jnp.arange(count)})

    def on_rows(state: TrainState, given: Any, batch: Mapping[str, Array]) -> tuple[TrainState, Any]:
        return step(state, given["frozen"], ResidentRows(given["rows"]).take(batch["row"]))

    def measure(trainable: Any, given: Any) -> tuple[Array, Mapping[str, Array]]:
        found = evaluate(trainable)
        scores = jnp.stack([jnp.asarray(found[name], jnp.float32) for name in sorted(found)])
        return scores[given["metric"]], found

    def init(key: Array, hparams: Mapping[str, Array], start: Any) -> TrainState:
        return init_state(start, tx, key, extra=start_best(start), hparams=hparams)

    return Population(
        init,
        _keep_best(on_rows, measure, every),
        lambda key, at: numbers.sample(key, at, batch_size),
        num_steps,
        how=how,
        view=lambda state: state.extra.trainable,
    )


def _metric_index(metric: str, evaluations: Mapping[str, Any]) -> int:
    if metric not in evaluations:
        raise ConfigError(f"the best is to be chosen by '{metric}', but evaluations are {sorted(evaluations)}")
    return sorted(evaluations).index(metric)


def _keep_best(step: Step, measure: Callable[[Any, Any], tuple[Array, Mapping[str, Array]]], every: int) -> Step:
    """`keep_best`, for a `measure(trainable, frozen)` that gives the score and all that is measured."""

    def keeping(state: TrainState, frozen: Any, batch: Mapping[str, Array]) -> tuple[TrainState, Any]:
        best = state.extra
        state, metrics = step(dataclasses.replace(state, extra=best.extra), frozen, batch)
        due = state.step % every == 0

        def measured() -> tuple[Array, dict[str, Array]]:
            found = measure(state.trainable, frozen)
            return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (found[0], dict(found[1])))

        nothing = jax.tree.map(lambda x: jnp.zeros((), jnp.float32), jax.eval_shape(measured))
        score, found = jax.lax.cond(due, measured, lambda: nothing)
        better = due & (score > best.score)
        kept = functools.partial(jax.tree.map, functools.partial(jnp.where, better))
        score, trainable = kept((score, state.trainable), (best.score, best.trainable))
        weight = due.astype(jnp.float32)
        metrics = {**metrics, **{EVALUATED + name: (x * weight, weight) for name, x in found.items()}}
        return dataclasses.replace(state, extra=Best(score, trainable, state.extra)), metrics

    return keeping
