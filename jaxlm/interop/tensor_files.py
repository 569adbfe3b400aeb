"""Safetensors files, tensor by tensor: what is read is a view of the mapped file, what is written is streamed.

Format: 8 bytes of header length (little-endian), a JSON header `name -> {dtype, shape, data_offsets}`, the tensors'
bytes. (The `safetensors` package would do, but that it wants the whole of a file's tensors at once to write them, and
that its NumPy side knows bfloat16 in recent versions only; the tests read and write through it too.)
"""

import dataclasses
import itertools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import CheckpointError, DataError
from jaxlm.core.json_files import read_object

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""The formats that weights are read and written in."""

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, format, shape, and bytes `start` to `stop` of the file."""

    file: "MappedFile"
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class MappedFile:
    """A safetensors file, mapped into memory, its header checked.

    Raises `CheckpointError`, naming the file, when it is truncated or its header does not describe it.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(_MAX_HEADER, size - 8):
                    raise CheckpointError(f"{path}: {size} bytes, truncated or not a safetensors file (header)")
                header = file.read(length)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            described = json.loads(header, object_pairs_hook=_distinct)
            described.pop("__metadata__", None)
            self.entries = {name: self._entry(8 + length, **fields) for name, fields in described.items()}
            _check_apart(self.entries)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: its header is not that of a safetensors file: {error}") from error
        end = max((e.stop for e in self.entries.values()), default=8 + length)
        if end > size:
            raise CheckpointError(f"{path}: truncated: its tensors end at byte {end:,}, the file at {size:,}")

    def _entry(self, base: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
        start, stop = data_offsets
        if not 0 <= start <= stop or any(type(n) is not int or n < 0 for n in (start, stop, *shape)):
            raise ValueError(f"offsets {data_offsets}, shape {shape}")
        # What NumPy has no shape for, where a dimension of 0 lets the sizes agree.
        if len(shape) > 32 or math.prod(n or 1 for n in shape) >= 1 << 59:
            raise ValueError(f"shape {shape}")
        if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{stop - start} bytes for {dtype}{shape}")
        return Entry(self, dtype, tuple(shape), base + start, base + stop)

    def view(self, entry: Entry) -> np.ndarray:
        """A read-only view of a tensor, nothing copied."""
        dtype = DTYPES[entry.dtype]
        flat = np.frombuffer(self._map, np.uint8, entry.stop - entry.start, entry.start)
        return flat.view(dtype).reshape(entry.shape)

    def release(self, entry: Entry) -> None:
        """Tells the system that a tensor's pages are not needed, so that what was read does not stay resident."""
        if hasattr(self._map, "madvise"):
            page = mmap.PAGESIZE
            start = entry.start // page * page
            self._map.madvise(mmap.MADV_DONTNEED, start, entry.stop - start)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it has a name twice")
    return found


def _check_apart(entries: Mapping[str, Entry]) -> None:
    """Tensors share no bytes, as the format has it: else a small file could stand for a large model."""
    at = sorted((e.start, e.stop, name) for name, e in entries.items() if e.stop > e.start)
    for (_, stop, one), (start, _, other) in itertools.pairwise(at):
        if start < stop:
            raise ValueError(f"{one} and {other} overlap")


def open_tensors(folder: Path) -> dict[str, Entry]:
    """The tensors of a checkpoint folder: one file, or several with an index.

    Raises `CheckpointError` when there are none, when there are pickles alone, when a file is damaged, or when the
    index names a file outside the folder, a file that is missing, or a tensor that its file has not got.
    """
    if (folder / SINGLE).exists():
        return MappedFile(folder / SINGLE).entries
    if not (folder / INDEX).exists():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise CheckpointError(
                f"{folder} holds {', '.join(pickles)} and no {SINGLE}: pickles may run code when opened and are "
                "refused; convert the checkpoint to safetensors"
            )
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}")
    where = _weight_map(folder / INDEX)
    outside = sorted({f for f in where.values() if Path(f).name != f or f in ("", ".", "..") or "\\" in f})
    if outside:
        raise CheckpointError(f"{folder / INDEX} names files outside its folder: {', '.join(map(repr, outside))}")
    names = sorted(set(where.values()))
    absent = [name for name in names if not os.path.isfile(folder / name)]
    if absent:
        raise CheckpointError(f"{folder}: files that {INDEX} names are missing: {', '.join(absent)}")
    files = {name: MappedFile(folder / name) for name in names}
    lost = sorted(f"{tensor} ({file})" for tensor, file in where.items() if tensor not in files[file].entries)
    if lost:
        raise CheckpointError(f"{folder}: tensors that {INDEX} names are not in their files: {', '.join(lost)}")
    return {tensor: files[file].entries[tensor] for tensor, file in where.items()}


def _weight_map(path: Path) -> dict[str, str]:
    try:
        where = read_object(path)["weight_map"]
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in where.items()):
            raise ValueError("weight_map must map names to files")
        return where
    except (DataError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the index of a checkpoint: {error!r}") from error


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_tensors(
    folder: Path,
    tensors: Sequence[Planned],
    values: Iterable[np.ndarray],
    max_shard_bytes: int,
    single: str = SINGLE,
) -> list[str]:
    """Writes tensors to the file `single`, or to shards of at most so many bytes (or one tensor) with an index.

    `values` yields the arrays in the order of `tensors`, and is asked for the next one when the last is on disk.
    Equal input gives equal bytes. Returns the names of the files.
    """
    shards = _shards(tensors, max_shard_bytes)
    names = [single]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    values = iter(values)
    for name, shard in zip(names, shards, strict=True):
        with open(folder / name, "wb") as file:
            _write_shard(file.write, shard, values)
    if len(shards) == 1:
        return names
    where = {t.name: name for name, shard in zip(names, shards) for t in shard}
    index: dict[str, Any] = {"metadata": {"total_size": sum(t.nbytes for t in tensors)}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*names, INDEX]


def _shards(tensors: Sequence[Planned], max_bytes: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_shard(write: Callable[[Any], Any], shard: Sequence[Planned], values: Iterable[np.ndarray]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in shard:
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write(len(text).to_bytes(8, "little"))
    write(text)
    for t, value in zip(shard, values):
        if value.shape != t.shape:
            raise CheckpointError(f"{t.name}: its value has shape {value.shape}, expected {t.shape}")
        data = np.ascontiguousarray(value, DTYPES[t.dtype])
        write(data.reshape(-1).view(np.uint8).data)
