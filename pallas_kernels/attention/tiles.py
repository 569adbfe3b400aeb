"""Block sizes of the kernels, the memory they need, and the tables of blocks that a kernel visits.

A kernel's grid runs over a list of (query block, key block) pairs that holds exactly the pairs which the causal and
window structure lets see one another; nothing is launched for the others. Segments depend on data, so the pairs of
different segments stay in the list, marked to be passed over, and their blocks are not fetched.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.problem import Structure

LANES = 128

TPU_VMEM_BYTES = 16 * 2**20
"""What a TPU kernel may use of the vector memory (the compiler's default limit on v5e, v5p and v6e)."""

TPU_SMEM_BYTES = 2**18
"""What the tables of a kernel may use of the scalar memory."""

# Flags of a step.
FIRST, LAST, COMPUTE, MASK = 1, 2, 4, 8


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries and keys of a block, in the forward kernel and in the two backward kernels."""

    q: int
    k: int
    q_backward: int
    k_backward: int


# By (head_dim at most, bytes of an element). Larger blocks read keys fewer times; these stay below 16 MiB.
TPU_TILES = {
    (128, 2): Tiles(512, 1024, 512, 512),
    (128, 4): Tiles(512, 512, 512, 512),
    (256, 2): Tiles(512, 512, 512, 512),
    (256, 4): Tiles(256, 512, 256, 512),
}

TPU_DECODE_SLOTS = {2: 512, 4: 256}
"""Cache slots read at a time, by bytes of an element."""

TPU_DECODE_ROWS = 256
"""Queries times heads of a group that the decoding kernel takes; their logits and sums stay in vector memory."""


class Steps(NamedTuple):
    """The pairs that a kernel visits, in order. `major` is the block that results are summed for."""

    major: np.ndarray
    minor: np.ndarray
    flags: np.ndarray


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def padded_head_dim(head_dim: int) -> int:
    """Whole registers: chips pad the last axis to 128 lanes in memory in any case."""
    return round_up(head_dim, LANES)


def tpu_tiles(queries: int, keys: int, head_dim: int, itemsize: int) -> Tiles:
    """The table's tiles, no larger than the sequences."""
    found = TPU_TILES[(128 if head_dim <= 128 else 256, itemsize)]
    q, k = round_up(queries, LANES), round_up(keys, LANES)
    return Tiles(min(found.q, q), min(found.k, k), min(found.q_backward, q), min(found.k_backward, k))


def tpu_vmem_bytes(tiles: Tiles, head_dim: int, itemsize: int) -> dict[str, int]:
    """Bytes of vector memory of each kernel: blocks (twice, one is fetched while another is used), scratch, logits."""
    dim = padded_head_dim(head_dim)

    def total(bq: int, bk: int, q_blocks: int, k_blocks: int, scratch: int, logits: int) -> int:
        blocks = 2 * itemsize * dim * (q_blocks * bq + k_blocks * bk)
        rows = 2 * 4 * 8 * (4 * bq + 2 * bk)  # log-sum-exps, delta, segments, bias: a row fills 8 sublanes
        return blocks + rows + 4 * scratch + (4 * logits + 2 * itemsize) * bq * bk

    bq, bk, bqb, bkb = tiles.q, tiles.k, tiles.q_backward, tiles.k_backward
    return {
        "forward": total(bq, bk, 2, 2, bq * dim + 3 * bq * LANES, 2),
        "dq": total(bqb, bkb, 3, 2, bqb * dim + 3 * bqb * LANES, 3),
        "dkv": total(bqb, bkb, 2, 4, 2 * bkb * dim + 3 * bkb * LANES, 3),
    }


def pairs_by_query(structure: Structure, queries: int, keys: int, bq: int, bk: int) -> Steps:
    """The pairs of blocks, one query block after another (forward pass, queries' gradient)."""
    rows = []
    for i in range(-(-queries // bq)):
        start, end = i * bq, min((i + 1) * bq, queries)
        first, last = structure.visible(start, end, keys)
        whole = structure.visible_to_all(start, end, keys)
        row = [(i, j, _flags(j * bk, (j + 1) * bk, whole)) for j in range(first // bk, -(-last // bk))]
        rows.append(row if first < last else [(i, 0, 0)])
    return _steps(rows)


def pairs_by_key(structure: Structure, queries: int, keys: int, bq: int, bk: int, group: int) -> Steps:
    """The same pairs, one key block after another, for each query head of a group (`minor` = head * blocks + block)."""
    blocks = -(-queries // bq)
    forward = pairs_by_query(structure, queries, keys, bq, bk)
    rows = []
    for j in range(-(-keys // bk)):
        chosen = (forward.minor == j) & (forward.flags & COMPUTE > 0)
        row = [
            (j, g * blocks + int(i), int(f) & (COMPUTE | MASK))
            for g in range(group)
            for i, f in zip(forward.major[chosen], forward.flags[chosen])
        ]
        rows.append(row or [(j, 0, 0)])
    return _steps(rows)


def by_segments(steps: Steps, q_segments: jax.Array, kv_segments: jax.Array, bq: int, bk: int, by_query: bool):
    """Flags and fetched blocks `[b * steps]` once segments are known: `(flags, fetch)`.

    A pair whose ranges of ids do not meet is passed over; the block that is then named as fetched is the one before, so
    nothing moves. A pair that lies within one segment needs no mask for it.
    """
    spans = []
    for ids, size in ((q_segments, bq), (kv_segments, bk)):
        cut = ids.reshape(ids.shape[0], -1, size)
        spans.append((cut.min(axis=-1), cut.max(axis=-1)))
    q_index, k_index = (steps.major, steps.minor) if by_query else (steps.minor, steps.major)
    q_index = q_index % spans[0][0].shape[1]
    (q_low, q_high), (k_low, k_high) = ((low[:, i], high[:, i]) for (low, high), i in zip(spans, (q_index, k_index)))
    meet = (q_low <= k_high) & (k_low <= q_high)
    same = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    flags = jnp.asarray(steps.flags)[None]
    compute = meet & (flags & COMPUTE > 0)
    order = jnp.arange(flags.shape[1], dtype=jnp.int32)[None]
    # The last step up to this one that computes; before the first, that one.
    source = jax.lax.cummax(jnp.where(compute, order, -1), axis=1)
    source = jnp.where(source < 0, jnp.argmax(compute, axis=1)[:, None], source)
    fetch = jnp.asarray(steps.minor)[source]
    flags = (flags & (FIRST | LAST)) + jnp.where(compute, COMPUTE + jnp.where(same, flags & MASK, MASK), 0)
    return flags.reshape(-1).astype(jnp.int32), fetch.reshape(-1).astype(jnp.int32)


def why_not_tpu(request) -> str | None:
    """Why the rows of a request do not fit in vector memory or its tables in scalar memory, or `None`."""
    batch, kv_heads, group, queries, keys, head_dim = request.shape
    if request.decode:
        if group * queries <= TPU_DECODE_ROWS:
            return None
        return f"{queries} queries of {group} heads for each key head are more than {TPU_DECODE_ROWS} rows"
    tiles = tpu_tiles(queries, keys, head_dim, jnp.dtype(request.dtype).itemsize)
    pairs = pairs_by_query(request.structure, queries, keys, tiles.q_backward, tiles.k_backward)
    needed = tables_bytes(len(pairs.flags) * group, batch if request.segments else 1)
    if needed > TPU_SMEM_BYTES:
        return f"its tables of blocks take {needed} bytes of scalar memory, more than {TPU_SMEM_BYTES}"
    return None


def tables_bytes(steps: int, batch: int) -> int:
    """Bytes of the tables that a kernel reads: two of the static pairs, two for each row of segments (or one)."""
    return 4 * steps * (2 + 2 * batch)


def _flags(start: int, end: int, whole: tuple[int, int]) -> int:
    return COMPUTE if whole[0] <= start and end <= whole[1] else COMPUTE | MASK


def _steps(rows: list[list[tuple[int, int, int]]]) -> Steps:
    flat = []
    for row in rows:
        for n, (major, minor, flags) in enumerate(row):
            flat.append((major, minor, flags | (FIRST if n == 0 else 0) | (LAST if n == len(row) - 1 else 0)))
    table = np.asarray(flat, np.int32)
    return Steps(*(np.ascontiguousarray(column) for column in table.T))
