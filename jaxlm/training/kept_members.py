"""What a population keeps on disk: each finished member (JSON, its parameters beside it), and states under way.

A member is the file of its name: `NAME.json` once it is finished, `NAME.npz` its parameters, `NAME.final.npz` its whole
state, `NAME.state.npz` its state before that. Every file is replaced in one move.
"""

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core import trees
from jaxlm.core.configs import fingerprint
from jaxlm.core.errors import DataError
from jaxlm.core.json_files import number, parse_json, read_object, write_json
from jaxlm.training.state import TrainState

_LONGEST = 120
_DAMAGED = (OSError, ValueError, KeyError, EOFError, NotImplementedError, MemoryError, zipfile.BadZipFile)


def file_name(member_name: str) -> str:
    """A member's name as one of a file, without its ending."""
    safe = "".join(c if c.isalnum() or c in "-+=." else "_" for c in member_name)
    return safe if len(safe) <= _LONGEST else f"{safe[:_LONGEST]}-{fingerprint(member_name)}"


@dataclasses.dataclass(frozen=True)
class Folder:
    """Members of one population in a folder.

    `settings` (JSON) must be those of what is there. `abstract` is the state of one member.
    """

    folder: Path
    settings: Mapping[str, Any]
    abstract: TrainState

    def save(self, outcome: Any) -> None:
        """Keeps a finished member."""
        path = self._file(outcome.member)
        if outcome.params is not None:
            named = trees.named_leaves(outcome.params)
            _write_arrays(path.with_suffix(".npz"), {name: np.asarray(x) for name, x in named})
        if outcome.state is not None:
            step = np.asarray(outcome.state.step)
            _write_arrays(self._state_file(outcome.member, ".final.npz"), {**_numbered(outcome.state), "step": step})

        def lists(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: np.asarray(x, np.float64).tolist() for name, x in values.items()}

        found = {"seconds": outcome.seconds, "results": dict(outcome.results), "history": lists(outcome.history)}
        tracked = {"tracked": lists(outcome.tracked)} if outcome.tracked else {}
        write_json(path, {**self._about(outcome.member), **found, **tracked})

    def load(self, member: Any, params: bool, state: bool) -> dict[str, Any] | None:
        """What an outcome of a finished member has, or `None`; its parameters and state if they are wanted too.

        Raises `DataError` for a member with other settings, and for a damaged file.
        """
        path, final = self._file(member), self._state_file(member, ".final.npz")
        wanted = [path, *([path.with_suffix(".npz")] if params else []), *([final] if state else [])]
        if not all(p.exists() for p in wanted):
            return None
        kept = read_object(path)
        self._check_same(path, kept, member)
        try:
            history, tracked = (
                {name: np.array([float(number(v)) for v in x], np.float32) for name, x in kept.get(part, {}).items()}
                for part in ("history", "tracked")
            )
            results = {name: float(number(x)) for name, x in kept["results"].items()}
            found = {
                "history": history,
                "tracked": tracked,
                "results": results,
                "seconds": float(number(kept["seconds"])),
            }
            steps = {len(x) for x in history.values()}
            if len(steps) != 1 or not 1 <= steps.pop() <= self.settings["num_steps"]:
                raise ValueError("its history is not one of steps")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise _damaged(path, error) from error
        if params:
            trainable = self.abstract.trainable
            arrays = _read_arrays(path.with_suffix(".npz"), dict(trees.named_leaves(trainable)))
            found["params"] = trees.map_named(lambda name, leaf: jnp.asarray(arrays[name]), trainable)
        if state:
            found["state"] = self._final_state(final)
        return found

    def save_states(
        self,
        members: Sequence[tuple[int, Any]],
        done: int,
        states: TrainState,
        history: Mapping[str, Any],
        tracked: Mapping[str, Any],
    ) -> None:
        """Keeps the states of members, each given with its place, after `done` steps; all arrays but the step have a
        leading axis of places."""
        if not members:
            return
        arrays, step = _numbered(states), int(states.step)
        arrays |= {f"history/{n}": x for n, x in history.items()} | {f"tracked/{n}": x for n, x in tracked.items()}
        for i, member in members:
            about = json.dumps({**self._about(member), "done": done, "step": step}).encode()
            mine = {name: x[i] for name, x in arrays.items()}
            _write_arrays(self._state_file(member), {**mine, "about": np.frombuffer(about, np.uint8)})

    def load_states(self, members: Sequence[Any]) -> tuple[TrainState, dict, dict, int] | None:
        """States, history, what was tracked and steps done, if `save_states` kept them of all these members and after
        equally many steps. Raises `DataError` as `load`."""
        files = [self._state_file(member) for member in members]
        if not all(path.exists() for path in files):
            return None
        read = [self._under_way(path, member) for path, member in zip(files, members)]
        if len({(done, step, frozenset(history)) for _, history, _, done, step in read}) > 1:
            return None
        leaves, histories, tracked, (done, *_), (step, *_) = zip(*read)
        tree = jax.tree.structure(_mapped(self.abstract))
        states = jax.tree.unflatten(tree, [jnp.asarray(np.stack(x)) for x in zip(*leaves)])
        states = _as_state(states, self.abstract, step)
        return states, _stacked(histories), _stacked(tracked), done

    def has_state(self, member: Any) -> bool:
        """Whether a state of a member under way is kept."""
        return self._state_file(member).exists()

    def forget_state(self, member: Any) -> None:
        """Removes the state of a member that is finished."""
        self._state_file(member).unlink(missing_ok=True)

    def _under_way(self, path: Path, member: Any) -> tuple[list[np.ndarray], dict, dict, int, int]:
        try:
            with np.load(path, allow_pickle=False) as flat:
                about = parse_json(flat["about"].tobytes(), f"{path}")
                history, tracked = (
                    {name.removeprefix(part): flat[name] for name in flat.files if name.startswith(part)}
                    for part in ("history/", "tracked/")
                )
        except (*_DAMAGED, DataError) as error:
            raise _damaged(path, error) from error
        about = about if isinstance(about, dict) else {}
        self._check_same(path, about, member)
        done, step = about.get("done"), about.get("step")
        whole = type(done) is int and 0 < done <= self.settings["num_steps"] and type(step) is int and step >= done
        if not whole or {x.shape for x in history.values()} != {(done,)}:
            raise _damaged(path, "its history is not one of steps")
        return self._leaves(path), history, tracked, done, step

    def _final_state(self, path: Path) -> TrainState:
        step = _read_arrays(path, {"step": jax.ShapeDtypeStruct((), np.int32)})["step"]
        tree = jax.tree.structure(_mapped(self.abstract))
        return _as_state(jax.tree.unflatten(tree, [jnp.asarray(x) for x in self._leaves(path)]), self.abstract, step)

    def _leaves(self, path: Path) -> list[np.ndarray]:
        leaves = jax.tree.leaves(_mapped(self.abstract))
        arrays = _read_arrays(path, {f"state/{i}": leaf for i, leaf in enumerate(leaves)})
        return [arrays[f"state/{i}"] for i in range(len(leaves))]

    def _file(self, member: Any) -> Path:
        # Not `with_suffix` on the name alone: it may have dots.
        return Path(self.folder) / (file_name(member.name) + ".json")

    def _state_file(self, member: Any, suffix: str = ".state.npz") -> Path:
        return Path(self.folder) / (file_name(member.name) + suffix)

    def _about(self, member: Any) -> dict[str, Any]:
        about = {"name": member.name, "seed": member.seed, "hparams": dict(member.hparams), **self.settings}
        return about if member.data_seed is None else {**about, "data_seed": member.data_seed}

    def _check_same(self, path: Path, kept: Mapping[str, Any], member: Any) -> None:
        about = json.loads(json.dumps(self._about(member)))
        known = ("name", "seed", "hparams", "num_steps", "start", "data_seed")
        there = {name: kept[name] for name in known if name in kept}
        if there != about:
            raise DataError(f"{path} is of a run with other settings: {there}, here {about}")


