"""Layers run in `jax.lax.scan`: stacks of them a period of kinds at a time, their taps stacked or in buffers."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import ConfigError
from jaxlm.layers.context import Tap
from jaxlm.models import blocks
from jaxlm.models.config import LayerKind


def scan_layers(
    run_layer: Callable[..., tuple[Array, Any, Mapping[str, Any]]],
    stacks: blocks.Blocks,
    per_layer: Mapping[str, Any],
    kinds: Sequence[LayerKind],
    h: Float[Array, "batch length embed"],
    taps: Mapping[str, Tap],
    first: int,
    last: int,
) -> tuple[Float[Array, "batch length embed"], tuple[Array, Array] | None, dict[str, Any]]:
    """The residual stream after layers `first` to `last`, their new keys and values, and what their taps reduced.

    `run_layer(kind, h, layer_params, layer_inputs) -> (h, (k, v), taps)` is one layer; `per_layer` what each gets
    beside its parameters, with a leading axis of all layers, `index` (the layer's number) among it. Keys, values and
    taps are stacked along the layers that ran (keys and values `None` if none did); a tap that names its layers has a
    row for each of those.

    Raises `ConfigError` when the stacks have another number of layers than `kinds`, or a tap a layer that there is not.
    """
    count = len(kinds)
    lengths = [blocks.run_length(stack) for stack in stacks]
    if sum(lengths) != count:
        raise ConfigError(f"the parameters have {sum(lengths)} layers, the configuration {count}")
    chosen = {site: tap for site, tap in taps.items() if tap.layers is not None}
    slots = {site: _slots(site, tap.layers, count) for site, tap in chosen.items()}
    buffers, outputs = None, []
    for segment in blocks.segments(kinds, lengths, first, last):
        low, high = segment.first, segment.last
        stack = _slice(stacks[segment.run], low - segment.run_start, high - segment.run_start)
        xs = (stack, _slice(per_layer, low, high))
        segment_kinds = kinds[low : low + segment.period]
        if buffers is None:
            shapes = _tap_shapes(functools.partial(run_layer, segment_kinds[0]), h, xs) if chosen else {}
            buffers = {site: _buffer(shapes[site], len(tap.layers)) for site, tap in chosen.items()}
        (h, buffers), ys = _scan(run_layer, segment_kinds, (h, buffers), xs, slots)
        outputs.append(ys)
    new_keys, stacked = _concatenate(outputs) if outputs else (None, {})
    buffered = {site: jax.tree.map(lambda x: x[:-1], tree) for site, tree in (buffers or {}).items()}
    return h, new_keys, {**stacked, **buffered}


def _slice(tree: Any, low: int, high: int) -> Any:
    return jax.tree.map(lambda x: x if (low, high) == (0, x.shape[0]) else x[low:high], tree)


def _slots(site: str, wanted: tuple[int, ...], count: int) -> Int[Array, "layers"]:
    """Where each layer's tap goes in a buffer of `len(wanted)` results; what nobody wants goes to one row beyond."""
    for index in wanted:
        if not 0 <= index < count:
            raise ConfigError(f"tap of '{site}' at layer {index} of a model with {count} layers")
    return jnp.array([wanted.index(i) if i in wanted else len(wanted) for i in range(count)], jnp.int32)


def _tap_shapes(run: Any, h: Array, xs: Any) -> dict[str, Any]:
    return jax.eval_shape(lambda h, xs: run(h, *jax.tree.map(lambda x: x[0], xs))[2], h, xs)


def _buffer(shapes: Any, size: int) -> Any:
    return jax.tree.map(lambda s: jnp.zeros((size + 1, *s.shape), s.dtype), shapes)


def _scan(run_layer, kinds: tuple[LayerKind, ...], carry: Any, xs: Any, slots: Mapping[str, Array]) -> tuple[Any, Any]:
    """Scans layers, `len(kinds)` of them a step. Returns the carry and `((k, v), taps)` stacked along the layers."""
    period = len(kinds)

    def one(kind: LayerKind, carry: Any, x: Any) -> tuple[Any, Any]:
        h, buffers = carry
        h, new_keys, taps = run_layer(kind, h, *x)
        index = x[1]["index"]
        for site, table in slots.items():
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=table[index], axis=0)
            buffers = {**buffers, site: jax.tree.map(put, buffers[site], taps[site])}
        return (h, buffers), (new_keys, {site: value for site, value in taps.items() if site not in slots})

    if period == 1:
        return jax.lax.scan(functools.partial(one, kinds[0]), carry, xs)

    def group(carry: Any, x: Any) -> tuple[Any, Any]:
        ys = []
        for i, kind in enumerate(kinds):
            carry, y = one(kind, carry, jax.tree.map(lambda leaf: leaf[i], x))  # noqa: B023 (called at once)
            ys.append(y)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)

    grouped = jax.tree.map(lambda x: x.reshape(x.shape[0] // period, period, *x.shape[1:]), xs)
    carry, ys = jax.lax.scan(group, carry, grouped)
    return carry, jax.tree.map(lambda y: y.reshape(y.shape[0] * period, *y.shape[2:]), ys)


def _concatenate(outputs: list[Any]) -> Any:
    return outputs[0] if len(outputs) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *outputs)
