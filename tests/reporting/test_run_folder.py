"""Metrics as a run leaves them: resumed, torn by a kill, or broken."""

import json
import math

import pytest

from jaxlm.core.errors import DataError
from jaxlm.reporting.run_folder import evaluations, read_config, read_metrics, series


def write(folder, *rows, end="\n"):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("\n".join(json.dumps(row) for row in rows) + end)


def test_lines_of_one_step_are_one_row_and_the_last_value_wins(tmp_path):
    write(
        tmp_path,
        {"step": 2, "train/loss": 2.0},
        {"step": 1, "train/loss": 9.0},
        {"step": 2, "eval/a/loss": 3.0},
    )
    write(tmp_path, {"step": 2, "train/loss": 1.5})
    assert read_metrics(tmp_path) == [
        {"step": 1, "train/loss": 9.0},
        {"step": 2, "train/loss": 1.5, "eval/a/loss": 3.0},
    ]


def test_a_resume_discards_what_the_abandoned_attempt_logged_after_it(tmp_path):
    write(tmp_path, *({"step": s, "train/loss": 10.0 + s} for s in range(6)))
    write(tmp_path, {"step": 3, "train/loss": 3.0, "resumed_at": 3})
    assert series(read_metrics(tmp_path), "train/loss") == ([0, 1, 2, 3], [10.0, 11.0, 12.0, 3.0])
    write(tmp_path, {"step": 4, "train/loss": 4.0})
    assert series(read_metrics(tmp_path), "train/loss")[0] == [0, 1, 2, 3, 4]


def test_a_torn_last_line_is_left_out_and_nan_comes_back(tmp_path):
    write(tmp_path, {"step": 1, "train/loss": "NaN"}, end='\n{"step": 2, "train/lo')
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["train/loss"])


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


BROKEN = ('{"step": 1', '{"train/loss": 1}', "[1]", '{"step": 1.5}', '{"step": true}')


@pytest.mark.parametrize("line", [*BROKEN, '{"step": 1, "resumed_at": "1"}', "[" * 9999])
def test_a_broken_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + line + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2"):
        read_metrics(tmp_path)


def test_evaluations_by_source(tmp_path):
    write(
        tmp_path,
        {"step": 0, "train/loss": 1.0, "eval/code/bits_per_byte": 5.0, "eval/web/en/bits_per_byte": 6.0},
        {"step": 9, "eval/code/bits_per_byte": 2.0, "eval/code/loss": 3.0},
    )
    found = evaluations(read_metrics(tmp_path), "bits_per_byte")
    assert found == {"code": ([0, 9], [5.0, 2.0]), "web/en": ([0], [6.0])}


def test_config_of_a_folder_without_one(tmp_path):
    with pytest.raises(DataError, match=r"config\.json: no such file"):
        read_config(tmp_path)