def as_data(x: Any) -> Any:
    """A typed key, or its shape, as the numbers that it is made of; other arrays as they are."""
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    return jax.eval_shape(jax.random.key_data, x) if isinstance(x, jax.ShapeDtypeStruct) else jax.random.key_data(x)


def _mapped(states: TrainState) -> dict[str, Any]:
    """The parts of states that members have of their own, keys as numbers."""
    rest = {name: getattr(states, name) for name in ("trainable", "opt_state", "extra", "key", "hparams")}
    return jax.tree.map(as_data, rest)


def _numbered(states: TrainState) -> dict[str, np.ndarray]:
    return {f"state/{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(_mapped(states)))}


def _as_state(found: dict[str, Any], abstract: TrainState, step: Any) -> TrainState:
    like = {name: getattr(abstract, name) for name in found}

    def key(x: Any, leaf: Any) -> Any:
        return jax.random.wrap_key_data(x) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else x

    return TrainState(step=jnp.asarray(step, jnp.int32), **jax.tree.map(key, found, like))


def _stacked(values: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([v[name] for v in values]) for name in values[0]}


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial.npz")
    np.savez(partial, **arrays)
    partial.replace(path)


def _read_arrays(path: Path, abstract: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Arrays of a file, each of the shape and type that it must have; nothing is read before its header is checked."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name, leaf in abstract.items():
                # What an array would fill is said in its header, which the size of the entry must bear out.
                if archive.getinfo(f"{name}.npy").file_size > leaf.size * leaf.dtype.itemsize + 4096:
                    raise ValueError(f"{name} is larger than expected")
        with np.load(path, allow_pickle=False) as flat:
            arrays = {name: flat[name] for name in abstract}
        for name, leaf in abstract.items():
            # NumPy's files know bfloat16 only as two bytes.
            arrays[name] = arrays[name].view(leaf.dtype)
            if arrays[name].shape != leaf.shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}, expected {leaf.shape}")
    except (*_DAMAGED, zipfile.LargeZipFile, RuntimeError, SyntaxError, TypeError) as error:
        raise _damaged(path, error) from error
    return arrays


def _damaged(path: Path, error: Any) -> DataError:
    return DataError(f"{path} cannot be read ({error}): delete it, and its member is trained again")
