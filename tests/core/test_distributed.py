import json
import signal
import threading

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core import distributed
from jaxlm.core.errors import ConfigError, DataError, ProcessLostError

VARIABLES = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "JAXLM_HEARTBEAT_SECONDS",
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
    expected = {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 2}
    assert calls == [{**expected, "heartbeat_timeout_seconds": distributed.HEARTBEAT_SECONDS}]


@pytest.mark.parametrize(
    ("name", "value"), [("TPU_WORKER_HOSTNAMES", "a,b"), ("SLURM_NTASKS", "8"), ("OMPI_COMM_WORLD_SIZE", "2")]
)
def test_clusters_are_left_to_jax(name, value, calls, monkeypatch):
    monkeypatch.setenv(name, value)
    distributed.initialize()
    assert calls == [{"heartbeat_timeout_seconds": distributed.HEARTBEAT_SECONDS}]


def test_half_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    with pytest.raises(ConfigError, match="not JAX_NUM_PROCESSES, JAX_PROCESS_ID"):
        distributed.initialize()


def test_the_patience_with_silent_processes_can_be_set(calls, monkeypatch):
    monkeypatch.setenv("JAXLM_HEARTBEAT_SECONDS", "10")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    distributed.initialize()
    assert calls == [{"heartbeat_timeout_seconds": 10}]
    for bad in ("0", "soon"):
        with pytest.raises(ConfigError, match=f"JAXLM_HEARTBEAT_SECONDS is '{bad}'"):
            distributed.heartbeat_seconds({"JAXLM_HEARTBEAT_SECONDS": bad})


class Store:
    """The coordinator's table of keys, for threads that stand for processes."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            if key in self.values:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: {key}")
            self.values[key] = value
            self.changed.notify_all()

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError(f"NOT_FOUND: {key}")
        return self.values[key]

    def blocking_key_value_get(self, key, timeout_ms):
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, timeout=10)
            return self.values[key]


@pytest.fixture
def together(monkeypatch):
    """`together(work, count)`: the results, or exceptions, of `work()` in threads that stand for processes."""
    here = threading.local()
    store = Store()
    monkeypatch.setattr(distributed, "_client", lambda: store)
    monkeypatch.setattr(distributed, "_name", lambda kind: f"{kind}/{next(here.numbers)}")
    monkeypatch.setattr(distributed.jax, "process_index", lambda: here.index)

    def run(work, count=3):
        monkeypatch.setattr(distributed.jax, "process_count", lambda: count)
        results = [None] * count

        def process(index):
            here.index, here.numbers = index, iter(range(100))
            try:
                results[index] = work()
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=process, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return results

    return run


def test_what_the_main_process_makes_reaches_all(together):
    made = []
    assert together(lambda: distributed.from_main(lambda: made.append(0) or {"step": 3})) == [{"step": 3}] * 3
    assert made == [0]


def test_the_error_of_the_main_process_reaches_all(together):
    def fail():
        raise DataError("no such file")

    first, *others = together(lambda: distributed.from_main(fail))
    assert isinstance(first, DataError)
    assert all(isinstance(e, ProcessLostError) and "DataError: no such file" in str(e) for e in others)


def test_a_value_that_cannot_be_sent_is_an_error_on_all(together):
    first, *others = together(lambda: distributed.from_main(object))
    assert isinstance(first, TypeError)
    assert all(isinstance(e, ProcessLostError) and "not JSON serializable" in str(e) for e in others)


def test_the_main_process_works_first(together):
    order = []
    together(lambda: distributed.main_first(lambda: order.append(jax.process_index())))
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_values_of_all_reach_all(together):
    assert together(lambda: distributed.on_every_process(jax.process_index())) == [[0, 1, 2]] * 3


def test_different_data_is_an_error_on_every_process(together):
    found = together(lambda: distributed.check_equal("the data", "b" if jax.process_index() == 2 else "a"))
    assert all(isinstance(e, DataError) for e in found)
    assert "the data is not the same on all processes: a on process 0, b on process 2" in str(found[0])


def test_alone_nothing_is_agreed_on():
    assert distributed.from_main(lambda: 1) == distributed.main_first(lambda: 1) == 1
    assert distributed.on_every_process(2) == [2]
    distributed.check_equal("anything", 3)
    distributed.wait_for_all()
    assert distributed.SharedStop().poll(5, signal.SIGTERM) == signal.SIGTERM


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(2, 4), st.lists(st.integers(0, 3), min_size=300, max_size=300), st.data())
def test_all_stop_after_the_same_step_however_they_are_scheduled(count, schedule, data):
    """Processes dispatch steps and see them finish as the training loop does; a step needs all of them."""
    store = Store()
    signals = data.draw(st.dictionaries(st.integers(0, count - 1), st.integers(1, 8), min_size=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "_client", lambda: store)
        patch.setattr(distributed.jax, "process_count", lambda: count)
        patch.setattr(distributed, "_name", lambda kind: kind)
        stops = [distributed.SharedStop() for _ in range(count)]
        dispatched, polled, stopped = [0] * count, [0] * count, [0] * count
        for process in [p % count for p in schedule] + list(range(count)) * 40:
            if stopped[process]:
                continue
            step = dispatched[process]
            if polled[process] == step:
                dispatched[process] += 1
            elif min(dispatched) >= step - 1:  # the step before has finished
                signum = signal.SIGTERM if signals.get(process, 99) <= step else 0
                if stops[process].poll(step, signum):
                    stopped[process] = step
                polled[process] = step
    assert len(set(stopped)) == 1, (stopped, signals)
    assert min(signals.values()) <= stopped[0] <= min(signals.values()) + 3
    assert json.loads(store.values["stop"])[1] == stopped[0]


def test_only_the_loss_of_a_process_is_called_so(monkeypatch):
    def fail(text):
        with distributed.lost_processes("training"):
            raise jax.errors.JaxRuntimeError(text)

    gloo = "UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:1\nmore"
    with pytest.raises(jax.errors.JaxRuntimeError, match="Gloo"):
        fail(gloo)  # alone, it is something else
    monkeypatch.setattr(distributed.jax, "process_count", lambda: 2)
    with pytest.raises(ProcessLostError, match="process 0 of 2 stops while training: .*Connection closed by peer"):
        fail(gloo)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        fail("RESOURCE_EXHAUSTED: out of memory")
