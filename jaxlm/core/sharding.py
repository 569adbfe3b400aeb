"""The device mesh, and how logical axes of arrays lie on it.

Models name the axes of their arrays (`"embed"`, `"mlp"`, `"batch"`); a table of rules says on which mesh axes each
name lies; `use_mesh` makes mesh and rules ambient for what is traced inside. Without it everything works on one
device and every constraint is a no-op.

Mesh axes: `data` (batch only), `fsdp` (batch, and weights sharded over it), `sequence` (length), `expert`, `tensor`
(heads, feed-forward width, vocabulary).
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError

MESH_AXES = ("data", "fsdp", "sequence", "expert", "tensor")
BATCH_AXES = ("data", "fsdp")

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = {
    # parameters
    "layers": None,
    "experts": "expert",
    "embed": "fsdp",
    "vocab": "tensor",
    "tied_vocab": "tensor",
    "positions": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "norm": None,
    "rank": None,
    "scale_groups": None,
    # activations
    "batch": BATCH_AXES,
    "length": "sequence",
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocab": "tensor",
}
"""The default rules. A name that is not here is an error."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; one of them may be -1: what is left of the devices."""

    data: int = -1
    """Copies of the model that each see a part of the batch."""
    fsdp: int = 1
    """Parts of the batch among which the weights and optimizer state are sharded too (ZeRO-3)."""
    sequence: int = 1
    """Parts of each row's length."""
    expert: int = 1
    """Parts among which experts are divided."""
    tensor: int = 1
    """Parts of each matrix product: heads, feed-forward width, vocabulary."""

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """The mesh's shape on so many devices, in the order of `MESH_AXES`."""
        sizes = [getattr(self, name) for name in MESH_AXES]
        for name, size in zip(MESH_AXES, sizes, strict=True):
            if size != -1 and size < 1:
                raise ConfigError(f"mesh.{name} is {size}, expected a positive number, or -1 for what is left")
        if sizes.count(-1) > 1:
            raise ConfigError(f"mesh has more than one -1: {dict(zip(MESH_AXES, sizes, strict=True))}")
        known = math.prod(s for s in sizes if s != -1)
        if num_devices % known or (-1 not in sizes and known != num_devices):
            raise ConfigError(
                f"mesh {dict(zip(MESH_AXES, sizes, strict=True))} does not fit on {num_devices} devices: "
                f"the product of its axes, {known}, must {'divide' if -1 in sizes else 'equal'} {num_devices}"
            )
        return tuple(num_devices // known if s == -1 else s for s in sizes)


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the devices (by default all), laid out so that neighboring devices share the last axes."""
    sizes = config.sizes(len(devices) if devices is not None else jax.device_count())
    types = (AxisType.Auto,) * len(MESH_AXES)
    if devices is None:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=types)
    return Mesh(np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=types)


@dataclasses.dataclass(frozen=True)
class _Ambient:
    rules: Rules
    platform: str | None
    axis_sizes: Mapping[str, int]


_NO_MESH = _Ambient(RULES, None, {name: 1 for name in MESH_AXES})
_ambient: contextvars.ContextVar[_Ambient] = contextvars.ContextVar("jaxlm_mesh", default=_NO_MESH)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules | None = None):
    """Traces what is inside for `mesh`: constraints take effect, kernels are chosen for its devices' platform."""
    ambient = _Ambient({**RULES, **(rules or {})}, mesh.devices.flat[0].platform, dict(mesh.shape))
    token = _ambient.set(ambient)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _ambient.reset(token)


@contextlib.contextmanager
def one_device():
    """Traces what is inside for one device of the ambient mesh, as in `jax.shard_map`: nothing is constrained."""
    ambient = _ambient.get()
    token = _ambient.set(dataclasses.replace(ambient, axis_sizes=_NO_MESH.axis_sizes))
    try:
        yield
    finally:
        _ambient.reset(token)


def platform() -> str:
    """The platform (`cpu`, `gpu`, `tpu`) that is compiled for: that of the mesh, else JAX's default backend."""
    name = _ambient.get().platform or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def axis_size(name: str) -> int:
    """The number of parts of an ambient mesh axis (1 without a mesh)."""
    return _ambient.get().axis_sizes.get(name, 1)


def mesh_axes(*names: str | None) -> tuple[tuple[str, ...], ...]:
    """For each logical name, the ambient mesh's axes of more than one part on which it lies."""
    ambient = _ambient.get()
    parts = partition_spec(names, ambient.rules)
    split = ((part,) if isinstance(part, str) else (part or ()) for part in parts)
    return tuple(tuple(axis for axis in part if ambient.axis_sizes.get(axis, 1) > 1) for part in split)


def num_devices() -> int:
    """The number of devices of the ambient mesh (1 without a mesh)."""
    return math.prod(_ambient.get().axis_sizes.values())


def partition_spec(names: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """The `PartitionSpec` of an array whose axes have these logical names."""
    parts = []
    for name in names:
        if name is not None and name not in rules:
            raise ConfigError(f"no sharding rule for the logical axis '{name}' of {tuple(names)}")
        parts.append(None if name is None else rules[name])
    return PartitionSpec(*parts)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks that `x`, whose axes have these logical names, lie on the ambient mesh as the rules say.

    Axes that a mesh axis does not divide stay whole (a batch of one while sampling, say).
    """
    if num_devices() == 1:
        return x
    return jax.lax.with_sharding_constraint(x, local_spec(x.shape, names))


def local_spec(shape: Sequence[int], names: Sequence[str | None]) -> PartitionSpec:
    """How an array of this shape, whose axes have these logical names, lies on the ambient mesh (see `constrain`)."""
    ambient = _ambient.get()
    spec = partition_spec(names, ambient.rules)
    return PartitionSpec(
        *(p if n % _parts(p, ambient.axis_sizes) == 0 else None for p, n in zip(spec, shape, strict=True))
    )


def gather(x: jax.Array, stored: Sequence[str | None], used: Sequence[str | None]) -> jax.Array:
    """`x`, stored on the mesh as the names `stored` say, laid out as `used` say; its gradient lies as stored again.

    The gradient of a mere `constrain` lies as the result does: a sharded weight's would stay whole until it is needed.
    """
    return _gather(x, tuple(stored), tuple(used))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, stored: tuple, used: tuple) -> jax.Array:
    return constrain(x, *used)


def _gather_forward(x: jax.Array, stored: tuple, used: tuple) -> tuple[jax.Array, None]:
    return constrain(x, *used), None


def _gather_backward(stored: tuple, used: tuple, _: None, grad: jax.Array) -> tuple[jax.Array]:
    return (constrain(grad, *stored),)


_gather.defvjp(_gather_forward, _gather_backward)


def _parts(part: Any, sizes: Mapping[str, int]) -> int:
    names = (part,) if isinstance(part, str) else (part or ())
    return math.prod(sizes[name] for name in names)


def is_axes(x: Any) -> bool:
    """Whether `x` is a leaf of an axes tree: a plain tuple of names and `None`s."""
    return type(x) is tuple and all(n is None or isinstance(n, str) for n in x)


def shardings(mesh: Mesh, axes: Any, shapes: Any, rules: Rules | None = None) -> Any:
    """The tree of `NamedSharding`s of parameters, from their axes and shapes.

    Raises `ConfigError` naming the parameter and axis when a mesh axis does not divide it.
    """
    rules = {**RULES, **(rules or {})}

    def one(path: str, names: tuple, shape: Any) -> NamedSharding:
        spec = partition_spec(names, rules)
        for name, part, size in zip(names, spec, shape.shape, strict=True):
            if size % _parts(part, mesh.shape):
                raise ConfigError(
                    f"{path}: its axis '{name}' of size {size} is not divisible by {_parts(part, mesh.shape)}, "
                    f"the size of mesh axis {part!r}"
                )
        return NamedSharding(mesh, spec)

    return trees.map_named(one, axes, shapes, is_leaf=is_axes)


def like_params(tree: Any, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that contains copies of the parameters' tree, such as an optimizer's state.

    A leaf whose path ends with a parameter's path and that has as many axes lies like the parameter along every axis
    of the same size (momenta, averages), and is whole along the others (the rank of a projection, blocks of a
    quantized moment). Every other leaf (counters, factored statistics) is replicated.
    """
    known = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(trees.named_leaves(params), jax.tree.leaves(param_shardings), strict=True)
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def one(path: str, leaf: Any) -> NamedSharding:
        parts = path.split("/")
        for start in range(len(parts)):
            shape, sharding = known.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return sharding
            if shape is not None and len(shape) == len(leaf.shape):
                spec = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
                return NamedSharding(
                    mesh,
                    PartitionSpec(*[p if n == m else None for p, n, m in zip(spec, leaf.shape, shape, strict=True)]),
                )
        return replicated

    return trees.map_named(one, tree)


def batch_sharding(mesh: Mesh, ndim: int = 1, rules: Rules | None = None) -> NamedSharding:
    """The sharding of a batch array: its axis 0 over the batch axes, nothing else."""
    part = {**RULES, **(rules or {})}["batch"]
    return NamedSharding(mesh, PartitionSpec(part, *[None] * (ndim - 1)))


def shard_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], rules: Rules | None = None) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on the mesh; together the processes' rows are the global batch.

    Raises `ConfigError` when the global batch cannot be divided evenly.
    """
    parts = math.prod(mesh.shape[a] for a in BATCH_AXES)
    out = {}
    for name, x in batch.items():
        total = x.shape[0] * jax.process_count()
        if total % parts:
            raise ConfigError(
                f"batch of {total} rows is not divisible by {parts} (mesh data {mesh.shape['data']} x fsdp "
                f"{mesh.shape['fsdp']})"
            )
        out[name] = jax.make_array_from_process_local_data(batch_sharding(mesh, x.ndim, rules), np.asarray(x))
    return out
