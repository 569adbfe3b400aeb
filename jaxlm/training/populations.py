"""Many short training runs that differ in seed and in numbers (`hparams`): sweeps, arms of a study, ensembles.

    members = [Member(f"lr {lr:g}", seed=0, hparams={"learning_rate": lr}) for lr in (1e-3, 3e-3)]
    population = Population(init, make_step(objective, tx), sample, num_steps=300, evaluate=evaluate)
    outcomes = population.train(members)
    best = min(outcomes, key=lambda outcome: outcome.results["loss"])

One program trains a member from its first step to its last. On CPU it is compiled once and members run one after the
other; on accelerators all run at once under `vmap` (on two cores a mapped program is slower than a loop). Members may
be divided among devices. A `folder` keeps what was finished, so that a study which was stopped goes on with the next
member; with `check_every` it keeps the state of those under way too, and a member may be stopped early.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.core.keys import fold
from jaxlm.training import kept_members
from jaxlm.training.state import TrainState
from jaxlm.training.step import Step

HOW = ("auto", "loop", "map", "vmap")
_AXIS = "members"

Init = Callable[..., TrainState]
Sample = Callable[[jax.Array, jax.Array], Mapping[str, jax.Array]]
Evaluation = Callable[[Any], Mapping[str, jax.Array]]
History = Mapping[str, Float[np.ndarray, "steps"]]


class Member(NamedTuple):
    """One run: `seed` decides initialization and, unless there is a `data_seed`, the order of data. `name` is unique
    within a study."""

    name: str
    seed: int
    hparams: Mapping[str, float] = {}
    data_seed: int | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a member.

    `history`: metrics of each step, `loss` and `grad_norm` among them; shorter than the run if it was stopped.
    `results`: of `evaluate` after the last step; those of a run that diverged are not finite. `params`: what was
    trained, and `state`: all of the state, if they were asked for. `tracked`: of `track`, before the first step and
    after every `track_every`.
    """

    member: Member
    history: History
    results: Mapping[str, float]
    seconds: float
    params: Any = None
    state: TrainState | None = None
    tracked: Mapping[str, Float[np.ndarray, "times"]] = dataclasses.field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps that were taken."""
        return len(next(iter(self.history.values())))


@dataclasses.dataclass(frozen=True)
class Population:
    """What all members have in common.

    Args:
      init: `(key, hparams) -> TrainState`, traceable; give it `hparams` with `init_state`. A third argument is what
        `train` is given as `start`.
      step: not compiled, of `make_step`. An optimizer reads a member's numbers from `hparams`.
      sample: `(key, step) -> batch`, traceable; `key` is the member's own.
      num_steps: of every member.
      evaluate: `(trainable) -> {name: scalar}`, traceable; once a member is trained.
      how: `loop`, members one by one; `map`, one program with `lax.map`; `vmap`, all at once. `auto` is `loop` on CPU
        and `vmap` elsewhere. `loop` and `map` give the same bits, and `loop` keeps members as they are done.
      devices: among which members are divided, by default the first alone; each gets whole members. Under `loop` and
        `map` two devices or more give the same bits however many they are; those of one device differ in rounding, as
        XLA compiles a program for several otherwise.
      tokens_per_step: in a batch, for accounts of tokens.
      view: what of a state is evaluated, tracked and returned as `params`, by default `state.trainable`; an optimizer
        that averages weights has others. Shapes stay.
      track: like `evaluate`, but before the first step and after every `track_every` steps, which divide `num_steps`.
    """

    init: Init
    step: Step
    sample: Sample
    num_steps: int
    evaluate: Evaluation | None = None
    how: str = "auto"
    devices: tuple[jax.Device, ...] = ()
    tokens_per_step: int | None = None
    view: Callable[[TrainState], Any] | None = None
    track: Evaluation | None = None
    track_every: int = 0

    def __post_init__(self):
        if self.how not in HOW:
            raise ConfigError(f"how is '{self.how}', expected one of {', '.join(HOW)}")
        if self.num_steps < 1:
            raise ConfigError(f"num_steps is {self.num_steps}, expected at least 1")
        if (self.track is None) != (self.track_every == 0):
            raise ConfigError("track and track_every come together: what to measure, and how often")
        if self.track_every and (self.track_every < 1 or self.num_steps % self.track_every):
            raise ConfigError(f"track_every is {self.track_every}, expected a divisor of num_steps = {self.num_steps}")

    def train(
        self,
        members: Sequence[Member],
        *,
        frozen: Any = None,
        folder: Path | None = None,
        keep_params: bool = False,
        keep_state: bool = False,
        start: Any = None,
        report: Callable[[Outcome], None] | None = None,
        check_every: int | None = None,
        stop: Callable[[Member, History], bool] | None = None,
    ) -> list[Outcome]:
        """Trains every member; outcomes in the order of `members`.

        Args:
          frozen: the step's, shared by all members.
          folder: where finished members are kept, a file each; they are not trained again.
          keep_params: also returns (and keeps) what was trained.
          keep_state: also returns (and keeps) the whole state, from which training can go on.
          start: what all members start from, handed to `init` (an argument of the program, not a constant in it).
          report: called with each outcome as it comes.
          check_every: steps, a divisor of `num_steps` and a multiple of `track_every`, after which `stop` is asked and,
            with a folder, the states of members are kept: a run that was killed goes on from there, to the same bits.
          stop: whether a member, with its metrics so far, ends here; it is evaluated as it is then.

        Raises:
          ConfigError: no members, two of one name, members with different `hparams`, `stop` without `check_every`.
          DataError: `folder` holds a member of the same name with other settings, or a damaged file.
        """
        _check(members)
        every = self._check_every(check_every, stop)
        kept = None
        if folder is not None:
            settings: dict[str, Any] = {"num_steps": self.num_steps}
            settings |= {} if start is None else {"start": trees.fingerprint(jax.tree.map(kept_members.as_data, start))}
            kept = kept_members.Folder(folder, settings, self._abstract_state(members[0], start))
        found: dict[str, Outcome | None] = dict.fromkeys(m.name for m in members)
        if kept is not None:
            for m in members:
                if (facts := kept.load(m, keep_params, keep_state)) is not None:
                    found[m.name] = Outcome(m, **facts)
        waiting = [m for m in members if found[m.name] is None]
        # Those under way are a group again, whoever of it is done, or their states would be of no use.
        begun = [m for m in waiting if kept is not None and kept.has_state(m)]
        fresh = [m for m in waiting if m not in begun]
        for group in [*self._groups(begun), *self._groups(fresh)]:
            for outcome in self._train_group(group, frozen, start, kept, keep_params, keep_state, every, stop):
                if report is not None:
                    report(outcome)
                found[outcome.member.name] = outcome
        return [found[m.name] for m in members]

    # Members of a group are trained together. Arrays of a group have a leading axis of members, which the devices
    # divide; the last member is repeated where they do not. `step` alone is one number for all.

    @property
    def _how(self) -> str:
        if self.how != "auto":
            return self.how
        return "loop" if jax.default_backend() == "cpu" else "vmap"

    def _groups(self, members: Sequence[Member]) -> list[Sequence[Member]]:
        size = max(1, len(self.devices)) if self._how == "loop" else max(1, len(members))
        return [members[i : i + size] for i in range(0, len(members), size)]

    def _check_every(self, check_every: int | None, stop: Any) -> int:
        if stop is not None and check_every is None:
            raise ConfigError("stop is given without check_every: after how many steps is it asked?")
        every = self.num_steps if check_every is None else check_every
        if every < 1 or self.num_steps % every:
            raise ConfigError(f"check_every is {check_every}, expected a divisor of num_steps {self.num_steps}")
        if self.track_every and every % self.track_every:
            raise ConfigError(f"check_every is {check_every}, expected a multiple of track_every {self.track_every}")
        return every

    def _abstract_state(self, member: Member, start: Any) -> TrainState:
        given = () if start is None else (start,)
        return jax.eval_shape(self.init, jax.random.key(0), dict(member.hparams), *given)

    def _train_group(
        self,
        group: Sequence[Member],
        frozen: Any,
        start: Any,
        kept: Any,
        keep_params: bool,
        keep_state: bool,
        every: int,
        stop: Any,
    ) -> list[Outcome]:
        length = self.track_every or every
        padded = [*group, *[group[-1]] * (-len(group) % max(1, len(self.devices)))]
        keys = jnp.stack([jax.random.key(m.seed) for m in padded])
        seeds = [m.seed if m.data_seed is None else m.data_seed for m in padded]
        data_keys = jnp.stack([fold(jax.random.key(seed), "data") for seed in seeds])
        hparams = {name: jnp.array([m.hparams[name] for m in padded], jnp.float32) for name in padded[0].hparams}
        started = time.perf_counter()
        under_way = None if kept is None else kept.load_states(padded)
        if under_way is not None and under_way[3] % length == 0:
            states, history, tracked, done = under_way
        else:
            states, history, tracked, done = self._start(keys, hparams, start), {}, {}, 0
        pieces, marks = ([history] if history else []), ([tracked] if tracked else [])
        outcomes: dict[str, Outcome] = {}
        while len(outcomes) < len(group):
            if self.track is not None and not done:
                marks.append(self._measure(states))
            if done < self.num_steps:
                states, piece = self._advance(states, data_keys, frozen, length=length)
                pieces.append({name: np.asarray(x) for name, x in piece.items()})
                done += length
                if self.track is not None:
                    marks.append(self._measure(states))
            if done % every:
                continue
            history, tracked = (
                {name: np.concatenate([p[name] for p in parts], axis=1) for name in (parts[0] if parts else ())}
                for parts in (pieces, marks)
            )
            ending = [
                i for i, m in enumerate(group)
                if m.name not in outcomes
                and (done == self.num_steps or (stop is not None and stop(m, {n: x[i] for n, x in history.items()})))
            ]  # fmt: skip
            seen = self._seen(states) if ending else None
            results = {} if self.evaluate is None or not ending else jax.device_get(self._finish(seen))
            seconds = (time.perf_counter() - started) / len(group)
            for i in ending:
                outcomes[group[i].name] = outcome = Outcome(
                    group[i],
                    {name: x[i] for name, x in history.items()},
                    _results({name: float(x[i]) for name, x in results.items()}, history, i),
                    seconds,
                    jax.tree.map(lambda x, i=i: x[i], seen) if keep_params else None,
                    _member_state(states, i) if keep_state else None,
                    {name: x[i] for name, x in tracked.items()},
                )
                if kept is not None:
                    kept.save(outcome)
                    kept.forget_state(group[i])
            if kept is not None:
                going_on = [(i, m) for i, m in enumerate(group) if m.name not in outcomes]
                kept.save_states(going_on, done, states, history, tracked)
        return [outcomes[m.name] for m in group]

    def _measure(self, states: TrainState) -> dict[str, np.ndarray]:
        return {name: np.asarray(x)[:, None] for name, x in self._track(self._seen(states)).items()}

    def _seen(self, states: TrainState) -> Any:
        return states.trainable if self.view is None else self._viewed(dataclasses.replace(states, step=None))

    @functools.cached_property
    def _start(self) -> Callable[..., TrainState]:
        def begin(keys: Array, hparams: Mapping[str, Array], start: Any) -> TrainState:
            given = () if start is None else (start,)
            states = _each(self._how, lambda x: self.init(*x, *given), (keys, hparams))
            return dataclasses.replace(states, step=states.step[0])

        return jax.jit(self._divided(begin, (_members(), _members(), PartitionSpec()), _STATE))

    @functools.cached_property
    def _advance(self) -> Callable[..., tuple[TrainState, dict]]:
        def advance(states: TrainState, data_keys: Array, frozen: Any, *, length: int) -> tuple[TrainState, dict]:
            run = functools.partial(_run, self._how, self.step, self.sample, length)
            divided = self._divided(run, (_STATE, _members(), PartitionSpec()), (_STATE, _members()))
            return divided(states, data_keys, frozen)

        return jax.jit(advance, static_argnames="length", donate_argnums=0)

    @functools.cached_property
    def _viewed(self) -> Callable[[TrainState], Any]:
        without_step = dataclasses.replace(_STATE, step=None)
        return jax.jit(self._divided(lambda x: _each(self._how, self.view, x), (without_step,), _members()))

    @functools.cached_property
    def _finish(self) -> Callable[[Any], dict]:
        return self._evaluation(self.evaluate)

    @functools.cached_property
    def _track(self) -> Callable[[Any], dict]:
        return self._evaluation(self.track)

    def _evaluation(self, evaluate: Evaluation) -> Callable[[Any], dict]:
        return jax.jit(self._divided(lambda x: dict(_each(self._how, evaluate, x)), (_members(),), _members()))

    def _divided(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        if len(self.devices) < 2:
            return function
        mesh = Mesh(np.asarray(self.devices), (_AXIS,))
        return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def _members() -> PartitionSpec:
    return PartitionSpec(_AXIS)


_STATE = TrainState(
    step=PartitionSpec(),
    **{name: _members() for name in ("trainable", "opt_state", "extra", "key", "hparams")},
)
_MAPPED = TrainState(step=None, trainable=0, opt_state=0, extra=0, key=0, hparams=0)


def _each(how: str, function: Callable, x: Any) -> Any:
    """`function` of each member's part of `x`."""
    if how == "vmap":
        return jax.vmap(function)(x)
    if how == "map":
        return jax.lax.map(function, x)
    found = function(jax.tree.map(lambda leaf: leaf[0], x))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], found)


