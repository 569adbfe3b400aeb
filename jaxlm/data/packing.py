"""Rows of fixed length from documents: read from a store by arithmetic, or planned for a list of examples.

Targets are shifted before packing: a document of n tokens is n - 1 (input, target) pairs, so no pair spans
two documents. In a row, `segment_ids` count the documents from 1 (0 is padding) and `positions` restart at 0
with each; a document that a row boundary cuts goes on in the next row as a new segment.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.store import TokenStore

Batch = dict[str, np.ndarray]


def count_rows(store: TokenStore, length: int) -> Int[np.ndarray, "sources"]:
    """Rows of `length` pairs in each source; the last row of a source may be padded."""
    if length < 1:
        raise ConfigError(f"sequence length is {length}, expected 1 or more")
    return -(-store.source_pairs // length)


def read_rows(
    store: TokenStore, source: int | str | Int[np.ndarray, "rows"], rows: Int[np.ndarray, "rows"], length: int
) -> Batch:
    """Rows of a source's stream of pairs: row r holds pairs r * length to (r + 1) * length.

    Args:
      store: the corpus.
      source: name or index of the source, or an index for each row.
      rows: any rows in any order.
      length: pairs in a row.

    Returns:
      `inputs, targets, segment_ids, positions` (int32) and `loss_weights` (float32), each `[rows, length]`.
      Only the last row of a source has padding: zeros throughout.
    """
    begin, end, first, last = _spans(store, source, rows, length)
    pair_starts = store.pair_starts

    # Documents first + 1 to last begin inside the row.
    inside = last - first
    row_of = np.repeat(np.arange(len(begin)), inside)
    nth = np.arange(len(row_of)) - np.repeat(np.cumsum(inside) - inside, inside)
    column_of = pair_starts[first[row_of] + 1 + nth] - begin[row_of]
    columns = np.arange(length, dtype=np.int32)
    starts = np.zeros((len(begin), length), dtype=np.int32)
    starts[row_of, column_of] = 1
    segment = np.cumsum(starts, axis=1, dtype=np.int32)
    starts[row_of, column_of] = column_of
    positions = columns - np.maximum.accumulate(starts, axis=1)

    # Each document has one token more than pairs, so pair q of document d is the tokens q + d and q + d + 1.
    at = (begin + first)[:, None] + columns + segment
    padding = columns >= (end - begin)[:, None]
    padded = padding.any()
    if padded:
        at[padding] = 0
    batch = {
        "inputs": store.tokens[at].astype(np.int32),
        "targets": store.tokens[at + 1].astype(np.int32),
        "loss_weights": np.ones((len(begin), length), dtype=np.float32),
        "segment_ids": segment + 1,
        "positions": positions,
    }
    if padded:
        for array in batch.values():
            array[padding] = 0
    return batch


class Piece(NamedTuple):
    """Pairs `start` to `stop` of an example."""

    example: int
    start: int
    stop: int


Plan = list[list[Piece]]


def row_plan(
    store: TokenStore, source: int | str | Int[np.ndarray, "rows"], rows: Int[np.ndarray, "rows"], length: int
) -> Plan:
    """What the rows of `read_rows` are made of: the pieces' examples are documents of the store, by index."""
    plan: Plan = []
    for begin, end, first, last in zip(*_spans(store, source, rows, length)):
        bounds = np.concatenate([[begin], store.pair_starts[first + 1 : last + 1], [end]])
        plan.append(
            [
                Piece(d, int(start - store.pair_starts[d]), int(stop - store.pair_starts[d]))
                for d, start, stop in zip(range(first, last + 1), bounds, bounds[1:])
            ]
        )
    return plan


def pack_best_fit_decreasing(lengths: Sequence[int], length: int) -> Plan:
    """Packs examples whole, longest first, each into the fullest row that still has room.

    Longer examples lose their end; empty ones are dropped; equal ones keep their order. Best fit decreasing
    needs at most 11/9 of the rows of an optimal packing, and 4 more (Johnson et al. 1974).
    """
    pieces = [Piece(i, 0, min(n, length)) for i, n in enumerate(map(int, lengths)) if n > 0]
    return _best_fit(pieces, length)


