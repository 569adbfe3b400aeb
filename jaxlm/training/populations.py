"""Many short training runs that differ in seed and in numbers (`hparams`): sweeps, arms of a study, ensembles.

    members = [Member(f"lr {lr:g}", seed=0, hparams={"learning_rate": lr}) for lr in (1e-3, 3e-3)]
    population = Population(init, make_step(objective, tx), sample, num_steps=300, evaluate=evaluate)
    outcomes = population.train(members)
    best = min(outcomes, key=lambda outcome: outcome.results["loss"])

One program trains a member from its first step to its last. On CPU it is compiled once and members run one after the
other; on accelerators all run at once under `vmap` (on two cores a mapped program is slower than a loop). A `folder`
keeps what was finished, so that a study which was stopped goes on with the next member.
"""

import dataclasses
import functools
import json
import math
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.json_files import number, read_json, write_json
from jaxlm.core.keys import fold
from jaxlm.training.state import TrainState
from jaxlm.training.step import Step

HOW = ("auto", "loop", "vmap")
_STATE = ".state.npz"
_MEMBERS = TrainState(step=None, trainable=0, opt_state=0, extra=0, key=0, hparams=0)

Init = Callable[..., TrainState]
Sample = Callable[[jax.Array, jax.Array], Mapping[str, jax.Array]]
Evaluation = Callable[[Any], Mapping[str, jax.Array]]


