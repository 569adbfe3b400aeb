"""Batches are a function of the step: across processes, saves, re-weightings, epochs, and workers."""

import itertools
import json
import multiprocessing
import threading

import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.mixture import Schedule
from jaxlm.data.packing import Piece, count_rows, fill_rows, read_rows, shift
from jaxlm.data.pipeline import BatchSource, eval_batches, make_train_iterator
from jaxlm.data.sources import Document
from jaxlm.data.store import build_store
from jaxlm.testing.tokenizers import GreedyTokenizer

LENGTH, BATCH = 16, 8


def documents(name, count, words):
    return [Document(f"{name} the end {i} " * (1 + i % words), f"{name}{i}") for i in range(count)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    sources = {
        "text": documents("ab", 40, 3),
        "code": documents("é\n    x", 25, 9),
        "tiny": documents("z", 2, 1),
    }
    folder = tmp_path_factory.mktemp("store") / "s"
    return build_store(folder, sources, GreedyTokenizer(), seed=1, progress=False)


def iterator(store, **options):
    options = {"batch_size": BATCH, "length": LENGTH, "seed": 5, "weights": [5, 3, 0], **options}
    return make_train_iterator(store, **options)


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert set(a) == set(b)
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key])


def joined(parts):
    """The global batches, from the parts of each process."""
    return [{key: np.concatenate([b[key] for b in step]) for key in step[0]} for step in zip(*parts)]


def per_process(store, count, steps, **options):
    return [
        take(iterator(store, process_index=p, process_count=count, **options), steps) for p in range(count)
    ]


@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_processes(store, count):
    whole = take(iterator(store), 12)
    assert whole[0]["inputs"].shape == (BATCH, LENGTH)
    assert_same(joined(per_process(store, count, 12)), whole)


@pytest.mark.parametrize("at", [0, 1, 17])
def test_restored_iterators_go_on_with_the_same_batches(store, at):
    whole = take(iterator(store), at + 50)
    saved = iterator(store)
    take(saved, at)
    state = json.loads(json.dumps(saved.get_state()))
    fresh = iterator(store)
    fresh.set_state(state)
    assert fresh.next_step == at
    assert_same(take(fresh, 50), whole[at:])
    # Going back works on an iterator in use, too.
    fresh.set_state(state)
    assert_same(take(fresh, 3), whole[at : at + 3])


def test_resumed_on_another_process_count_after_a_reweighting(store):
    steps, changed, killed = 40, 11, 19
    first = iterator(store)
    whole = take(first, 7)
    first.reweight(changed, [0, 1, 4])
    whole += take(first, killed - 7)
    state = json.loads(json.dumps(first.get_state()))
    whole += take(first, steps - killed)
    for count in (2, 4):
        parts = []
        for p in range(count):
            resumed = iterator(store, process_index=p, process_count=count)
            resumed.set_state(state)
            parts.append(take(resumed, steps - killed))
        assert_same(joined(parts), whole[killed:])
    # And the change did what it says: rows come from the sources in the new proportion from its step on.
    source, _, _ = first.source.rows(np.arange(steps * BATCH))
    before, after = np.split(source, [changed * BATCH])
    assert np.abs(np.bincount(before, minlength=3) - len(before) * np.array([5, 3, 0]) / 8).max() <= 3
    assert np.abs(np.bincount(after, minlength=3) - len(after) * np.array([0, 1, 4]) / 5).max() <= 3


def test_reweighting_drops_what_was_read_ahead(store):
    changed = iterator(store, buffer=4)
    take(changed, 3)
    changed.reweight(3, [0, 1, 0])
    batch = take(changed, 1)[0]
    first, last = store.offsets[store.document_starts[1:3]]
    assert set(np.unique(batch["inputs"])) <= {0, *np.unique(store.tokens[first:last])}
    planned, _, _ = changed.source.rows(np.arange(3 * BATCH, 4 * BATCH))
    assert (planned == 1).all()
    with pytest.raises(ConfigError, match="at step 2, but steps up to 3 are out"):
        changed.reweight(2, [1, 1, 1])
    with pytest.raises(ConfigError, match="mixture weight of 'tiny' is -1"):
        changed.reweight(9, [1, 1, -1])
    changed.reweight(9, [1, 1, 1])
    with pytest.raises(ConfigError, match="step 5 after one at step 9"):
        changed.reweight(5, [1, 1, 1])
    assert_same(take(changed, 2), [changed.source[4], changed.source[5]])


