"""Tile sizes of the Hopper kernels, the shared memory they need, and which blocks each tile has to see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.problem import Structure
from pallas_kernels.attention.tiles import round_up

SHARED_MEMORY_BYTES = 232_448
"""What a thread block may use on H100 and H200."""


@dataclasses.dataclass(frozen=True)
class GpuTiles:
    """`groups` warp groups of `rows` rows own a tile; blocks of `other` rows pass by in `stages` buffers."""

    rows: int = 64
    groups: int = 2
    other: int = 128
    groups_backward: int = 2
    other_backward: int = 64
    stages: int = 2


# By head_dim at most.
GPU_TILES = {
    64: GpuTiles(),
    128: GpuTiles(),
    192: GpuTiles(other=64, groups_backward=1),
    256: GpuTiles(other=64, groups_backward=1),
}


def gpu_tiles(head_dim: int) -> GpuTiles:
    return next(tiles for dim, tiles in GPU_TILES.items() if head_dim <= dim)


def together(outputs: tuple[str, ...], dim: int) -> list[tuple[str, ...]]:
    """Which of the keys' gradients one kernel computes: beyond 128 the sums of two do not fit into registers."""
    if dim <= 128:
        return [outputs]
    return [tuple(name for name in outputs if name != "dv"), ("dv",)]


def shared_memory_bytes(tiles: GpuTiles, head_dim: int, itemsize: int = 2) -> dict[str, int]:
    """Bytes of shared memory of each kernel, with bias and segments."""
    dim = round_up(head_dim, 64)

    def total(groups: int, other: int, own_blocks: int, ring_blocks: int, own_rows: int, ring_rows: int) -> int:
        own, ring = groups * tiles.rows, tiles.stages * other
        blocks = itemsize * dim * (own_blocks * own + ring_blocks * ring)
        rows = 4 * (own_rows * own + ring_rows * ring)
        # Barriers of 8 bytes, buffers aligned to 1024, and Mosaic's own 2 KiB for sums over rows.
        return blocks + rows + 1024 * (own_rows + ring_rows) + 2048

    backward = tiles.groups_backward, tiles.other_backward
    return {
        "forward": total(tiles.groups, tiles.other, 1, 2, 2, 2),
        "dq": total(*backward, 2, 2, 3, 2),
        "dkv": total(*backward, 2, 2, 3, 3),
    }


def bounds(
    structure: Structure,
    queries: int,
    keys: int,
    q_size: int,
    k_size: int,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    by_query: bool,
) -> jax.Array:
    """For each tile the blocks `[low, high)` that pass by, and between them `[whole_low, whole_high)` without a mask.

    `int32[b or 1, tiles, 4]` in the order low, whole_low, whole_high, high. Tiles are of queries (`by_query`) or keys.
    With segments (padded, `[b, 1, length]`) the blocks from the first to the last that may share one, all masked.
    """
    q_tiles, k_tiles = -(-queries // q_size), -(-keys // k_size)
    seen, whole = np.zeros((q_tiles, k_tiles), bool), np.zeros((q_tiles, k_tiles), bool)
    for i in range(q_tiles):
        start, end = i * q_size, min((i + 1) * q_size, queries)
        first, last = structure.visible(start, end, keys)
        if first < last:
            seen[i, first // k_size : -(-last // k_size)] = True
        first, last = structure.visible_to_all(start, end, keys)
        whole[i, -(-first // k_size) : max(0, last // k_size)] = True
    whole &= seen
    if not by_query:
        seen, whole = seen.T, whole.T
    if q_segments is None:
        low, high = _span(np, seen)
        whole_low, whole_high = _span(np, whole)
        none = whole_low == whole_high
        whole_low, whole_high = np.where(none, low, whole_low), np.where(none, low, whole_high)
        return jnp.asarray(np.stack([low, whole_low, whole_high, high], axis=-1)[None], jnp.int32)
    low_high = []
    for ids, size in ((q_segments, q_size), (kv_segments, k_size)):
        cut = ids.reshape(ids.shape[0], -1, size)
        low_high.append((cut.min(axis=-1), cut.max(axis=-1)))
    (q_low, q_high), (k_low, k_high) = low_high
    meet = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
    meet = meet if by_query else jnp.swapaxes(meet, 1, 2)
    low, high = _span(jnp, meet & jnp.asarray(seen)[None])
    return jnp.stack([low, low, low, high], axis=-1).astype(jnp.int32)


def _span(numpy, marked):
    """First and end of the marked entries along the last axis; 0 and 0 where there are none."""
    count = marked.shape[-1]
    first = numpy.argmax(marked, axis=-1)
    end = count - numpy.argmax(marked[..., ::-1], axis=-1)
    return first, numpy.where(marked.any(axis=-1), end, first)