def pack_split(lengths: Sequence[int], length: int) -> Plan:
    """`pack_best_fit_decreasing` after longer examples were cut into pieces of `length`; no pair is lost."""
    pieces = [
        Piece(i, start, min(start + length, n))
        for i, n in enumerate(map(int, lengths))
        for start in range(0, n, length)
    ]
    return _best_fit(pieces, length)


def pack_wrapped(lengths: Sequence[int], length: int) -> Plan:
    """Joins the examples in order and cuts every `length` pairs: no padding but at the end, cuts anywhere."""
    plan: Plan = []
    room = 0
    for i, n in enumerate(map(int, lengths)):
        start = 0
        while start < n:
            if not room:
                plan.append([])
                room = length
            stop = min(n, start + room)
            plan[-1].append(Piece(i, start, stop))
            room -= stop - start
            start = stop
    return plan


def shift(tokens: Int[np.ndarray, "n"], loss_weights: Float[np.ndarray, "n"] | None = None) -> Batch:
    """An example of n - 1 pairs from n tokens; `loss_weights[t]` weighs token t as a target (default 1)."""
    tokens = np.asarray(tokens, dtype=np.int32)
    weights = np.ones(len(tokens)) if loss_weights is None else np.asarray(loss_weights)
    if weights.shape != tokens.shape:
        raise DataError(f"an example has {len(tokens)} tokens but {len(weights)} loss weights")
    return {"inputs": tokens[:-1], "targets": tokens[1:], "loss_weights": weights[1:].astype(np.float32)}


def fill_rows(examples: Sequence[Mapping[str, np.ndarray]], plan: Plan, length: int) -> Batch:
    """The rows of a plan as arrays `[len(plan), length]`.

    Args:
      examples: each a dict of arrays of equal length, as `shift` makes them; more arrays (a score per pair,
        say) are cut and packed alike.
      plan: from one of the packers, or part of one.
      length: of the rows; zeros fill what is left.

    Returns the examples' arrays, with `segment_ids` and `positions` (from 0 in each piece).
    """
    names = {name: np.asarray(value).dtype for name, value in examples[0].items()}
    batch = {name: np.zeros((len(plan), length), dtype=dtype) for name, dtype in names.items()}
    batch["segment_ids"] = np.zeros((len(plan), length), dtype=np.int32)
    batch["positions"] = np.zeros((len(plan), length), dtype=np.int32)
    for r, row in enumerate(plan):
        column = 0
        for segment, (i, start, stop) in enumerate(row, 1):
            end = column + stop - start
            if end > length:
                raise DataError(f"row {r} of the plan holds more than {length} pairs")
            for name in names:
                batch[name][r, column:end] = examples[i][name][start:stop]
            batch["segment_ids"][r, column:end] = segment
            batch["positions"][r, column:end] = np.arange(stop - start)
            column = end
    return batch


def _spans(
    store: TokenStore, source: int | str | np.ndarray, rows: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each row: its first pair and the one after its last, counted over the store; its first and last document."""
    rows = np.asarray(rows, dtype=np.int64)
    sources = np.broadcast_to(store.source_index(source) if isinstance(source, str) else source, rows.shape)
    limits = count_rows(store, length)[sources]
    if ((rows < 0) | (rows >= limits)).any():
        row = int(np.flatnonzero((rows < 0) | (rows >= limits))[0])
        name = store.source_names[sources[row]]
        raise DataError(f"no row {rows[row]} in source '{name}': it has {limits[row]} of length {length}")
    pair_starts = store.pair_starts
    begin = pair_starts[store.document_starts[sources]] + rows * length
    end = np.minimum(begin + length, pair_starts[store.document_starts[sources + 1]])
    first = np.searchsorted(pair_starts, begin, side="right") - 1
    last = np.searchsorted(pair_starts, end, side="left") - 1
    return begin, end, first, last


def _best_fit(pieces: list[Piece], length: int) -> Plan:
    plan: Plan = []
    # Open rows by the room they have left, first come first served, and a bit for each room that occurs: the
    # lowest bit at or above a size is the best fit.
    by_room: dict[int, deque[int]] = {}
    rooms = 0
    for piece in sorted(pieces, key=lambda p: p.start - p.stop):
        size = piece.stop - piece.start
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].popleft()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = length, len(plan)
            plan.append([])
        plan[row].append(piece)
        if left := room - size:
            by_room.setdefault(left, deque()).append(row)
            rooms |= 1 << left
    return plan
