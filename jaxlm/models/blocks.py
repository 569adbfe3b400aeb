"""The layout of a model's blocks: a list of runs, each one stack of layers that share structure and weight types.

These functions are the only code that knows it. A stack's arrays have a leading layer axis; `blocks` in a parameter
tree is the list of stacks. A model has one run unless its layers differ.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.core.errors import ConfigError

Blocks = Sequence[Any]


class Segment(NamedTuple):
    """Layers `first` to `last` of run `run`, to be scanned `period` at a time. Indices count from the model's start."""

    run: int
    run_start: int
    first: int
    last: int
    period: int


def run_length(stack: Any) -> int:
    """The number of layers of a run."""
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(stack)}
    if len(lengths) != 1:
        raise ConfigError(f"the arrays of a run must share their leading (layer) axis, found sizes {sorted(lengths)}")
    return lengths.pop()


def num_layers(blocks: Blocks) -> int:
    return sum(run_length(stack) for stack in blocks)


def segments(kinds: Sequence[Any], lengths: Sequence[int], first: int, last: int) -> list[Segment]:
    """Cuts layers `first` to `last` into pieces that one scan each can run.

    `kinds` has one entry a layer, `lengths` one a run. Where kinds repeat with a period, the aligned middle of a run is
    scanned a whole period at a time; what is left at its ends is scanned as stretches of equal kind.
    """
    period = _period(kinds)
    found, start = [], 0
    for run, length in enumerate(lengths):
        low, high = max(first, start), min(last, start + length)
        if low < high:
            aligned = min(-(-low // period) * period, high)
            end = aligned + (high - aligned) // period * period
            pieces = [*_stretches(kinds, low, aligned), (aligned, end, period), *_stretches(kinds, end, high)]
            found.extend(Segment(run, start, a, b, p) for a, b, p in pieces if a < b)
        start += length
    return found


def _period(kinds: Sequence[Any]) -> int:
    for period in range(1, len(kinds)):
        if all(kinds[i] == kinds[i % period] for i in range(len(kinds))):
            return period
    return max(len(kinds), 1)


def _stretches(kinds: Sequence[Any], first: int, last: int) -> list[tuple[int, int, int]]:
    out: list[tuple[int, int, int]] = []
    for i in range(first, last):
        if out and kinds[i] == kinds[out[-1][0]]:
            out[-1] = (out[-1][0], i + 1, 1)
        else:
            out.append((i, i + 1, 1))
    return out


def layer(params: Any, index: int) -> Any:
    """The parameters of one block, without the layer axis."""
    start = 0
    for stack in params["blocks"]:
        length = run_length(stack)
        if start <= index < start + length:
            return jax.tree.map(lambda x: x[index - start], stack)  # noqa: B023 (called at once)
        start += length
    raise ConfigError(f"layer {index} of a model with {start} layers")


def gather_layers(params: Any, indices: Sequence[int]) -> Any:
    """A model made of the given layers of this one, in that order, repeats allowed.

    Layers that lie next to each other in `indices` and have the same structure and weight types share a run.
    """
    starts, total = [], 0
    for stack in params["blocks"]:
        starts.append(total)
        total += run_length(stack)
    for index in indices:
        if not 0 <= index < total:
            raise ConfigError(f"layer {index} of a model with {total} layers")
    picked: list[tuple[int, list[int]]] = []
    for index in indices:
        run = max(r for r, s in enumerate(starts) if s <= index)
        if picked and _same_kind(params["blocks"][picked[-1][0]], params["blocks"][run]):
            previous, rows = picked[-1]
            if previous == run:
                rows.append(index - starts[run])
                continue
        picked.append((run, [index - starts[run]]))
    stacks: list[Any] = []
    for run, rows in picked:
        stack = jax.tree.map(lambda x: x[jnp.array(rows)], params["blocks"][run])  # noqa: B023 (called at once)
        if stacks and _same_kind(stacks[-1], stack):
            stacks[-1] = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stacks[-1], stack)
        else:
            stacks.append(stack)
    return {**params, "blocks": stacks}


def recut(blocks: Blocks, boundaries: Sequence[int]) -> list[Any]:
    """The same layers in runs that begin at 0 and at each of `boundaries` (ascending).

    A new run may not join layers of different structure or weight type: `ConfigError`.
    """
    total = num_layers(blocks)
    edges = [0, *boundaries, total]
    if any(a >= b for a, b in zip(edges, edges[1:])):
        raise ConfigError(f"boundaries {list(boundaries)} must ascend strictly between 0 and {total}")
    out = []
    for low, high in zip(edges, edges[1:]):
        parts, start = [], 0
        for stack in blocks:
            length = run_length(stack)
            a, b = max(low, start) - start, min(high, start + length) - start
            if a < b:
                parts.append(jax.tree.map(lambda x: x[a:b], stack))  # noqa: B023 (called at once)
            start += length
        if not all(_same_kind(parts[0], part) for part in parts):
            raise ConfigError(f"layers {low} to {high - 1} differ in structure or weight type and cannot share a run")
        out.append(parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts))
    return out


def _same_kind(a: Any, b: Any) -> bool:
    def signature(stack: Any) -> tuple:
        leaves, treedef = jax.tree.flatten(stack)
        return treedef, [(leaf.shape[1:], leaf.dtype) for leaf in leaves]

    return signature(a) == signature(b)
