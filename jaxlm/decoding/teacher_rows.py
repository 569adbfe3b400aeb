"""Text that a model writes by itself, as rows to train another one on: distillation without the teacher's logits.

    teacher = StackedStepper(DecoderStepper(model))
    synthetic = sample_rows(teacher, stacked, 4096, 64, start_id=256, seed=3, folder=out / "teacher")
    sample = mix_rows([real, synthetic], (4, 12))

(Kim, Kotha et al. 2025, "Pre-training under infinite compute", arXiv 2509.14786: a fresh student learns from a mixture
of what an ensemble, or a model of its own size, wrote and of the real text.)
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxlm.core import trees
from jaxlm.core.configs import fingerprint
from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.temporary import beside
from jaxlm.data.resident import ResidentRows
from jaxlm.decoding.generate import GenerationConfig, generate, prompt_keys
from jaxlm.decoding.stepper import Params, Stepper


def sample_rows(
    stepper: Stepper,
    params: Params,
    count: int,
    length: int,
    *,
    start_id: int,
    temperature: float = 1.0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    batch_size: int = 256,
    folder: Path | None = None,
) -> ResidentRows:
    """`count` rows of `length` tokens that a model writes after `start_id` alone, drawn from its own distribution.

    Rows are as `jaxlm.data.resident.from_start` makes them of real text: `inputs` begin with `start_id`, `targets` are
    what was written. A row that one of `stop_ids` ends has no `loss_weights` after it. Row i is the same whatever
    `batch_size` and `count`. With a `folder` each batch is kept in a file and not written again.

    Raises:
      ConfigError: no rows, tokens or batch, or a start or stop id that is not in the vocabulary.
      DataError: `folder` holds a batch of another model or other settings, or a damaged file.
    """
    for name, value in (("count", count), ("length", length), ("batch_size", batch_size)):
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected at least 1")
    for name, token in (("start_id", start_id), *(("stop_ids", token) for token in stop_ids)):
        if not 0 <= token < stepper.vocab_size:
            raise ConfigError(f"{name} has {token}; the vocabulary has ids 0 to {stepper.vocab_size - 1}")
    config = GenerationConfig(max_new_tokens=length, temperature=temperature)
    settings = [length, start_id, temperature, list(stop_ids), seed, batch_size]
    about = "" if folder is None else fingerprint([repr(stepper), trees.fingerprint(params), *settings])

    def write(first: int) -> dict[str, np.ndarray]:
        # A whole batch every time, so that the last one compiles nothing new.
        keys = prompt_keys(seed, batch_size, first)
        found = generate(stepper, params, [[start_id]] * batch_size, config, stop_ids=stop_ids, keys=keys)
        return {"tokens": found.tokens[:, 0], "lengths": found.lengths[:, 0]}

    batches = []
    for first in range(0, count, batch_size):
        path = None if folder is None else Path(folder) / f"rows-{first:08d}.npz"
        if path is not None and path.exists():
            batches.append(_load(path, about, (batch_size, length)))
            continue
        batches.append(write(first))
        if path is not None:
            _save(path, about, batches[-1])
    tokens, lengths = (np.concatenate([b[name] for b in batches])[:count] for name in ("tokens", "lengths"))
    start = np.full((count, 1), start_id, np.int32)
    inputs = np.concatenate([start, tokens[:, :-1]], axis=1)
    weights = (np.arange(length)[None, :] < lengths[:, None]).astype(np.float32)
    found = {"inputs": inputs, "targets": tokens, "loss_weights": weights}
    return ResidentRows({name: jnp.asarray(x) for name, x in found.items()})


def _save(path: Path, about: str, arrays: dict[str, np.ndarray]) -> None:
    with beside(path) as temporary:
        with open(temporary, "wb") as file:
            np.savez(file, about=np.frombuffer(about.encode(), np.uint8), **arrays)
        temporary.replace(path)


def _load(path: Path, about: str, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as flat:
            there = flat["about"].tobytes().decode()
            found = {"tokens": flat["tokens"], "lengths": flat["lengths"]}
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}): delete it, and its rows are written again") from error
    if there != about:
        raise DataError(f"{path} was written by another model or with other settings: choose another folder")
    if found["tokens"].shape != shape or found["lengths"].shape != shape[:1]:
        raise DataError(f"{path} holds rows of shape {found['tokens'].shape}, expected {shape}")
    return found