def _run(how: str, step: Step, sample: Sample, length: int, states: TrainState, data_keys: Array, frozen: Any):
    """The states after `length` more steps, and the metrics of each `[members, length]`."""

    def advance(state: TrainState, data_key: Array, step: Step, draw: Callable) -> tuple[TrainState, dict]:
        def body(state: TrainState, _: None) -> tuple[TrainState, dict]:
            state, metrics = step(state, frozen, draw(data_key, state.step))
            return state, {name: s / jnp.where(w == 0, 1.0, w) for name, (s, w) in metrics.items()}

        return jax.lax.scan(body, state, length=length)

    if how == "vmap":
        # A condition on the step stays one: with a step of each member's own, both sides would be computed.
        mapped = jax.vmap(step, in_axes=(_MAPPED, None, 0), out_axes=(_MAPPED, 0))
        states, history = advance(states, data_keys, mapped, jax.vmap(sample, in_axes=(0, None)))
        return states, {name: jnp.swapaxes(x, 0, 1) for name, x in history.items()}

    def one(x: tuple[TrainState, Array]) -> tuple[TrainState, dict]:
        return advance(dataclasses.replace(x[0], step=states.step), x[1], step, sample)

    found, history = _each(how, one, (dataclasses.replace(states, step=None), data_keys))
    return dataclasses.replace(found, step=states.step + length), history


