"""Gradients that devices add up in few bits: what goes over the wire is codes and a scale a block.

Each device cuts its gradient into as many parts as there are devices, sends each part to the one that adds it up, and
gets the sums back; both ways rounded. So every entry is rounded twice, whatever the number of devices.

Source: ZeRO++ (Wang et al., 2023, arXiv 2306.10209, section 3.3), here for one group of devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, UInt8

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError
from jaxlm.core.formats import GridFormat
from jaxlm.core.keys import fold
from jaxlm.core.scaled import Quantizer, Scaled, dequantize, quantize
from jaxlm.objectives.base import Aux, Batch, Objective, StepContext
from jaxlm.training.state import TrainState
from jaxlm.training.step import Build, Gradients, accumulate

AXIS = "data"


def require_data_parallel(mesh: Mesh) -> None:
    """Raises `ConfigError` for a mesh that shards more than the batch: its gradients are not whole on any device."""
    others = {name: size for name, size in mesh.shape.items() if name != AXIS and size > 1}
    if others:
        raise ConfigError(f"gradients are sent in few bits over mesh.{AXIS} alone, but the mesh has {others} too")


def accumulate_in_few_bits(
    objective: Objective,
    build: Build,
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    quantizer: Quantizer,
    micro_batches: int = 1,
) -> Gradients:
    """`accumulate` on each device's rows, gradients then added up by `all_reduce`: a `gradients` of `make_step`.

    Losses, metrics and totals are added exactly. Products that scale by the largest magnitude of this step take that
    of each device's own rows.

    Raises:
      ConfigError: a mesh with other axes than `data`, or an objective that changes `extra`: each device would have its
        own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        require_data_parallel(mesh)
    if mesh.empty or mesh.shape.get(AXIS, 1) == 1:
        return accumulate(objective, build, state, frozen, batch, micro_batches=micro_batches)

    def on_device(state: TrainState, frozen: Any, rows: Batch) -> Gradients:
        with sharding.one_device():
            own = accumulate(_Summed(objective), build, state, frozen, rows, micro_batches=micro_batches)
        # In the gradients' message: XLA's CPU runtime mixes up collectives that do not wait for one another.
        exact = (own.loss, own.metrics, own.measured)
        grads, (losses, metrics, measured) = _all_reduce(own.grads, exact, AXIS, quantizer)
        loss, metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), (losses, metrics))
        return Gradients(loss, grads, metrics, own.extra, jax.tree.map(lambda x: jnp.max(x, axis=0), measured))

    whole = PartitionSpec()
    specs = {"in_specs": (whole, whole, PartitionSpec(AXIS)), "out_specs": whole}
    return jax.shard_map(on_device, mesh=mesh, check_vma=False, **specs)(state, frozen, batch)


def all_reduce(tree: Any, axis: str, q: Quantizer) -> Any:
    """The sums of a tree's arrays over the devices of a mesh axis, inside `jax.shard_map`, sent in few bits.

    Blocks are `(1, n)`. The results are the same on every device, and have the dtypes of the arrays. All arrays travel
    as one message of bytes each way.
    """
    return _all_reduce(tree, (), axis, q)[0]


def _all_reduce(tree: Any, exact: Any, axis: str, q: Quantizer) -> tuple[Any, Any]:
    """`all_reduce`, and the arrays of `exact` on every device, stacked along a new axis 0, sent as they are."""
    arrays, structure = jax.tree.flatten(tree)
    beside, exact_structure = jax.tree.flatten(exact)
    devices, size = jax.lax.axis_size(axis), 1 if q.block is None else q.block[1] or 1
    parts = [jnp.pad(x.astype(jnp.float32).ravel(), (0, -x.size % (devices * size))) for x in arrays]
    parts = [x.reshape(devices, -1) for x in parts]
    exchange = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0, tiled=True)
    gather = functools.partial(jax.lax.all_gather, axis_name=axis, axis=0, tiled=True)
    received, _ = _sent(parts, [], q, exchange)
    own = [jnp.sum(x, axis=0, keepdims=True) for x in received]
    totals, stacked = _sent(own, [x[None] for x in beside], q, gather)
    totals = [total.ravel()[: x.size].reshape(x.shape).astype(x.dtype) for total, x in zip(totals, arrays, strict=True)]
    return jax.tree.unflatten(structure, totals), jax.tree.unflatten(exact_structure, stacked)


def _sent(
    matrices: list[Float[Array, "rows _"]],
    exact: list[Float[Array, "rows ..."]],
    q: Quantizer,
    move: Callable[[Array], Array],
) -> tuple[list[Float[Array, "moved _"]], list[Float[Array, "moved ..."]]]:
    """What arrives of matrices that `move` sends, rows of bytes, after rounding; and of others that are not rounded."""
    form = q.number_format
    dtype = jnp.int8 if isinstance(form, GridFormat) and form.bits <= 8 else getattr(form, "dtype", None)
    pieces = []
    for s in (quantize(matrix, q) for matrix in matrices):
        pieces += [s.values.astype(dtype or jnp.float32)] + ([] if q.block is None else [s.scale])
    rounded = len(pieces)
    pieces += exact
    message = [_bytes(piece) for piece in pieces]
    ends = np.cumsum([m.shape[1] for m in message])[:-1].tolist()
    arrived = jnp.split(move(jnp.concatenate(message, axis=1)), ends, axis=1)
    arrived = [_of_bytes(m, piece) for m, piece in zip(arrived, pieces, strict=True)]
    arrived, exact = arrived[:rounded], arrived[rounded:]
    if q.block is None:
        return [values.astype(jnp.float32) for values in arrived], exact
    pairs = zip(arrived[::2], arrived[1::2], strict=True)
    return [dequantize(Scaled(values.astype(jnp.float32), scale, jnp.ones(())), q) for values, scale in pairs], exact


def _bytes(x: Array) -> UInt8[Array, "rows bytes"]:
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(x.shape[0], -1)


def _of_bytes(message: UInt8[Array, "rows bytes"], like: Array) -> Array:
    """Rows of bytes as what `_bytes` made them of: the dtype and all axes but the first are those of `like`."""
    wide = () if like.dtype.itemsize == 1 else (like.dtype.itemsize,)
    return jax.lax.bitcast_convert_type(message.reshape(-1, *like.shape[1:], *wide), like.dtype)


@dataclasses.dataclass(frozen=True)
class _Summed:
    """An objective on one device's rows: totals are those of all devices, random keys its own."""

    objective: Any

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> Any:
        return jax.lax.psum(self.objective.totals(params, batch, self._own(ctx)), AXIS)

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Any) -> tuple[Array, Aux]:
        value, aux = self.objective.loss(params, batch, self._own(ctx), totals)
        if aux.extra is not None:
            raise ConfigError("gradients are sent in few bits, but the objective changes its extra by a device's rows")
        return value, aux

    def meters(self, extra: Mapping[str, Any]) -> Any:
        return self.objective.meters(extra) if hasattr(self.objective, "meters") else None

    def _own(self, ctx: StepContext) -> StepContext:
        key = None if ctx.key is None else fold(ctx.key, jax.lax.axis_index(AXIS))
        return dataclasses.replace(ctx, key=key)
