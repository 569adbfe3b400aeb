"""Gradients that devices add up in few bits: what goes over the wire is codes and a scale a block.

Each device cuts its gradient into as many parts as there are devices, sends each part to the one that adds it up, and
gets the sums back; both ways rounded. So every entry is rounded twice, whatever the number of devices.

Source: ZeRO++ (Wang et al., 2023, arXiv 2306.10209, section 3.3), here for one group of devices.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

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
      ConfigError: a mesh with other axes than `data`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(AXIS, 1) == 1:
        return accumulate(objective, build, state, frozen, batch, micro_batches=micro_batches)
    require_data_parallel(mesh)

    def on_device(state: TrainState, frozen: Any, rows: Batch) -> Gradients:
        with sharding.one_device():
            own = accumulate(_Summed(objective), build, state, frozen, rows, micro_batches=micro_batches)
        return Gradients(
            jax.lax.psum(own.loss, AXIS),
            jax.tree.map(lambda g: all_reduce(g, AXIS, quantizer), own.grads),
            jax.lax.psum(own.metrics, AXIS),
            own.extra,
            jax.tree.map(lambda m: jax.lax.pmax(m, AXIS), own.measured),
        )

    whole = PartitionSpec()
    specs = {"in_specs": (whole, whole, PartitionSpec(AXIS)), "out_specs": whole}
    return jax.shard_map(on_device, mesh=mesh, check_vma=False, **specs)(state, frozen, batch)


def all_reduce(x: Float[Array, "..."], axis: str, q: Quantizer) -> Float[Array, "..."]:
    """The sum of `x` over the devices of a mesh axis, inside `jax.shard_map`, sent in blocks `(1, n)` as `q` says.

    The result is the same on every device, and has the dtype of `x`.
    """
    devices, size = jax.lax.axis_size(axis), 1 if q.block is None else q.block[1] or 1
    flat = x.astype(jnp.float32).ravel()
    flat = jnp.pad(flat, (0, -flat.size % (devices * size)))
    parts = flat.reshape(devices, -1)

    def sent(rows: Array, move: Any) -> Array:
        s = quantize(rows, q)
        form = q.number_format
        dtype = jnp.int8 if isinstance(form, GridFormat) and form.bits <= 8 else getattr(form, "dtype", None)
        # Gathered as they are stored: the barrier keeps the compiler from widening before it sends.
        narrow = jax.lax.optimization_barrier(s.values.astype(dtype or jnp.float32))
        values = move(narrow).astype(jnp.float32)
        return dequantize(Scaled(values, s.scale if q.block is None else move(s.scale), jnp.ones(())), q)

    received = sent(parts, lambda m: jax.lax.all_to_all(m, axis, 0, 0, tiled=True))
    own = jnp.sum(received, axis=0, keepdims=True)
    total = sent(own, lambda m: jax.lax.all_gather(m, axis, axis=0, tiled=True))
    return total.ravel()[: x.size].reshape(x.shape).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _Summed:
    """An objective on one device's rows: totals are those of all devices, random keys its own."""

    objective: Any

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> Any:
        return jax.lax.psum(self.objective.totals(params, batch, self._own(ctx)), AXIS)

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Any) -> tuple[Array, Aux]:
        return self.objective.loss(params, batch, self._own(ctx), totals)

    def meters(self, extra: Mapping[str, Any]) -> Any:
        return self.objective.meters(extra) if hasattr(self.objective, "meters") else None

    def _own(self, ctx: StepContext) -> StepContext:
        key = None if ctx.key is None else fold(ctx.key, jax.lax.axis_index(AXIS))
        return dataclasses.replace(ctx, key=key)