def test_an_epoch_holds_every_row_once_and_the_next_has_another_order(store):
    source = iterator(store, weights=None).source
    totals = count_rows(store, LENGTH)
    assert 10 < totals.sum() < 2000
    owner, row, epoch = source.rows(np.arange(8 * totals.sum()))
    for s, total in enumerate(totals):
        orders = [row[(owner == s) & (epoch == e)] for e in range(3)]
        for order in orders:
            np.testing.assert_array_equal(np.sort(order), np.arange(total))
        if total > 5:
            assert (orders[0] != orders[1]).any()
            assert (orders[1] != orders[2]).any()
            assert (orders[0] != np.arange(total)).any()
    other = iterator(store, weights=None, seed=6).source
    assert (other.rows(np.arange(totals.sum()))[1] != row[: totals.sum()]).any()


def test_every_token_is_predicted_once_per_epoch(store):
    only = iterator(store, weights=[1, 0, 0], batch_size=1)
    total = int(count_rows(store, LENGTH)[0])
    rows = take(only, total)
    predicted = np.concatenate([b["targets"][b["loss_weights"] > 0] for b in rows])
    expected = np.concatenate([store.document(d)[1:] for d in range(*store.document_starts[:2])])
    np.testing.assert_array_equal(np.sort(predicted), np.sort(expected))


def test_token_and_document_shares(store):
    for unit, tolerance in (("tokens", 0.02), ("documents", 0.02)):
        source = iterator(store, weights=[1, 3, 0], unit=unit).source
        drawn = np.bincount(source.rows(np.arange(4000))[0], minlength=3) * LENGTH
        seen = drawn if unit == "tokens" else drawn / (store.source_pairs / store.source_documents)
        np.testing.assert_allclose(seen / seen.sum(), [0.25, 0.75, 0], atol=tolerance)


def test_token_shares_are_exact_to_a_document(store):
    """After n rows each source has given its share to within a row or two, whatever its documents."""
    source = iterator(store, weights=[0.2, 0.5, 0.3]).source
    owner, _, _ = source.rows(np.arange(997))
    for n in range(1, 997, 13):
        given = np.bincount(owner[:n], minlength=3)
        assert np.abs(given - n * np.array([0.2, 0.5, 0.3])).max() < 3


@pytest.mark.slow  # starts two Python processes
def test_workers_give_the_same_batches(store):
    with_workers = iterator(store, workers=2)
    with_workers.set_state({**with_workers.get_state(), "next_step": 3})
    assert_same(take(with_workers, 6), take(iterator(store), 9)[3:])
    assert with_workers.get_state()["next_step"] == 9
    with_workers.close()


@pytest.mark.parametrize("buffer", [0, 2])
def test_a_hanging_read_is_named_with_its_sources(store, buffer, monkeypatch):
    over = threading.Event()
    original = BatchSource.__getitem__

    def hangs(self, step):
        if step == 2:
            over.wait(60)
        return original(self, step)

    monkeypatch.setattr(BatchSource, "__getitem__", hangs)
    batches = iterator(store, buffer=buffer)
    take(batches, 2)
    batches._reader.timeout = 0.2
    with pytest.raises(DataError, match="batch of step 3 from 'text', 'code' in .*: nothing came within 0.2 s"):
        next(batches)
    batches.close()  # does not wait for the read that hangs
    over.set()
    batches._reader.timeout = 60.0
    assert_same(take(batches, 1), [original(batches.source, 2)])


def test_a_failing_read_is_named_with_its_sources(store, monkeypatch):
    def fails(self, step):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(BatchSource, "__getitem__", fails)
    with pytest.raises(DataError, match="batch of step 1 from 'text', 'code' in .*failed: OSError.*output error"):
        next(iterator(store))


@pytest.mark.slow  # starts a Python process
def test_a_reading_process_that_dies_is_named_with_its_sources(store):
    batches = iterator(store, workers=1)
    take(batches, 1)
    (worker,) = [p for p in multiprocessing.active_children() if "grain" in p.name]
    worker.kill()
    with pytest.raises(DataError, match="from 'text', 'code' in .*reading failed: .*terminated unexpectedly"):
        take(batches, 50)
    batches.close()


def test_provenance_is_enough_to_make_a_batch_again(store):
    batches = iterator(store)
    batches.reweight(2, [1, 1, 1])
    for step in (0, 1, 2, 9):
        told = json.loads(json.dumps(batches.provenance(step)))
        examples = [shift(store.document(d)) for d in range(len(store.byte_counts))]
        plan = [[Piece(*piece) for piece in row["pieces"]] for row in told["rows"]]
        assert_same([fill_rows(examples, plan, LENGTH)], [{**batches.source[step]}])
        weights = batches.source[step]["loss_weights"].sum(axis=1)
        assert [row["weight"] for row in told["rows"]] == weights.tolist()
        for row in told["rows"]:
            first, last = store.document_starts[store.source_index(row["source"]) :][:2]
            assert all(first <= d < last for d, _, _ in row["pieces"])
        assert list(told["mixture"].values()) == ([5, 3, 0] if step < 2 else [1, 1, 1])
        parts = [iterator(store, process_index=p, process_count=2).provenance(step)["rows"] for p in range(2)]
        assert parts[0] == parts[1]


