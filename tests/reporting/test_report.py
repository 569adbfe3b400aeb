"""Reports as values: they survive JSON, refuse what does not fit, and format cells for people."""

import json
import math

import numpy as np
import pytest

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.reporting import Claim, Figure, Report, Sample, Series, Table
from jaxlm.reporting.report import format_cell, load, save


def full_report():
    return Report(
        title="A title",
        summary="One.\n\nTwo.",
        numbers={"bits per byte": np.float32(1.5), "parameters": 6815744, "note": "text", "none": None},
        claims=[
            Claim("x < y", 30.05, np.float64(31.5), np.bool_(True)),
            Claim("z", "1 → 2", "3", False, "tried w"),
        ],
        tables=[Table("T", ["a", "b"], [[1, 2.5], ["x", None], [True, math.inf]], "caption")],
        figures=[
            Figure("lines", [Series("s", np.arange(3), np.array([1.0, 2.0, 3.0]))], "step", "loss", y_scale="log"),
            Figure("bars", [Series("s", ("a", "b"), (1.0, 2.0), "bars")]),
            Figure("image", image="figures/x.png"),
        ],
        samples=[Sample("def ", "f(): \ud800 pass", "seed 1")],
        experiment="optimization.scale",
        preset="small",
        command="python -m experiments.optimization.scale",
        seconds=12.5,
        config={"model": {"layers": 6, "rope": None}, "seeds": [1, 2]},
        environment={"jax": "0.10.2"},
    )


def test_a_report_survives_json(tmp_path):
    report = full_report()
    save(report, tmp_path / "report.json")
    assert load(tmp_path / "report.json") == report
    assert report.holding == 1


def test_nan_survives_in_strict_json(tmp_path):
    save(Report("t", figures=(Figure("f", (Series("s", (1, 2), (math.nan, 2.0)),)),)), tmp_path / "r.json")
    json.loads((tmp_path / "r.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    y = load(tmp_path / "r.json").figures[0].series[0].y
    assert math.isnan(y[0])
    assert y[1] == 2.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Table("T", ("a", "b"), ((1,),)), "table 'T' row 0 has 1 cells, expected 2"),
        (lambda: Series("s", (1, 2), (1,)), "series 's' has 2 x but 1 y"),
        (lambda: Series("s", (1,), (1,), "dots"), "style is 'dots'"),
        (
            lambda: Figure("f", (Series("s", (1,), (1,)), Series("t", (1,), (1,), "bars"))),
            "figure 'f': bars and lines do not go into one figure",
        ),
        (lambda: Figure("f"), "figure 'f': give either series or an image"),
        (lambda: Figure("f", (Series("s", (1,), (1,)),), y_scale="logarithmic"), "y_scale is 'logarithmic'"),
    ],
)
def test_what_does_not_fit_is_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_a_file_that_is_no_report_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"title": "t", "claim": []}')
    with pytest.raises(ConfigError, match="a.json: no field 'claim' in Report: did you mean 'claims'"):
        load(tmp_path / "a.json")
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "b.json")


def test_cells_are_formatted_for_people():
    values = [6815744, 5012.3, 1.40213, 3e-5, 0.0, 123456789012.0, True, None, "x", math.nan, -2.5]
    words = ["6,815,744", "5,012", "1.402", "3e-05", "0", "1.235e+11", "yes", "–", "x", "nan", "-2.5"]
    assert [format_cell(value) for value in values] == words
