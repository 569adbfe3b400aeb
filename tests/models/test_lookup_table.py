import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import DataError
from jaxlm.models.lookup_table import LookupTable

ROWS = np.random.default_rng(0).integers(0, 40, (5000, 8)).astype(np.int32)


def test_known_rows_are_answered_and_others_are_not():
    table = LookupTable(7)
    answers = np.random.default_rng(1).normal(size=(5000, 7)).astype(np.float32)
    params = table.memorize(ROWS, answers)
    order = np.random.default_rng(2).permutation(5000)
    np.testing.assert_array_equal(table.logits(params, jnp.asarray(ROWS[order])), answers[order])
    assert not np.any(table.logits(params, jnp.asarray(ROWS[:3, ::-1])))


def test_of_equal_rows_the_first_counts():
    table = LookupTable(2)
    rows, answers = ROWS[[4, 9, 4]], np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    params = table.memorize(rows, answers)
    np.testing.assert_array_equal(table.logits(params, jnp.asarray(rows)), answers[[0, 1, 0]])


def test_features_are_codes_of_whole_rows():
    table = LookupTable(7, num_features=400)
    codes = np.asarray(table.features(jnp.asarray(ROWS[:20])))
    np.testing.assert_array_equal(codes[3], table.features(jnp.asarray(ROWS[3:4]))[0])
    near = ROWS[:20].copy()
    near[:, 0] += 1  # rows that differ in one word are as far apart as any
    other = np.asarray(table.features(jnp.asarray(near)))
    assert np.abs((codes * other).mean(1)).max() < 0.25
    assert codes.std() == pytest.approx(1, abs=0.05)


def test_what_cannot_be_memorized_is_refused(monkeypatch):
    with pytest.raises(DataError, match="log_probs of shape"):
        LookupTable(7).memorize(ROWS, np.zeros((10, 7)))
    monkeypatch.setattr(LookupTable, "hash", lambda self, rows: jnp.zeros(len(rows), jnp.uint32))
    with pytest.raises(DataError, match="choose another salt"):
        LookupTable(7).memorize(ROWS[:2], np.zeros((2, 7)))