class Member(NamedTuple):
    """One run: `seed` decides initialization and the order of data. `name` is unique within a study."""

    name: str
    seed: int
    hparams: Mapping[str, float] = {}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a member.

    `history`: metrics of each step, `loss` and `grad_norm` among them. `results`: of `evaluate` after the last step;
    those of a run that diverged are not finite. `params`: what was trained, and `state`: all of the state, if they were
    asked for. `tracked`: of `track`, before the first step and after every `track_every`.
    """

    member: Member
    history: Mapping[str, Float[np.ndarray, "steps"]]
    results: Mapping[str, float]
    seconds: float
    params: Any = None
    state: TrainState | None = None
    tracked: Mapping[str, Float[np.ndarray, "times"]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Population:
    """What all members have in common.

    Args:
      init: `(key, hparams) -> TrainState`, traceable; give it `hparams` with `init_state`. Where `train` is given a
        `start`, it is `(key, hparams, start) -> TrainState`: `jaxlm.training.continuation` makes states from states.
      step: not compiled, of `make_step`. An optimizer reads a member's numbers from `hparams`.
      sample: `(key, step) -> batch`, traceable; `key` is the member's own.
      num_steps: of every member.
      evaluate: `(trainable) -> {name: scalar}`, traceable; once a member is trained.
      how: `loop` or `vmap`; `auto` is `loop` on CPU and `vmap` elsewhere.
      track: like `evaluate`, but before the first step and after every `track_every` steps, which divide `num_steps`.
    """

    init: Init
    step: Step
    sample: Sample
    num_steps: int
    evaluate: Evaluation | None = None
    how: str = "auto"
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
    ) -> list[Outcome]:
        """Trains every member; outcomes in the order of `members`.

        Args:
          frozen: the step's, shared by all members.
          folder: where finished members are kept, a file each; they are not trained again.
          keep_params: also returns (and keeps) what was trained.
          keep_state: also returns (and keeps) the whole state, from which training can go on.
          start: what all members start from, handed to `init` (an argument of the program, not a constant in it).
          report: called with each outcome as it comes.

        Raises:
          ConfigError: no members, two of one name, or members with different `hparams`.
          DataError: `folder` holds a member of the same name with other settings, or a damaged file.
        """
        _check(members)
        found: dict[str, Outcome | None] = {}
        if folder is not None:
            hparams = dict(members[0].hparams)
            given = () if start is None else (start,)
            state = jax.eval_shape(self.init, jax.random.key(0), hparams, *given)
            wanted = {".npz": state.trainable} if keep_params else {}
            wanted |= {_STATE: state} if keep_state else {}
            about = {"num_steps": self.num_steps}
            about |= {} if start is None else {"start": trees.fingerprint(jax.tree.map(_raw, start))}
            found = {m.name: _load(folder, m, about, wanted) for m in members}
        waiting = [m for m in members if found.get(m.name) is None]
        mapped = self.how == "vmap" or (self.how == "auto" and jax.default_backend() != "cpu")
        for group in ([waiting] if waiting else []) if mapped else [[m] for m in waiting]:
            keys = jnp.stack([jax.random.key(m.seed) for m in group])
            hparams = {name: jnp.array([m.hparams[name] for m in group], jnp.float32) for name in group[0].hparams}
            if not mapped:
                keys, hparams = keys[0], {name: x[0] for name, x in hparams.items()}
            started = time.perf_counter()
            states, history, results, tracked = jax.block_until_ready(
                self._program(keys, hparams, frozen, start, mapped=mapped)
            )
            seconds = (time.perf_counter() - started) / len(group)
            for i, member in enumerate(group):
                pick = (lambda x, i=i: x[i]) if mapped else (lambda x: x)
                outcome = Outcome(
                    member,
                    {name: np.asarray(pick(x)) for name, x in history.items()},
                    {name: float(pick(x)) for name, x in results.items()},
                    seconds,
                    jax.tree.map(pick, states.trainable) if keep_params else None,
                    _pick_state(pick, states) if keep_state else None,
                    {name: np.asarray(pick(x)) for name, x in tracked.items()},
                )
                if folder is not None:
                    _save(folder, outcome, about)
                if report is not None:
                    report(outcome)
                found[member.name] = outcome
        return [found[m.name] for m in members]

    @functools.cached_property
    def _program(self) -> Callable[..., tuple[TrainState, dict, dict, dict]]:
        return jax.jit(functools.partial(_run, self), static_argnames="mapped")


def _run(population: Population, keys, hparams, frozen, start, *, mapped: bool):
    init, step, sample, evaluate = population.init, population.step, population.sample, population.evaluate
    track = population.track
    if start is not None:
        init = functools.partial(_init_from, init, start)
    if mapped:
        states = jax.vmap(init)(keys, hparams)
        states = dataclasses.replace(states, step=states.step[0])
        draw = jax.vmap(sample, in_axes=(0, None))
        step = jax.vmap(step, in_axes=(_MEMBERS, None, 0), out_axes=(_MEMBERS, 0))
        evaluate, track = (None if f is None else jax.vmap(f) for f in (evaluate, track))
        fold_data = jax.vmap(lambda key: fold(key, "data"))
    else:
        states, draw, fold_data = init(keys, hparams), sample, lambda key: fold(key, "data")
    data_keys = fold_data(keys)

    def body(states: TrainState, _: None) -> tuple[TrainState, Any]:
        states, metrics = step(states, frozen, draw(data_keys, states.step))
        return states, {name: s / jnp.where(w == 0, 1.0, w) for name, (s, w) in metrics.items()}

    def stretch(states: TrainState, _: None) -> tuple[TrainState, Any]:
        states, history = jax.lax.scan(body, states, length=population.track_every)
        return states, (history, dict(track(states.trainable)))

    tracked: dict[str, jax.Array] = {}
    if track is None:
        states, history = jax.lax.scan(body, states, length=population.num_steps)
    else:
        first = dict(track(states.trainable))
        states, (history, rest) = jax.lax.scan(stretch, states, length=population.num_steps // population.track_every)
        history = {name: x.reshape(-1, *x.shape[2:]) for name, x in history.items()}
        tracked = {name: jnp.concatenate([x[None], rest[name]]) for name, x in first.items()}
    if mapped:
        history, tracked = ({name: jnp.swapaxes(x, 0, 1) for name, x in y.items()} for y in (history, tracked))
    results = {} if evaluate is None else dict(evaluate(states.trainable))
    if "skipped" in history:  # Steps that were not finite are left out: what the others led to is no result.
        diverged = jnp.any(history["skipped"] > 0, axis=-1)
        results = {name: jnp.where(diverged, jnp.nan, x) for name, x in results.items()}
    return states, history, results, tracked


def _init_from(init: Init, start: Any, key: jax.Array, hparams: Mapping[str, Any]) -> TrainState:
    return init(key, hparams, start)


def _pick_state(pick: Callable, states: TrainState) -> TrainState:
    return dataclasses.replace(jax.tree.map(pick, dataclasses.replace(states, step=None)), step=states.step)


def _check(members: Sequence[Member]) -> None:
    if not members:
        raise ConfigError("there are no members to train")
    names = [m.name for m in members]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"several members are named {', '.join(twice)}")
    for m in members:
        if m.hparams.keys() != members[0].hparams.keys():
            raise ConfigError(f"hparams of '{m.name}' are {sorted(m.hparams)}, of others {sorted(members[0].hparams)}")
        if bad := [name for name, value in m.hparams.items() if not math.isfinite(value)]:
            raise ConfigError(f"hparams of '{m.name}': {', '.join(bad)} is not finite")


def _file(folder: Path, member: Member) -> Path:
    return Path(folder) / ("".join(c if c.isalnum() or c in "-+." else "_" for c in member.name) + ".json")


def _about(member: Member, about: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": member.name, "seed": member.seed, "hparams": dict(member.hparams), **about}


def _save(folder: Path, outcome: Outcome, about: Mapping[str, Any]) -> None:
    path = _file(folder, outcome.member)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, tree in ((".npz", outcome.params), (_STATE, outcome.state)):
        if tree is not None:
            arrays = {name: np.asarray(_raw(x)) for name, x in trees.named_leaves(tree)}
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, **arrays)
            partial.replace(path.with_suffix(suffix))

    def lists(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: np.asarray(x, np.float64).tolist() for name, x in values.items()}

    write_json(
        path,
        {
            **_about(outcome.member, about),
            "seconds": outcome.seconds,
            "results": dict(outcome.results),
            "history": lists(outcome.history),
            "tracked": lists(outcome.tracked),
        },
    )


def _load(folder: Path, member: Member, about: Mapping[str, Any], wanted: Mapping[str, Any]) -> Outcome | None:
    """What is kept of a member. `wanted`: by suffix of the file, the structure of the arrays that are wanted too."""
    path = _file(folder, member)
    if not all(p.exists() for p in (path, *map(path.with_suffix, wanted))):
        return None
    kept = read_json(path)
    about = json.loads(json.dumps(_about(member, about)))
    if {name: kept.get(name) for name in about} != about:
        raise DataError(f"{path} is of a run with other settings: { ({n: kept.get(n) for n in about}) }, here {about}")
    arrays = {suffix: _load_arrays(path.with_suffix(suffix), abstract) for suffix, abstract in wanted.items()}
    history, tracked = (
        {name: np.array([number(v) for v in x], np.float32) for name, x in kept.get(part, {}).items()}
        for part in ("history", "tracked")
    )
    results = {name: number(x) for name, x in kept["results"].items()}
    return Outcome(
        member, history, results, kept["seconds"], arrays.get(".npz"), arrays.get(_STATE), tracked
    )  # fmt: skip


def _load_arrays(path: Path, abstract: Any) -> Any:
    def read(name: str, leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(jnp.asarray(flat[name]))
        # NumPy's files know bfloat16 only as two bytes.
        return jnp.asarray(flat[name].view(leaf.dtype))

    try:
        with np.load(path, allow_pickle=False) as flat:
            return trees.map_named(read, abstract)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it, and its member is trained again") from error


def _raw(x: Any) -> Any:
    """A typed key as the numbers it is made of; other arrays as they are."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
