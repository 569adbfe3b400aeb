"""A run folder belongs to one run at a time."""

import os
import shutil
import subprocess
import sys

import pytest

from jaxlm.core.errors import CheckpointError, ConfigError
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


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    """Also for the superuser, whom file modes do not stop."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(folder / "checkpoints")]
    mounted = shutil.which("mount") is not None and not subprocess.run(words, capture_output=True).returncode
    if not mounted:
        if os.geteuid() == 0:
            pytest.skip("this machine lets nobody mount a file system")
        (folder / "checkpoints").chmod(0o500)
    try:
        with pytest.raises(ConfigError, match="cannot write to run folder .*run: "), exclusive(folder):
            pass
    finally:
        if mounted:
            subprocess.run(["umount", str(folder / "checkpoints")], check=True)
    (folder / "checkpoints").chmod(0o700)
    with exclusive(folder):
        pass
    assert [path.name for path in folder.iterdir() if path.name != "checkpoints"] == [".lock"]
