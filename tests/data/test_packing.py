"""Rows against a plain loop, against Grain's packers, and against the published example."""

import grain
import numpy as np
import pytest
from grain.experimental import BestFitPackIterDataset, ConcatThenSplitIterDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.packing import (
    Piece,
    count_rows,
    fill_rows,
    pack_best_fit_decreasing,
    pack_split,
    pack_wrapped,
    read_rows,
    shift,
)
from jaxlm.data.sources import Document
from jaxlm.data.store import build_store
from jaxlm.data.tokenizers import ByteTokenizer
from jaxlm.testing.tokenizers import GreedyTokenizer


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    sources = {
        name: [Document("abc"[i % 3] * int(n), f"{name}{i}") for i, n in enumerate(sizes)]
        for name, sizes in {
            "short": rng.integers(0, 6, 50),
            "long": rng.integers(0, 90, 20),
            "one": [3],
            "exact": [15, 15],  # 16 pairs each with BOS and EOS
        }.items()
    }
    folder = tmp_path_factory.mktemp("store") / "s"
    return build_store(folder, sources, ByteTokenizer(), seed=1, progress=False)


def expected_rows(store, source, length):
    """The same by a loop over documents and pairs."""
    pairs = []
    for d in range(*store.document_starts[source : source + 2]):
        ids = store.document(d).tolist()
        pairs += [(d, a, b) for a, b in zip(ids, ids[1:])]
    rows = []
    for start in range(0, len(pairs), length):
        row, segment, previous = [], 0, None
        for d, a, b in pairs[start : start + length]:
            if d != previous:
                segment, position, previous = segment + 1, 0, d
            row.append((a, b, 1.0, segment, position))
            position += 1
        rows.append(row + [(0, 0, 0.0, 0, 0)] * (length - len(row)))
    return np.array(rows).transpose(2, 0, 1)


KEYS = ("inputs", "targets", "loss_weights", "segment_ids", "positions")


@pytest.mark.parametrize("length", [1, 2, 7, 8, 16, 33, 1000])
def test_rows_equal_a_plain_loop(store, length):
    for source in range(4):
        expected = expected_rows(store, source, length)
        assert count_rows(store, length)[source] == expected.shape[1]
        batch = read_rows(store, source, np.arange(expected.shape[1]), length)
        assert set(batch) == set(KEYS)
        for key, array in zip(KEYS, expected):
            assert batch[key].dtype == (np.float32 if key == "loss_weights" else np.int32)
            np.testing.assert_array_equal(batch[key], array, err_msg=key)


def test_any_rows_of_any_sources_in_any_order(store):
    rng = np.random.default_rng(1)
    counts = count_rows(store, 8)
    sources = rng.integers(0, 4, 200)
    rows = rng.integers(0, counts[sources])
    batch = read_rows(store, sources, rows, 8)
    for i, (source, row) in enumerate(zip(sources, rows)):
        single = read_rows(store, store.source_names[source], np.array([row]), 8)
        for key in KEYS:
            np.testing.assert_array_equal(batch[key][i], single[key][0])
    assert read_rows(store, 0, np.array([], int), 8)["inputs"].shape == (0, 8)


def test_rows_equal_grain_s_concat_then_split(store):
    for source in range(4):
        documents = [store.document(d) for d in range(*store.document_starts[source : source + 2])]
        elements = [shift(d) for d in documents]
        packed = ConcatThenSplitIterDataset(
            grain.MapDataset.source(elements).to_iter_dataset(),
            length_struct={"inputs": 8, "targets": 8, "loss_weights": 8},
        )
        rows = list(packed)
        ours = read_rows(store, source, np.arange(len(rows)), 8)
        assert len(rows) == count_rows(store, 8)[source]
        for i, row in enumerate(rows):
            for theirs, key in {
                "inputs": "inputs",
                "targets": "targets",
                "loss_weights": "loss_weights",
                "inputs_segment_ids": "segment_ids",
                "inputs_positions": "positions",
            }.items():
                np.testing.assert_array_equal(ours[key][i], row[theirs], err_msg=theirs)


def test_every_token_is_predicted_exactly_once(store):
    for source in range(4):
        for length in (3, 16):
            batch = read_rows(store, source, np.arange(count_rows(store, length)[source]), length)
            predicted = batch["targets"][batch["loss_weights"] > 0]
            documents = range(*store.document_starts[source : source + 2])
            expected = np.concatenate([store.document(d)[1:] for d in documents])
            np.testing.assert_array_equal(predicted, expected)
            assert batch["loss_weights"].sum() == store.source_pairs[source]


def test_rows_that_do_not_exist(store):
    with pytest.raises(DataError, match="no row 4 in source 'exact': it has 4 of length 8"):
        read_rows(store, "exact", np.array([0, 4]), 8)
    with pytest.raises(DataError, match="no row -1"):
        read_rows(store, 0, np.array([-1]), 8)
    with pytest.raises(ConfigError, match="sequence length is 0"):
        read_rows(store, 0, np.array([0]), 0)


# Plans


def ids(plan, examples):
    return [[examples[p.example][t] for p in row for t in range(p.start, p.stop)] for row in plan]


