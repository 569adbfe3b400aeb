import pytest

from jaxlm.core import distributed
from jaxlm.core.errors import ConfigError

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    made = []
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **options: made.append(options))
    return made


def test_nothing_happens_on_one_process(calls, monkeypatch):
    assert distributed.initialize() is False
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert distributed.initialize() is False
    assert calls == []


def test_processes_are_joined_as_the_environment_says(calls, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    distributed.initialize()
    assert calls == [{"coordinator_address": "host:1234", "num_processes": 4, "process_id": 2}]


@pytest.mark.parametrize(
    ("name", "value"), [("TPU_WORKER_HOSTNAMES", "a,b"), ("SLURM_NTASKS", "8"), ("OMPI_COMM_WORLD_SIZE", "2")]
)
def test_clusters_are_left_to_jax(name, value, calls, monkeypatch):
    monkeypatch.setenv(name, value)
    distributed.initialize()
    assert calls == [{}]


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    with pytest.raises(ConfigError, match="not JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        distributed.initialize()