def test_other_data_is_refused_on_restore(store, tmp_path):
    state = iterator(store).get_state()
    sources = {"text": documents("ab", 41, 3), "code": documents("x", 25, 9), "tiny": documents("z", 2, 1)}
    other = build_store(tmp_path / "s", sources, GreedyTokenizer(), seed=1, progress=False)
    for changed, message in (
        (iterator(other), r"fingerprint: '\w+' -> '\w+'$"),
        (iterator(store, batch_size=4), r"batch_size: 8 -> 4"),
        (iterator(store, length=32), r"length: 16 -> 32"),
        (iterator(store, seed=0), r"seed: 5 -> 0"),
        (iterator(store, unit="documents"), r"unit: 'tokens' -> 'documents'"),
    ):
        with pytest.raises(DataError, match=message):
            changed.set_state(state)
    with pytest.raises(DataError, match="fingerprint: None ->"):
        iterator(store).set_state({"next_step": 3})


def test_the_restored_schedule_replaces_the_configured_weights(store):
    changed = iterator(store, weights=[1, 1, 1])
    changed.set_state({**iterator(store).get_state(), "next_step": 4})
    assert_same(take(changed, 2), take(iterator(store), 6)[4:])


def test_bad_settings_are_named(store):
    with pytest.raises(ConfigError, match="mixture weight of 'code' is -0.1, expected >= 0"):
        iterator(store, weights=[1, -0.1, 1])
    with pytest.raises(ConfigError, match="2 mixture weights for 3 sources"):
        iterator(store, weights=[1, 1])
    with pytest.raises(ConfigError, match="batch size 8 is not a multiple of the 3 processes"):
        iterator(store, process_count=3)
    with pytest.raises(ConfigError, match="process 2 of 2"):
        iterator(store, process_index=2, process_count=2)
    with pytest.raises(ConfigError, match="'words', expected 'tokens' or 'documents'"):
        iterator(store, unit="words")
    with pytest.raises(ConfigError, match="sequence length is 0"):
        iterator(store, length=0)
    with pytest.raises(ConfigError, match="for the sources a, but the store has text, code, tiny"):
        BatchSource(store, Schedule(["a"], [(0, [1])]), batch_size=1, length=1, seed=0)


# Evaluation


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_sees_every_pair_once_in_order(store, count):
    for source in range(3):
        parts = [
            list(
                eval_batches(store, source, batch_size=4, length=LENGTH, process_index=p, process_count=count)
            )
            for p in range(count)
        ]
        batches = joined(parts)
        assert all(b["inputs"].shape == (4, LENGTH) for b in batches)
        rows = int(count_rows(store, LENGTH)[source])
        expected = read_rows(store, source, np.arange(rows), LENGTH)
        for key, array in expected.items():
            seen = np.concatenate([b[key] for b in batches])
            assert seen.dtype == array.dtype
            np.testing.assert_array_equal(seen[:rows], array)
            assert not seen[rows:].any()


def test_evaluation_is_limited_and_named(store):
    limited = list(eval_batches(store, "code", batch_size=2, length=8, max_batches=3))
    whole = list(eval_batches(store, "code", batch_size=2, length=8))
    assert len(whole) > 3
    assert_same(limited, whole[:3])
    with pytest.raises(DataError, match="did you mean 'code'"):
        eval_batches(store, "cod", batch_size=2, length=8)


class CountedReads:
    """Stands for a store's tokens; counts the bytes that are read of them."""

    def __init__(self, tokens):
        self.tokens, self.bytes = tokens, 0

    def __getitem__(self, at):
        found = self.tokens[at]
        self.bytes += found.nbytes
        return found


@pytest.mark.parametrize("count", [2, 4, 8])
def test_each_process_reads_its_share_of_the_bytes(store, count, monkeypatch):
    def bytes_read(process, of):
        counted = CountedReads(store.tokens)
        with monkeypatch.context() as patch:
            patch.setattr(store, "tokens", counted)
            take(iterator(store, process_index=process, process_count=of, buffer=0), 3)
        return counted.bytes

    whole = bytes_read(0, 1)
    assert whole >= 3 * BATCH * LENGTH * store.tokens.itemsize
    assert [bytes_read(process, count) for process in range(count)] == [whole // count] * count
