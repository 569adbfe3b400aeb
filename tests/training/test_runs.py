"""A run folder belongs to one run at a time."""

import subprocess
import sys

import pytest

from jaxlm.core.errors import CheckpointError
from jaxlm.training import exclusive


def test_a_second_run_is_kept_out_until_the_first_one_ends(tmp_path):
    out = tmp_path / "run"
    with exclusive(out), pytest.raises(CheckpointError, match="in use"), exclusive(out):
        pass
    with exclusive(out):
        pass


def test_a_killed_process_holds_nothing(tmp_path):
    program = "import os, sys; from jaxlm.training import exclusive; exclusive(sys.argv[1]).__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == 9
    with exclusive(tmp_path):
        pass
