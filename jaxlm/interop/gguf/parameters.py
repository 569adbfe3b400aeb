"""A GGUF file's tensors as the parameters of a `Decoder`, one tensor at a time."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlm.core import sharding
from jaxlm.core.errors import CheckpointError, ConfigError
from jaxlm.interop.gguf import blocks
from jaxlm.interop.gguf.architecture import Place, places
from jaxlm.interop.gguf.reader import File, Tensor
from jaxlm.models import Decoder, DecoderConfig
from jaxlm.weights import Quantized, Weight, child_axes, dense

# Read with the metadata.
_ELSEWHERE = {"rope_freqs.weight"}


def load(file: File, config: DecoderConfig, dtype: np.dtype, packed: bool, mesh: Mesh | None) -> dict[str, Any]:
    """The parameters. Raises `CheckpointError` that lists every tensor which is missing, unknown or misshapen."""
    outer, block = places(file.metadata["general.architecture"], config)
    _check(file, config, outer, block)
    axes = Decoder(config).axes()
    rules = {} if mesh is None else config.sharding_rules(mesh)

    params: dict[str, Any] = {}
    for name, place in outer.items():
        value = _read(file.tensors[name], place, dtype)
        if isinstance(value, Weight) and not packed:
            value = _dense(value)
        _set(params, place.path, _Placement(_get(axes, place.path), mesh, rules)(value))

    params["blocks"] = []
    for first, last in _runs(file, config, block) if packed else [(0, config.num_layers)]:
        run: dict[str, Any] = {}
        for name, place in block.items():
            layers = (_read(file.tensors[f"blk.{i}.{name}"], place, dtype) for i in range(first, last))
            placed = _Placement(_get(axes["blocks"][0], place.path), mesh, rules)
            _set(run, place.path, _stack(layers, last - first, packed, placed))
        params["blocks"].append(run)
    return params


@dataclasses.dataclass(frozen=True)
class _Placement:
    """Puts a parameter with these logical axes on the mesh, or (without one) where JAX puts arrays by default.

    Packed matrices keep the names: on a mesh their kernels need them.
    """

    axes: tuple[str | None, ...]
    mesh: Mesh | None
    rules: sharding.Rules

    def shardings(self, value: Any) -> Any:
        if self.mesh is None:
            return None
        return sharding.shardings(self.mesh, child_axes(value, self.axes), value, self.rules)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Quantized):
            value = dataclasses.replace(value, names=self.axes[-2:])
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, value)
        return jax.device_put(value, self.shardings(value))


def _check(file: File, config: DecoderConfig, outer: Mapping[str, Place], block: Mapping[str, Place]) -> None:
    expected = dict(outer)
    for i in range(config.num_layers):
        expected |= {f"blk.{i}.{name}": place for name, place in block.items()}
    missing = [name for name in expected if name not in file.tensors]
    unknown = [name for name in file.tensors if name not in expected and name not in _ELSEWHERE]
    wrong, types = [], []
    for name, place in expected.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            continue
        shape = place.shape[::-1] if place.kernel else place.shape
        if tensor.shape != shape:
            wrong.append(f"{name} has shape {tensor.shape}, expected {shape}")
        if tensor.type not in (blocks.TYPES if len(shape) == 2 else blocks.FLOATS):
            types.append(f"{name} is {tensor.type}")
    if missing or unknown or wrong:
        said = [("missing", missing), ("unknown", unknown), ("of another shape", wrong)]
        lists = "; ".join(f"{what}: {', '.join(names)}" for what, names in said if names)
        raise CheckpointError(f"{file.path}: tensors do not fit the model. {lists}")
    if types:
        raise ConfigError(
            f"{file.path}: tensors of a type that cannot be read ({', '.join(blocks.TYPES)} can): {', '.join(types)}"
        )


def _runs(file: File, config: DecoderConfig, block: Mapping[str, Place]) -> list[tuple[int, int]]:
    """Stretches of layers whose tensors have the same types."""

    def types(layer: int) -> tuple[str, ...]:
        found = (file.tensors[f"blk.{layer}.{name}"].type for name in block)
        return tuple("float" if t in blocks.FLOATS else t for t in found)

    stretches = (list(group) for _, group in itertools.groupby(range(config.num_layers), types))
    return [(stretch[0], stretch[-1] + 1) for stretch in stretches]


def _read(tensor: Tensor, place: Place, dtype: np.dtype) -> Any:
    rows = None if place.heads is None else _half_split_rows(tensor.shape[0], place.heads)
    if tensor.type not in blocks.FLOATS:
        return blocks.quantized(tensor, dtype, kernel=place.kernel, rows=rows)
    values = blocks.floats(tensor)
    values = values if rows is None else values[rows]
    values = values.T if place.kernel else values
    return (values + np.float32(place.offset) if place.offset else values).astype(dtype)


def _half_split_rows(count: int, heads: int) -> np.ndarray:
    """From pairs `(2i, 2i + 1)` of each head's dimensions to pairs `(i, i + size/2)`."""
    return np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _stack(layers: Iterator[Any], count: int, packed: bool, placed: _Placement) -> Any:
    """A run's stack of one parameter. Dense matrices are unpacked and written in place, so there is no second copy."""
    first = next(layers)
    if packed or len(first.shape) == 1:
        return placed(jax.tree.map(lambda *x: np.stack(x), first, *layers))
    abstract = jax.ShapeDtypeStruct((count, *first.shape), first.dtype)
    where = placed.shardings(abstract)
    stack = jnp.zeros(abstract.shape, abstract.dtype, device=where)
    write = _writer(where)
    for i, layer in enumerate(itertools.chain([first], layers)):
        stack = write(stack, np.int32(i), layer)
    return stack


@functools.cache
def _writer(where: jax.sharding.Sharding | None) -> Callable:
    def write(stack: jax.Array, i: jax.Array, layer: Any) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, dense(layer), i, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=where)


_dense = jax.jit(dense)


def _set(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)
