"""The log of a run through kills, resumes and full disks, and TensorBoard events read back byte by byte."""

import json
import math
import os
import resource
import signal
import struct
import subprocess
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.reporting.run_folder import read_metrics, series
from jaxlm.training.run_log import RunLog


def crc32c(data):
    """Bit by bit, from the polynomial: independent of the writer's tables."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def read_events(folder):
    """Every event of a run's files, oldest file first, with both checksums of each record verified."""
    from tensorboardX.proto.event_pb2 import Event

    def check(data, expected):
        crc = crc32c(data)
        assert ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF == expected

    events = []
    for path in sorted((folder / "tensorboard").glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            check(data[at : at + 8], struct.unpack_from("<I", data, at + 8)[0])
            body = data[at + 12 : at + 12 + length]
            check(body, struct.unpack_from("<I", data, at + 12 + length)[0])
            events.append(Event.FromString(body))
            at += 16 + length
    return events


def test_what_is_logged_is_read_back_and_is_on_disk_at_once(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.log(0, {"train/loss": jnp.float32(2.5), "tokens_per_second": np.float64(5000.0), "rows": 3})
    log.log(0, {"eval/code/bits_per_byte": 4.0})
    log.log(jnp.int32(1), {"train/loss": float("nan"), "gradient_norm": float("inf")})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 3  # before close
    first, second = read_metrics(tmp_path)
    assert first == {
        "step": 0,
        "train/loss": 2.5,
        "tokens_per_second": 5000.0,
        "rows": 3,
        "eval/code/bits_per_byte": 4.0,
    }
    assert second["step"] == 1
    assert math.isnan(second["train/loss"])
    assert second["gradient_norm"] == math.inf
    log.close()


def test_a_resume_replaces_what_the_abandoned_attempt_logged(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        for step in range(10):
            log.log(step, {"train/loss": 100.0 + step})
    with RunLog(tmp_path, start_step=6, tensorboard=False) as log:
        log.log(6, {"train/loss": 6.0})
        log.log(7, {"train/loss": 7.0})
    steps, losses = series(read_metrics(tmp_path), "train/loss")
    assert steps == list(range(8))
    assert losses == [100.0, 101.0, 102.0, 103.0, 104.0, 105.0, 6.0, 7.0]
    assert sum("resumed_at" in line for line in (tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("cut", [1, 5, 20, 200_000])
def test_a_torn_last_line_is_dropped_and_counted(tmp_path, cut):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(0, {"train/loss": 1.0})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    torn = (json.dumps({"step": 1, "x" * 200_000: 2.0}))[:cut]
    (tmp_path / "metrics.jsonl").write_bytes(whole + torn.encode())
    with RunLog(tmp_path, start_step=1, tensorboard=False) as log:
        assert log.torn_lines == 1
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        log.log(1, {"train/loss": 2.0})
    assert series(read_metrics(tmp_path), "train/loss") == ([0, 1], [1.0, 2.0])


def test_a_file_that_is_one_torn_line_starts_anew(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "tra')
    with RunLog(tmp_path, tensorboard=False) as log:
        assert log.torn_lines == 1
        log.log(0, {"train/loss": 1.0})
    assert read_metrics(tmp_path) == [{"step": 0, "train/loss": 1.0}]


def test_a_killed_process_loses_nothing_it_logged(tmp_path):
    program = (
        "import sys; from jaxlm.training.run_log import RunLog\n"
        "log = RunLog(sys.argv[1], tensorboard=False)\n"
        "for step in range(100000): log.log(step, {'train/loss': 1.0}); print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    said = -1
    while said < 200:
        said = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    said = max([said, *map(int, process.stdout.read().split())])
    process.wait()
    steps, _ = series(read_metrics(tmp_path), "train/loss")
    assert steps[: said + 1] == list(range(said + 1))


@pytest.fixture
def small_disk():
    """From the call on, no file of this process grows beyond `limit` bytes: writes fall short, then fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit is not None else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_warns_once_and_loses_whole_lines_only(tmp_path, small_disk):
    log = RunLog(tmp_path, tensorboard=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small_disk(300)
        for step in range(50):
            log.log(step, {"train/loss": 1.0})
        small_disk(None)
        log.log(50, {"train/loss": 2.0})
    log.close()
    assert [str(w.message) for w in caught if "training goes on" in str(w.message)] == [str(caught[0].message)]
    steps, _ = series(read_metrics(tmp_path), "train/loss")
    kept = len(steps) - 1
    assert steps == [*range(kept), 50]
    assert 5 < kept < 20
    assert log.lost_lines == 50 - kept


def test_tensorboard_on_a_full_disk_stops_and_the_log_goes_on(tmp_path, small_disk, monkeypatch):
    monkeypatch.setattr("jaxlm.training.run_log._Events.FLUSH_SECONDS", 0)
    log = RunLog(tmp_path)
    log.log(0, {"train/loss": 1.0})
    small_disk(600)
    with pytest.warns(RuntimeWarning, match="no more TensorBoard events"):
        [log.log(step, {"train/loss": 1.0}) for step in range(1, 12)]
    small_disk(None)
    log.log(12, {"train/loss": 1.0})
    log.close()
    assert read_metrics(tmp_path)[-1]["step"] == 12


def test_tensorboard_events(tmp_path):
    with RunLog(tmp_path) as log:
        log.log(0, {"train/loss": 2.5, "big": 1e300, "nan": float("nan")})
        log.log(1, {"train/loss": 1.5})
    with RunLog(tmp_path, start_step=1) as log:
        log.log(1, {"train/loss": 1.25})
    events = read_events(tmp_path)
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value if v.tag == "train/loss"]
    assert scalars == [(0, "train/loss", 2.5), (1, "train/loss", 1.5), (1, "train/loss", 1.25)]
    assert [e.file_version for e in events if e.file_version] == ["brain.Event:2"] * 2
    starts = [e.step for e in events if e.session_log.status == e.session_log.START]
    assert starts == [1]


def test_two_logs_opened_in_the_same_second_do_not_overwrite_each_other(tmp_path):
    for step in range(3):
        with RunLog(tmp_path, start_step=step) as log:
            log.log(step, {"train/loss": float(step)})
    assert len(os.listdir(tmp_path / "tensorboard")) == 3


@pytest.mark.parametrize("value", ["0.5", None, True, [1.0], np.zeros(2)])
def test_what_is_not_a_number_is_named(tmp_path, value):
    with (
        RunLog(tmp_path, tensorboard=False) as log,
        pytest.raises(ConfigError, match=r"metric 'train/loss' at step 3 is .*expected a number"),
    ):
        log.log(3, {"train/loss": value})
    assert read_metrics(tmp_path) == []
