"""What a population keeps on disk: each finished member (JSON, its parameters beside it), and states under way.

A member is the file of its name: `NAME.json` once it is finished, `NAME.npz` its parameters, `NAME.state.npz` its state
before that. Every file is replaced in one move.
"""

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


def save(folder: Path, outcome: Any, num_steps: int) -> None:
    """Keeps a finished member."""
    path = _file(folder, outcome.member)
    if outcome.params is not None:
        _write_arrays(path.with_suffix(".npz"), {name: np.asarray(x) for name, x in trees.named_leaves(outcome.params)})
    write_json(
        path,
        {
            **_about(outcome.member, num_steps),
            "seconds": outcome.seconds,
            "results": dict(outcome.results),
            "history": {name: np.asarray(x, np.float64).tolist() for name, x in outcome.history.items()},
        },
    )


def load(folder: Path, member: Any, num_steps: int, abstract: Any) -> tuple[dict, dict, float, Any] | None:
    """History, results, seconds and parameters of a finished member, or `None`.

    `abstract`: the structure of its parameters, if they are wanted too.

    Raises `DataError` for a member with other settings, and for a damaged file.
    """
    path = _file(folder, member)
    if not path.exists() or (abstract is not None and not path.with_suffix(".npz").exists()):
        return None
    kept = read_object(path)
    _check_same(path, kept, member, num_steps)
    try:
        history = {name: np.array([float(number(v)) for v in x], np.float32) for name, x in kept["history"].items()}
        results = {name: float(number(x)) for name, x in kept["results"].items()}
        seconds = float(number(kept["seconds"]))
        if len({len(x) for x in history.values()}) != 1 or not 1 <= len(next(iter(history.values()))) <= num_steps:
            raise ValueError("its history is not one of steps")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(path, error) from error
    params = None
    if abstract is not None:
        arrays = _read_arrays(path.with_suffix(".npz"), {name: leaf for name, leaf in trees.named_leaves(abstract)})
        params = trees.map_named(lambda name, leaf: jnp.asarray(arrays[name]), abstract)
    return history, results, seconds, params


def save_states(
    folder: Path, members: Sequence[Any], num_steps: int, done: int, states: TrainState, history: Mapping[str, Any]
) -> None:
    """Keeps the states of members after `done` steps; `states` and `history` have a leading axis of members."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(_as_data(states))]
    for i, member in enumerate(members):
        arrays = {f"state/{n}": x[i] for n, x in enumerate(leaves)} | {f"history/{n}": x[i] for n, x in history.items()}
        about = json.dumps({**_about(member, num_steps), "done": done}).encode()
        _write_arrays(_state_file(folder, member), {**arrays, "about": np.frombuffer(about, np.uint8)})


def load_states(
    folder: Path, members: Sequence[Any], num_steps: int, abstract: TrainState
) -> tuple[TrainState, dict[str, np.ndarray], int] | None:
    """What `save_states` kept of these members, if it is there for all of them and after equally many steps.

    Raises `DataError` as `load`.
    """
    files = [_state_file(folder, member) for member in members]
    if not all(path.exists() for path in files):
        return None
    leaves, tree = jax.tree.flatten(_as_data(abstract))
    found, histories, steps = [], [], set()
    for path, member in zip(files, members):
        try:
            with np.load(path, allow_pickle=False) as flat:
                about = parse_json(flat["about"].tobytes(), f"{path}")
                names = [name for name in flat.files if name.startswith("history/")]
                histories.append({name.removeprefix("history/"): flat[name] for name in names})
        except (*_DAMAGED, DataError) as error:
            raise _damaged(path, error) from error
        _check_same(path, about if isinstance(about, dict) else {}, member, num_steps)
        done = about.get("done")
        rows = {x.shape for x in histories[-1].values()}
        if type(done) is not int or not 0 < done <= num_steps or rows != {(done,)}:
            raise _damaged(path, "its history is not one of steps")
        steps.add(done)
        arrays = _read_arrays(path, {f"state/{i}": leaf for i, leaf in enumerate(leaves)})
        found.append([arrays[f"state/{i}"] for i in range(len(leaves))])
    if len(steps) > 1 or len({frozenset(h) for h in histories}) > 1:
        return None
    states = jax.tree.unflatten(tree, [jnp.asarray(np.stack(x)) for x in zip(*found)])
    done = steps.pop()
    states = TrainState(**{**vars(_as_keys(states, abstract)), "step": jnp.asarray(done, jnp.int32)})
    return states, {name: np.stack([h[name] for h in histories]) for name in histories[0]}, done


def forget_states(folder: Path, members: Sequence[Any]) -> None:
    """Removes the states of members that are finished."""
    for member in members:
        _state_file(folder, member).unlink(missing_ok=True)


def _file(folder: Path, member: Any) -> Path:
    # Not `with_suffix` on the name alone: it may have dots.
    return Path(folder) / (file_name(member.name) + ".json")


def _state_file(folder: Path, member: Any) -> Path:
    return Path(folder) / (file_name(member.name) + ".state.npz")


def _about(member: Any, num_steps: int) -> dict[str, Any]:
    about = {"name": member.name, "seed": member.seed, "hparams": dict(member.hparams), "num_steps": num_steps}
    return about if member.data_seed is None else {**about, "data_seed": member.data_seed}


def _check_same(path: Path, kept: Mapping[str, Any], member: Any, num_steps: int) -> None:
    about = json.loads(json.dumps(_about(member, num_steps)))
    there = {name: kept[name] for name in ("name", "seed", "hparams", "num_steps", "data_seed") if name in kept}
    if there != about:
        raise DataError(f"{path} is of a run with other settings: {there}, here {about}")


def _as_data(states: TrainState) -> dict[str, Any]:
    """The mapped parts of states, keys as the numbers that they are."""
    rest = {name: getattr(states, name) for name in ("trainable", "opt_state", "extra", "key", "hparams")}

    def data(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jax.eval_shape(jax.random.key_data, x) if isinstance(x, jax.ShapeDtypeStruct) else jax.random.key_data(x)

    return jax.tree.map(data, rest)


def _as_keys(found: dict[str, Any], abstract: TrainState) -> TrainState:
    like = {name: getattr(abstract, name) for name in found}

    def key(x: Any, leaf: Any) -> Any:
        return jax.random.wrap_key_data(x) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else x

    return TrainState(step=None, **jax.tree.map(key, found, like))


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
