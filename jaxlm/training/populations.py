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
_MEMBERS = TrainState(step=None, trainable=0, opt_state=0, extra=0, key=0, hparams=0)

Init = Callable[[jax.Array, Mapping[str, Any]], TrainState]
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
    those of a run that diverged are not finite. `params`: what was trained, if it was asked for.
    """

    member: Member
    history: Mapping[str, Float[np.ndarray, "steps"]]
    results: Mapping[str, float]
    seconds: float
    params: Any = None


@dataclasses.dataclass(frozen=True)
class Population:
    """What all members have in common.

    Args:
      init: `(key, hparams) -> TrainState`, traceable; give it `hparams` with `init_state`.
      step: not compiled, of `make_step`. An optimizer reads a member's numbers from `hparams`.
      sample: `(key, step) -> batch`, traceable; `key` is the member's own.
      num_steps: of every member.
      evaluate: `(trainable) -> {name: scalar}`, traceable; once a member is trained.
      how: `loop` or `vmap`; `auto` is `loop` on CPU and `vmap` elsewhere.
    """

    init: Init
    step: Step
    sample: Sample
    num_steps: int
    evaluate: Evaluation | None = None
    how: str = "auto"

    def __post_init__(self):
        if self.how not in HOW:
            raise ConfigError(f"how is '{self.how}', expected one of {', '.join(HOW)}")
        if self.num_steps < 1:
            raise ConfigError(f"num_steps is {self.num_steps}, expected at least 1")

    def train(
        self,
        members: Sequence[Member],
        *,
        frozen: Any = None,
        folder: Path | None = None,
        keep_params: bool = False,
        report: Callable[[Outcome], None] | None = None,
    ) -> list[Outcome]:
        """Trains every member; outcomes in the order of `members`.

        Args:
          frozen: the step's, shared by all members.
          folder: where finished members are kept, a file each; they are not trained again.
          keep_params: also returns (and keeps) what was trained.
          report: called with each outcome as it comes.

        Raises:
          ConfigError: no members, two of one name, or members with different `hparams`.
          DataError: `folder` holds a member of the same name with other settings, or a damaged file.
        """
        _check(members)
        found: dict[str, Outcome | None] = {}
        if folder is not None:
            hparams = dict(members[0].hparams)
            wanted = jax.eval_shape(self.init, jax.random.key(0), hparams).trainable if keep_params else None
            found = {m.name: _load(folder, m, self.num_steps, wanted) for m in members}
        waiting = [m for m in members if found.get(m.name) is None]
        mapped = self.how == "vmap" or (self.how == "auto" and jax.default_backend() != "cpu")
        for group in ([waiting] if waiting else []) if mapped else [[m] for m in waiting]:
            keys = jnp.stack([jax.random.key(m.seed) for m in group])
            hparams = {name: jnp.array([m.hparams[name] for m in group], jnp.float32) for name in group[0].hparams}
            if not mapped:
                keys, hparams = keys[0], {name: x[0] for name, x in hparams.items()}
            started = time.perf_counter()
            trained, history, results = jax.block_until_ready(self._program(keys, hparams, frozen, mapped=mapped))
            seconds = (time.perf_counter() - started) / len(group)
            for i, member in enumerate(group):
                pick = (lambda x, i=i: x[i]) if mapped else (lambda x: x)
                outcome = Outcome(
                    member,
                    {name: np.asarray(pick(x)) for name, x in history.items()},
                    {name: float(pick(x)) for name, x in results.items()},
                    seconds,
                    jax.tree.map(pick, trained) if keep_params else None,
                )
                if folder is not None:
                    _save(folder, outcome, self.num_steps)
                if report is not None:
                    report(outcome)
                found[member.name] = outcome
        return [found[m.name] for m in members]

    @functools.cached_property
    def _program(self) -> Callable[..., tuple[Any, dict, dict]]:
        run = functools.partial(_run, self.init, self.step, self.sample, self.evaluate, self.num_steps)
        return jax.jit(run, static_argnames="mapped")


def _run(init, step, sample, evaluate, num_steps: int, keys, hparams, frozen, *, mapped: bool):
    if mapped:
        states = jax.vmap(init)(keys, hparams)
        states = dataclasses.replace(states, step=jnp.zeros((), jnp.int32))
        draw = jax.vmap(sample, in_axes=(0, None))
        step = jax.vmap(step, in_axes=(_MEMBERS, None, 0), out_axes=(_MEMBERS, 0))
        evaluate = None if evaluate is None else jax.vmap(evaluate)
        fold_data = jax.vmap(lambda key: fold(key, "data"))
    else:
        states, draw, fold_data = init(keys, hparams), sample, lambda key: fold(key, "data")
    data_keys = fold_data(keys)

    def body(states: TrainState, _: None) -> tuple[TrainState, Any]:
        states, metrics = step(states, frozen, draw(data_keys, states.step))
        return states, {name: s / jnp.where(w == 0, 1.0, w) for name, (s, w) in metrics.items()}

    states, history = jax.lax.scan(body, states, length=num_steps)
    if mapped:
        history = {name: jnp.swapaxes(x, 0, 1) for name, x in history.items()}
    results = {} if evaluate is None else dict(evaluate(states.trainable))
    # Steps that were not finite are left out: what the others led to is no result, unless a loss scale seeks its size.
    if "skipped" in history and "loss_scale" not in history:
        diverged = jnp.any(history["skipped"] > 0, axis=-1)
        results = {name: jnp.where(diverged, jnp.nan, x) for name, x in results.items()}
    return states.trainable, history, results


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


def _about(member: Member, num_steps: int) -> dict[str, Any]:
    return {"name": member.name, "seed": member.seed, "hparams": dict(member.hparams), "num_steps": num_steps}


def _save(folder: Path, outcome: Outcome, num_steps: int) -> None:
    path = _file(folder, outcome.member)
    path.parent.mkdir(parents=True, exist_ok=True)
    if outcome.params is not None:
        arrays = {name: np.asarray(x) for name, x in trees.named_leaves(outcome.params)}
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, **arrays)
        partial.replace(path.with_suffix(".npz"))
    write_json(
        path,
        {
            **_about(outcome.member, num_steps),
            "seconds": outcome.seconds,
            "results": dict(outcome.results),
            "history": {name: np.asarray(x, np.float64).tolist() for name, x in outcome.history.items()},
        },
    )


def _load(folder: Path, member: Member, num_steps: int, abstract: Any) -> Outcome | None:
    """What is kept of a member. `abstract`: the structure of its parameters, if they are wanted too."""
    path = _file(folder, member)
    if not path.exists() or (abstract is not None and not path.with_suffix(".npz").exists()):
        return None
    kept = read_json(path)
    about = json.loads(json.dumps(_about(member, num_steps)))
    if {name: kept.get(name) for name in about} != about:
        raise DataError(f"{path} is of a run with other settings: { ({n: kept.get(n) for n in about}) }, here {about}")
    params = None
    if abstract is not None:
        params = _load_params(path.with_suffix(".npz"), abstract)
    history = {name: np.array(x, np.float32) for name, x in kept["history"].items()}
    results = {name: number(x) for name, x in kept["results"].items()}
    return Outcome(member, history, results, kept["seconds"], params)


def _load_params(path: Path, abstract: Any) -> Any:
    try:
        with np.load(path, allow_pickle=False) as flat:
            # NumPy's files know bfloat16 only as two bytes.
            return trees.map_named(lambda name, leaf: jnp.asarray(flat[name].view(leaf.dtype)), abstract)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it, and its member is trained again") from error
