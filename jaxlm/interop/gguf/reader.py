"""The header of a GGUF file, and its tensors as views of the mapped file.

The format is described in the ggml project's `docs/gguf.md`; type numbers and block sizes are those of the `gguf`
package. Its own `GGUFReader` makes several arrays of each string of the vocabulary, which takes longer than reading
the rest of a small model (and 0.9 GB for 262,144 tokens), so the header is read here.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core.errors import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMS, _MOST_NESTED = 4, 4


@dataclasses.dataclass(frozen=True)
class Tensor:
    """`shape`: rows first, the contiguous axis last. `type`: its name, `Q4_K`. `raw`: `[rows, bytes of a row]`."""

    name: str
    shape: tuple[int, ...]
    type: str
    raw: np.ndarray


@dataclasses.dataclass(frozen=True)
class File:
    """`metadata`: numbers, strings, flags and lists by key. `tensors` by name; their bytes are read when touched."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read(path: str | Path) -> File:
    """Reads the header. Raises `CheckpointError` for what is not a (little-endian) GGUF file or is cut short."""
    import gguf

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size < 24:
        raise CheckpointError(f"{path}: not a GGUF file: it has {path.stat().st_size} bytes")
    mapped = np.memmap(path, mode="r")
    header = _Header(path, memoryview(mapped))
    magic, version, tensor_count, key_count = header.unpack("4sIQQ")
    if magic != b"GGUF":
        raise CheckpointError(f"{path}: not a GGUF file: it begins with {magic!r}")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version}, expected 2 or 3 (little-endian)")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = header.string()
        if key in metadata:
            raise CheckpointError(f"{path}: the metadata have '{key}' twice")
        metadata[key] = header.value(header.unpack("I")[0])
    infos = []
    for _ in range(tensor_count):
        name = header.string()
        (rank,) = header.unpack("I")
        if not 1 <= rank <= _MOST_DIMS:
            raise CheckpointError(f"{path}: tensor '{name}' has {rank} dimensions, expected 1 to {_MOST_DIMS}")
        dims = header.unpack(f"{rank}Q")
        if 0 in dims:
            raise CheckpointError(f"{path}: tensor '{name}' has the shape {dims[::-1]}, expected no 0 in it")
        infos.append((name, dims[::-1], *header.unpack("IQ")))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, expected a small number of bytes")
    start = -(-header.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise CheckpointError(f"{path}: there are two tensors '{name}'")
        try:
            kind = gguf.GGMLQuantizationType(kind)
            block, size = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise CheckpointError(f"{path}: tensor '{name}' has the unknown type number {kind}") from None
        if shape[-1] % block:
            raise CheckpointError(
                f"{path}: tensor '{name}' has rows of {shape[-1]}, no multiple of {kind.name}'s {block}"
            )
        rows, row = math.prod(shape[:-1]), shape[-1] // block * size
        end = start + offset + rows * row
        if end > mapped.size:
            raise CheckpointError(
                f"{path} is cut short: tensor '{name}' ends at byte {end:,}, the file has {mapped.size:,}"
            )
        tensors[name] = Tensor(name, shape, kind.name, np.asarray(mapped[start + offset : end]).reshape(rows, row))
    return File(path, metadata, tensors)


class _Header:
    """A place in the file that moves on as values are read."""

    def __init__(self, path: Path, data: memoryview):
        self.path, self.data, self.at = path, data, 0

    def unpack(self, form: str) -> tuple:
        try:
            values = struct.unpack_from("<" + form, self.data, self.at)
        except (struct.error, OverflowError) as error:
            raise CheckpointError(f"{self.path} is cut short: its header ends at byte {len(self.data):,}") from error
        self.at += struct.calcsize("<" + form)
        return values

    def string(self) -> str:
        (size,) = self.unpack("Q")
        if size > len(self.data) - self.at:
            raise CheckpointError(f"{self.path} is cut short: its header ends at byte {len(self.data):,}")
        raw = bytes(self.data[self.at : self.at + size])
        self.at += size
        # Vocabularies have been seen with pieces of characters.
        return raw.decode(errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: unknown type {kind} of a metadata value at byte {self.at:,}")
        if depth == _MOST_NESTED:
            raise CheckpointError(f"{self.path}: lists in lists more than {_MOST_NESTED} deep at byte {self.at:,}")
        kind, size = self.unpack("IQ")
        if kind in _SCALARS:
            return list(self.unpack(f"{size}{_SCALARS[kind]}"))
        if size > len(self.data):
            raise CheckpointError(f"{self.path}: a list of {size} values at byte {self.at:,}, longer than the file")
        return [self.value(kind, depth + 1) for _ in range(size)]
