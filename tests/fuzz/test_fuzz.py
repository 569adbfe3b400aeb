"""Readers of files, fuzzed: a few hundred inputs always, more than 20,000 in the release tier.

Nothing but a named error may come of an input: no crash, no hang, no memory beyond a bound. What was found is kept as
a case in the tests of its reader.
"""

import os
import subprocess
import sys

import pytest

from tests.fuzz.run import fuzz
from tests.fuzz.targets import TARGETS

COUNTS = {name: max(100, 4000 // target.cost) for name, target in TARGETS.items()}


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_refused_by_name(name):
    seen = fuzz(name, max(5, 30 // TARGETS[name].cost))
    assert seen["refused"]


@pytest.mark.release
@pytest.mark.parametrize("name", TARGETS)
def test_thousands_of_damaged_inputs(name):
    assert sum(COUNTS.values()) >= 20_000
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.fuzz.run", name, str(COUNTS[name])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
