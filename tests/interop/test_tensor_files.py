"""Safetensors files, against the `safetensors` package, and damaged in every way."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxlm.core.errors import CheckpointError
from jaxlm.interop import tensor_files
from jaxlm.interop.tensor_files import DTYPES, Planned

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.linspace(0, 1, 5).astype(np.float16),
    "c": np.arange(6).reshape(2, 3).astype(jnp.bfloat16),
    "d": np.full((), 3.5),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def write(folder, max_bytes=10**9):
    planned = [Planned(name, x.shape, CODES[x.dtype]) for name, x in ARRAYS.items()]
    return tensor_files.write_tensors(folder, planned, iter(ARRAYS.values()), max_bytes)


def test_the_package_reads_what_we_write(tmp_path):
    assert write(tmp_path) == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(ARRAYS)
    found = load_file(tmp_path / "model.safetensors")
    assert all(found[n].dtype == x.dtype and np.array_equal(found[n], x) for n, x in ARRAYS.items())


def test_we_read_what_the_package_writes(tmp_path):
    save_file(ARRAYS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = tensor_files.open_tensors(tmp_path)
    assert set(found) == set(ARRAYS)
    for name, x in ARRAYS.items():
        view = found[name].file.view(found[name])
        assert view.dtype == x.dtype
        assert not view.flags.writeable
        np.testing.assert_array_equal(view, x)
        found[name].file.release(found[name])
        np.testing.assert_array_equal(view, x)


def test_shards(tmp_path):
    """At most so many bytes each, except for a tensor that alone is larger."""
    names = write(tmp_path, max_bytes=24)
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"]["total_size"] == 48 + 10 + 12 + 8
    assert [index["weight_map"][n] for n in ARRAYS] == [names[0], names[1], names[1], names[2]]
    found = tensor_files.open_tensors(tmp_path)
    for name, x in ARRAYS.items():
        np.testing.assert_array_equal(found[name].file.view(found[name]), x)


def test_a_pickle_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin and no model\.safetensors: pickles"):
        tensor_files.open_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        tensor_files.open_tensors(tmp_path)


def edit_index(folder, **changes):
    path = folder / "model.safetensors.index.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "weight_map": {**values["weight_map"], **changes}}))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_that_points_outside(tmp_path, name):
    write(tmp_path, max_bytes=24)
    edit_index(tmp_path, b=name)
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        tensor_files.open_tensors(tmp_path)


def test_an_index_that_does_not_fit_its_files(tmp_path):
    write(tmp_path, max_bytes=24)
    edit_index(tmp_path, e="model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"not in their files: e \(model-00001-of-00003\.safetensors\)"):
        tensor_files.open_tensors(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"are missing: model-00002-of-00003\.safetensors"):
        tensor_files.open_tensors(tmp_path)
    for text in ("{", "[]", '{"weight_map": {"a": 1}}', "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match="not the index of a checkpoint"):
            tensor_files.open_tensors(tmp_path)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_truncated_file_is_always_named(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    write(folder)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
        tensor_files.open_tensors(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[1]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "I8", "shape": [4], "data_offsets": [0.5, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F16", "shape": [2], '
        b'"data_offsets": [2, 6]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype": "F32", "shape": [1], '
        b'"data_offsets": [4, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [0, 1152921504606846976], "data_offsets": [0, 0]}}',
        b"\xff\xfe",
    ],
)
def test_a_header_that_is_none(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match="header is not that of a safetensors file"):
        tensor_files.open_tensors(tmp_path)