def _member_state(states: TrainState, i: int) -> TrainState:
    one = jax.tree.map(lambda x: x[i], dataclasses.replace(states, step=None))
    return dataclasses.replace(one, step=states.step)


def _results(results: dict[str, float], history: History, i: int) -> dict[str, float]:
    """Steps that were not finite are left out: what the others led to is no result, unless a loss scale seeks its
    size."""
    diverged = "skipped" in history and "loss_scale" not in history and bool((history["skipped"][i] > 0).any())
    return dict.fromkeys(results, math.nan) if diverged else results


def _check(members: Sequence[Member]) -> None:
    if not members:
        raise ConfigError("there are no members to train")
    names = [m.name for m in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"several members are named {', '.join(twice)}")
    files = [kept_members.file_name(name) for name in names]
    if twice := sorted({name for name, file in zip(names, files) if files.count(file) > 1}):
        raise ConfigError(f"members whose names differ in signs alone: {', '.join(twice)}")
    for m in members:
        if m.hparams.keys() != members[0].hparams.keys():
            raise ConfigError(f"hparams of '{m.name}' are {sorted(m.hparams)}, of others {sorted(members[0].hparams)}")
        if bad := [name for name, value in m.hparams.items() if not math.isfinite(value)]:
            raise ConfigError(f"hparams of '{m.name}': {', '.join(bad)} is not finite")
