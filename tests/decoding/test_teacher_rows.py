"""Rows that a teacher writes: drawn from its distribution, the same however they are made, kept on disk."""

import jax
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.decoding import DecoderStepper, sample_rows
from jaxlm.testing import tiny_decoder

MODEL, PARAMS = tiny_decoder("llama", num_layers=1)
STEPPER = DecoderStepper(MODEL)


def rows(count=5, length=6, **changes):
    return sample_rows(STEPPER, PARAMS, count, length, **{"start_id": 7, "batch_size": 4, **changes}).arrays


def test_rows_begin_with_the_start_and_predict_what_follows():
    found = rows()
    assert found["inputs"].shape == found["targets"].shape == (5, 6)
    assert (found["inputs"][:, 0] == 7).all()
    np.testing.assert_array_equal(found["inputs"][:, 1:], found["targets"][:, :-1])
    assert (found["loss_weights"] == 1).all()
    assert len({tuple(row) for row in np.asarray(found["targets"]).tolist()}) == 5


def test_a_row_depends_on_seed_and_number_alone():
    expected = np.asarray(rows()["targets"])
    np.testing.assert_array_equal(rows(count=3, batch_size=8)["targets"], expected[:3])
    assert (np.asarray(rows(seed=1)["targets"]) != expected).any(axis=1).all()


def test_first_tokens_have_the_teachers_probabilities():
    found = np.asarray(rows(count=4096, length=1, batch_size=4096)["targets"])[:, 0]
    probs = np.asarray(jax.nn.softmax(MODEL.apply({"params": PARAMS}, np.array([[7]], np.int32))[0, 0]))
    frequencies = np.bincount(found, minlength=64) / len(found)
    assert np.abs(frequencies - probs).max() < 5 * np.sqrt(probs.max() / len(found))
    assert 0.5 * np.abs(frequencies - probs).sum() < 0.1


def test_what_follows_a_stop_has_no_weight():
    found = rows(count=64, batch_size=64, stop_ids=tuple(range(32)))
    targets, weights = np.asarray(found["targets"]), np.asarray(found["loss_weights"])
    assert 0 < weights.sum() < weights.size
    for row, counted in zip(targets, weights):
        stops = np.flatnonzero(row[counted > 0] < 32)
        assert (stops == counted.sum() - 1).all()
        assert (np.diff(counted) <= 0).all()


def test_kept_batches_are_not_written_again(tmp_path, monkeypatch):
    expected = rows(folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows-00000000.npz", "rows-00000004.npz"]
    (tmp_path / "rows-00000000.npz").unlink()  # as after a kill, whichever batch was lost
    np.testing.assert_array_equal(rows(folder=tmp_path)["targets"], expected["targets"])
    monkeypatch.setattr("jaxlm.decoding.teacher_rows.generate", None)
    np.testing.assert_array_equal(rows(folder=tmp_path)["targets"], expected["targets"])
    with pytest.raises(DataError, match="other settings"):
        rows(folder=tmp_path, seed=3)
    (tmp_path / "rows-00000004.npz").write_bytes(b"PK\3\4")
    with pytest.raises(DataError, match="rows-00000004.npz cannot be read"):
        rows(folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 0}, "count is 0"),
        ({"length": 0}, "length is 0"),
        ({"start_id": 64}, "start_id has 64"),
        ({"stop_ids": (-1,)}, "stop_ids has -1"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_cannot_be_written_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        rows(**changes)