def test_published_example():
    """TRL's documented example of its strategies `bfd` and `bfd_split` (huggingface/trl, data_utils)."""
    examples = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11]]
    lengths = [5, 2, 3, 1]
    whole = pack_best_fit_decreasing(lengths, 4)
    assert ids(whole, examples) == [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7]]
    assert [[p.stop - p.start for p in row] for row in whole] == [[4], [3, 1], [2]]
    split = pack_split(lengths, 4)
    assert ids(split, examples) == [[1, 2, 3, 4], [8, 9, 10, 5], [6, 7, 11]]
    assert [[p.stop - p.start for p in row] for row in split] == [[4], [3, 1], [2, 1]]
    assert ids(pack_wrapped(lengths, 4), examples) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]


sizes = st.lists(st.integers(0, 40), max_size=60)


@settings(deadline=None)
@given(lengths=sizes, length=st.integers(1, 20))
def test_plans_hold_every_pair_once(lengths, length):
    for packer in (pack_best_fit_decreasing, pack_split, pack_wrapped):
        plan = packer(lengths, length)
        assert all(0 < sum(p.stop - p.start for p in row) <= length for row in plan)
        held = sorted((p.example, t) for row in plan for p in row for t in range(p.start, p.stop))
        limit = length if packer is pack_best_fit_decreasing else max(lengths, default=0)
        assert held == [(i, t) for i, n in enumerate(lengths) for t in range(min(n, limit))]
    wrapped = pack_wrapped(lengths, length)
    assert len(wrapped) == -(-sum(lengths) // length)


def simple_best_fit(lengths, length):
    """Best fit decreasing by scanning every row; ties go to the row that came to that room first."""
    rows = []
    for clock, i in enumerate(sorted(range(len(lengths)), key=lambda i: -min(lengths[i], length))):
        size = min(lengths[i], length)
        if size == 0:
            continue
        fitting = [row for row in rows if row["room"] >= size]
        row = min(fitting, key=lambda row: (row["room"], row["since"]), default=None)
        if row is None:
            row = {"room": length, "pieces": []}
            rows.append(row)
        row["pieces"].append(Piece(i, 0, size))
        row["room"], row["since"] = row["room"] - size, clock
    return [row["pieces"] for row in rows]


@settings(deadline=None)
@given(lengths=sizes, length=st.integers(1, 20))
def test_best_fit_equals_a_scan_over_rows(lengths, length):
    assert pack_best_fit_decreasing(lengths, length) == simple_best_fit(lengths, length)


def test_best_fit_uses_as_many_rows_as_grain():
    """Grain's best fit is online; given examples in decreasing order and room for all rows, it is ours."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        lengths = rng.integers(1, 17, 80)
        ordered = sorted(lengths, reverse=True)
        elements = [{"inputs": np.full(n, i + 1)} for i, n in enumerate(ordered)]
        theirs = BestFitPackIterDataset(
            grain.MapDataset.source(elements).to_iter_dataset(),
            length_struct={"inputs": 16},
            num_packing_bins=80,
            shuffle_bins=False,
        )
        rows = sorted(tuple(row["inputs"][row["inputs"] > 0]) for row in theirs)
        plan = pack_best_fit_decreasing(ordered, 16)
        assert len(plan) == len(rows)
        filled = sorted(sum(p.stop - p.start for p in row) for row in plan)
        assert filled == sorted(map(len, rows))


def test_fill_rows(store):
    tokens = np.array([5, 6, 7, 8])
    first = {**shift(tokens, np.array([9.0, 0.0, 0.5, 1.0])), "score": np.array([1, 2, 3])}
    second = {**shift(np.array([3, 4])), "score": np.array([4])}
    plan = [[Piece(0, 0, 2), Piece(1, 0, 1)], [Piece(0, 2, 3)]]
    batch = fill_rows([first, second], plan, 4)
    assert {k: v.tolist() for k, v in batch.items()} == {
        "inputs": [[5, 6, 3, 0], [7, 0, 0, 0]],
        "targets": [[6, 7, 4, 0], [8, 0, 0, 0]],
        "loss_weights": [[0.0, 0.5, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]],
        "score": [[1, 2, 4, 0], [3, 0, 0, 0]],
        "segment_ids": [[1, 1, 2, 0], [1, 0, 0, 0]],
        "positions": [[0, 1, 0, 0], [0, 0, 0, 0]],
    }
    assert batch["inputs"].dtype == np.int32
    assert batch["loss_weights"].dtype == np.float32
    with pytest.raises(DataError, match="row 0 of the plan holds more than 2 pairs"):
        fill_rows([first, second], plan, 2)
    with pytest.raises(DataError, match="4 tokens but 3 loss weights"):
        shift(tokens, np.ones(3))


def test_wrapped_examples_equal_rows_of_a_store(tmp_path):
    """The two ways to a batch agree: examples packed in order, and the store's arithmetic."""
    documents = [Document("the end " * n, str(n)) for n in (1, 5, 2, 9, 3)]
    store = build_store(tmp_path / "s", {"a": documents}, GreedyTokenizer(), seed=0, progress=False)
    examples = [shift(store.document(d)) for d in range(5)]
    plan = pack_wrapped([len(e["inputs"]) for e in examples], 12)
    ours = fill_rows(examples, plan, 12)
    rows = read_rows(store, 0, np.arange(len(plan)), 12)
    for key in KEYS:
        np.testing.assert_array_equal(ours[key], rows[key])
