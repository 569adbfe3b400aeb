import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.data.packing import read_rows, shift
from jaxlm.data.resident import (
    ResidentRows,
    from_start,
    join_rows,
    mix_rows,
    resident_examples,
    resident_rows,
    switch_samples,
)
from jaxlm.data.sources import Document
from jaxlm.data.store import build_store
from jaxlm.data.tokenizers import ByteTokenizer

ROWS = ResidentRows({"x": jnp.arange(10), "y": jnp.arange(20).reshape(10, 2)})


def test_every_row_comes_once_an_epoch_in_the_keys_own_order():
    def epoch(seed, first):
        batches = [ROWS.sample(jax.random.key(seed), jnp.int32(first + i), 3) for i in range(3)]
        assert all((b["y"][:, 0] == 2 * b["x"]).all() for b in batches)
        return np.concatenate([b["x"] for b in batches]).tolist()

    orders = [epoch(0, 0), epoch(0, 3), epoch(1, 0)]
    assert all(len(set(order)) == 9 for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]
    assert epoch(0, 0) == orders[0]
    with pytest.raises(ConfigError, match="a batch of 11 rows of 10"):
        ROWS.sample(jax.random.key(0), jnp.int32(0), 11)


def test_parts_are_disjoint_and_spread():
    many = ResidentRows({"x": jnp.arange(1000)})
    first, second = (np.asarray(part.arrays["x"]) for part in many.cut(0.3, 0.5))
    assert not set(first) & set(second)
    assert (len(first), len(second)) == (pytest.approx(300, abs=3), pytest.approx(500, abs=3))
    assert max(np.diff(first)) < 10
    with pytest.raises(ConfigError, match="add up to 1"):
        many.cut(0.7, 0.5)
    with pytest.raises(DataError, match="too few"):
        ResidentRows({"x": jnp.arange(1)}).cut(0.5, 0.5)


def test_rows_are_those_of_the_store(tmp_path):
    documents = [Document(f"file {i} " * 5, str(i)) for i in range(8)]
    store = build_store(tmp_path / "store", {"notes": documents}, ByteTokenizer(), seed=0)
    rows = resident_rows(store, 16, max_rows=3, columns=("inputs", "targets", "loss_weights"))
    assert rows.count == 3
    assert set(rows.arrays) == {"inputs", "targets", "loss_weights"}
    for name, x in read_rows(store, 0, np.arange(3), 16).items():
        if name in rows.arrays:
            np.testing.assert_array_equal(rows.arrays[name], x)


def test_spread_rows_are_of_all_documents(tmp_path):
    store = build_store(tmp_path / "store", {"notes": [Document("x" * 40, str(i)) for i in range(8)]}, ByteTokenizer(),
                        seed=0)  # fmt: skip
    found = resident_rows(store, 16, max_rows=5, spread=True)
    for name, x in read_rows(store, 0, np.array([0, 4, 8, 12, 16]), 16).items():  # of 21 rows
        np.testing.assert_array_equal(found.arrays[name], x)
    assert resident_rows(store, 16, max_rows=50, spread=True).count == 21
    assert np.asarray(ROWS.spread(4).arrays["x"]).tolist() == [0, 2, 5, 7]
    with pytest.raises(DataError, match="11 rows are wanted of 10"):
        ROWS.spread(11)


def test_rows_of_one_document_become_texts_with_a_start(tmp_path):
    store = build_store(tmp_path / "store", {"notes": [Document("abcdefghi" * 4, str(i)) for i in range(4)]},
                        ByteTokenizer(), seed=0)  # fmt: skip
    rows = resident_rows(store, 8)
    found = from_start(rows, 256)
    whole = (np.asarray(rows.arrays["segment_ids"]) == 1).all(axis=1)
    assert 0 < found.count == whole.sum() < rows.count
    np.testing.assert_array_equal(found.arrays["targets"], rows.arrays["inputs"][whole])
    np.testing.assert_array_equal(found.arrays["inputs"][:, 1:], found.arrays["targets"][:, :-1])
    assert (found.arrays["inputs"][:, 0] == 256).all()
    with pytest.raises(DataError, match="none of 3 rows of 64 tokens"):
        from_start(resident_rows(store, 64), 256)


def test_mixed_batches_have_their_shares_and_every_row_comes_once_an_epoch():
    parts = [ResidentRows({"x": jnp.arange(8)}), ResidentRows({"x": 100 + jnp.arange(4)})]
    sample = jax.jit(mix_rows(parts, (4, 2)))
    batches = [np.asarray(sample(jax.random.key(0), jnp.int32(i))["x"]) for i in range(2)]
    assert all((batch >= 100).sum() == 2 for batch in batches)
    assert sorted(np.concatenate(batches).tolist()) == [*range(8), 100, 101, 102, 103]
    assert mix_rows(parts, (4, 0))(jax.random.key(0), jnp.int32(0))["x"].shape == (4,)
    for counts in ((4,), (4, -1), (0, 0)):
        with pytest.raises(ConfigError, match="one >= 0 each, not all 0"):
            mix_rows(parts, counts)


def test_stages_follow_each_other():
    low, high = (mix_rows([ResidentRows({"x": start + jnp.arange(8)})], (2,)) for start in (0, 100))
    sample = jax.jit(switch_samples([(0, low), (3, high)]))
    found = [int(sample(jax.random.key(0), jnp.int32(i))["x"].min()) >= 100 for i in range(5)]
    assert found == [False, False, False, True, True]
    for stages in ([(1, low)], [(0, low), (0, high)], []):
        with pytest.raises(ConfigError, match="0 first and then later ones"):
            switch_samples(stages)


def test_examples_have_rows_of_their_own_or_share_them():
    examples = [shift(np.arange(n + 1) + 1) for n in (3, 6, 2)]
    alone, packed = (resident_examples(examples, 6, pack=pack) for pack in (False, True))
    assert (alone.count, packed.count) == (3, 2)
    assert alone.arrays["inputs"][0].tolist() == [1, 2, 3, 0, 0, 0]
    assert np.asarray(alone.arrays["segment_ids"]).sum() == 11
    assert float(alone.arrays["loss_weights"].sum()) == float(packed.arrays["loss_weights"].sum()) == 11
    with pytest.raises(DataError, match="example 1 has 6 pairs, but rows hold 5"):
        resident_examples(examples, 5)
    with pytest.raises(DataError, match="no examples"):
        resident_examples([], 5)


def test_joined_rows_are_the_union():
    both = join_rows([ROWS, ROWS])
    assert both.arrays["x"].tolist() == [*range(10), *range(10)]
    with pytest.raises(DataError, match="rows 1 have arrays"):
        join_rows([ROWS, ResidentRows({"x": jnp.arange(3)})])
    with pytest.raises(DataError, match="no rows"):
        join_rows([])
