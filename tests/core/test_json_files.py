"""JSON of run folders: strict for every reader, whole or absent, and named when it is broken."""

import json
import math
import os

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxlm.core.errors import DataError
from jaxlm.core.json_files import dumps, number, read_json, read_object, read_text, write_json, write_text


def strict(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@given(st.floats())
def test_any_float_survives_strict_json(value):
    back = number(strict(dumps({"a": [value]}))["a"][0])
    assert back == value or (math.isnan(back) and math.isnan(value))


@given(st.text())
@example("half \ud800 surrogate")
def test_any_text_survives_half_surrogates_too(text):
    assert strict(dumps([text]).encode("utf-8").decode("utf-8")) == [text]


def test_scalar_arrays_become_numbers():
    assert strict(dumps({"a": np.float32(0.5), "b": np.int64(3), "c": np.array(2.0)})) == {
        "a": 0.5,
        "b": 3,
        "c": 2.0,
    }
    assert number(np.float64("inf")) == math.inf


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "config.json"
    write_json(path, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "half")
    assert read_json(path) == {"a": 1}
    assert os.listdir(path.parent) == ["config.json"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1,\n oops}', "line 2 column 2: not JSON"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (None, "no such file"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON that can be read"),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path, content, words):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"config.json.*{words}"):
        read_json(path)


def test_what_is_no_file_or_no_object_is_named(tmp_path):
    for path in (tmp_path, "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(DataError, match="cannot be read"):
            read_json(path)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="list.json: expected an object, got list"):
        read_object(tmp_path / "list.json")
    (tmp_path / "t").write_bytes(b"a\xff")
    with pytest.raises(DataError, match="not UTF-8 at byte 1"):
        read_text(tmp_path / "t")
