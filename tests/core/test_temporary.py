"""Temporary files beside a target: what killed writers left goes, what others are writing stays."""

import os
import subprocess
import sys

import pytest

from jaxlm.core.json_files import write_json
from jaxlm.core.temporary import beside
from jaxlm.data.cache import atomic_folder

KILLED = """
import os, sys
from jaxlm.core.temporary import beside
path = beside(sys.argv[1], folder=sys.argv[2] == "folder").__enter__()
(path / "half" if path.is_dir() else path).write_text("half")
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_killed_writers_left_is_gone_after_the_next_write(tmp_path, kind):
    target = tmp_path / "target"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", KILLED, str(target), kind], timeout=60)
        assert len(os.listdir(tmp_path)) == 1  # the second one removed what the first one left
    if kind == "file":
        write_json(target, {"a": 1})
    else:
        with atomic_folder(target) as folder:
            (folder / "whole").touch()
    assert os.listdir(tmp_path) == ["target"]


def test_what_is_being_written_stays(tmp_path):
    with beside(tmp_path / "a", folder=True) as first, beside(tmp_path / "a") as second:
        assert first.is_dir()
        assert second.is_file()
        (tmp_path / ".a.swp").touch()  # of another program
        write_json(tmp_path / "a", 1)
        assert first.is_dir()
        assert second.is_file()
    assert sorted(os.listdir(tmp_path)) == [".a.swp", "a"]


def test_an_error_leaves_nothing(tmp_path):
    def fails():
        with beside(tmp_path / "a", folder=True) as folder:
            (folder / "half").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert os.listdir(tmp_path) == []
