"""Joining the processes of a pod or cluster, and what they agree on; nothing to do, and nothing done, with one process.

Every process runs the same program on its own devices (many controllers): all of them reach the same calls in the same
order. Values that must be equal come from the main process (`from_main`), work that is done once is done by it first
(`main_first`), and a signal that one process receives stops all of them after the same step (`SharedStop`).

When a process dies, the others find out in one of two ways. A broken connection, on CPUs, ends their running step with
an error, which `lost_processes` turns into a `ProcessLostError`. Where the devices just wait (a machine that hangs,
accelerators), JAX's coordinator notices the missing heartbeats after `HEARTBEAT_SECONDS` and ends the process.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax

from jaxlm.core.errors import ConfigError, DataError, ProcessLostError

HEARTBEAT_SECONDS = 60
"""A process that is silent for so long counts as dead; `JAXLM_HEARTBEAT_SECONDS` sets another time."""

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Longer than any work that others wait for; a process that dies meanwhile is noticed by its heartbeats.
_PATIENCE_MS = 24 * 3600 * 1000

T = TypeVar("T")


def initialize() -> bool:
    """Joins this process to the others if there are others; call it before anything touches a device.

    Processes find one another through `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` where these are set, else through what JAX detects by itself (Cloud TPU slices, SLURM,
    Open MPI). Returns whether there is more than one process.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    patience = {"heartbeat_timeout_seconds": heartbeat_seconds(os.environ)}
    given = [name for name in _EXPLICIT if os.environ.get(name)]
    if given:
        missing = [name for name in _EXPLICIT if name not in given]
        if missing:
            raise ConfigError(f"{', '.join(given)} set but not {', '.join(missing)}: set all three or none")
        jax.distributed.initialize(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            **patience,
        )
    elif in_cluster(os.environ):
        jax.distributed.initialize(**patience)
    else:
        return False
    return jax.process_count() > 1


def in_cluster(environ: Any) -> bool:
    """Whether the environment is that of one of several processes that JAX can find by itself."""
    hosts = [h for h in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]
    if len(hosts) > 1 or environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    return any(int(environ.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))


def heartbeat_seconds(environ: Any) -> int:
    """The time after which a silent process counts as dead."""
    text = environ.get("JAXLM_HEARTBEAT_SECONDS", str(HEARTBEAT_SECONDS))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"JAXLM_HEARTBEAT_SECONDS is {text!r}, expected a whole number of seconds, at least 1")
    return int(text)


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes shared files."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Returns when every process has come here. Waits in the coordinator, not on the devices, as long as it takes."""
    if jax.process_count() > 1:
        _client().wait_at_barrier(_name("barrier"), _PATIENCE_MS)


def from_main(make: Callable[[], T]) -> T:
    """`make()` of the main process, on every process; other processes do not call it. The value must be JSON.

    An exception is raised on all: as it is on the main process, elsewhere as a `ProcessLostError` with its text.
    """
    if jax.process_count() == 1:
        return make()
    name = _name("from_main")
    if not is_main_process():
        answer = json.loads(_client().blocking_key_value_get(name, _PATIENCE_MS))
        if "error" in answer:
            raise ProcessLostError(f"the main process has stopped: {answer['error']}")
        return answer["value"]
    try:
        answer = json.dumps({"value": make()})  # What is no JSON is an error that the others must hear of, too.
    except BaseException as error:
        _client().key_value_set(name, json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    _client().key_value_set(name, answer)
    return json.loads(answer)["value"]


def main_first(work: Callable[[], T]) -> T:
    """`work()` on every process, the main one before the others: what it puts into a shared folder is found there."""
    if jax.process_count() == 1:
        return work()
    result = []
    from_main(lambda: result.append(work()))
    return result[0] if result else work()


def on_every_process(value: Any) -> list[Any]:
    """The values, JSON, that the processes call this with, in the order of their indices."""
    if jax.process_count() == 1:
        return [value]
    name = _name("gather")
    _client().key_value_set(f"{name}/{jax.process_index()}", json.dumps(value))
    keys = (f"{name}/{index}" for index in range(jax.process_count()))
    return [json.loads(_client().blocking_key_value_get(key, _PATIENCE_MS)) for key in keys]


def check_equal(what: str, value: Any) -> None:
    """Raises `DataError`, on every process, unless all of them have the same `value` (JSON) for `what`."""
    values = on_every_process(value)
    different = [index for index, other in enumerate(values) if other != values[0]]
    if different:
        raise DataError(
            f"{what} is not the same on all processes: {values[0]} on process 0, {values[different[0]]} on process "
            f"{different[0]}; do they read the same files?"
        )


def leave(code: int) -> NoReturn:
    """Ends this process with an exit code (130 for one that all processes stop with together).

    One of several that has failed ends at once: an orderly end would wait for the others, and they, in the middle of a
    step, for this one.
    """
    if code not in (0, 130) and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class SharedStop:
    """Stops all processes after the same step when one of them, or several, receive a signal.

    Each calls `poll(step, signum)` after it has dispatched that step and seen the one before finish. A signal at step
    n stops all after step n + 2. That is late enough: a process passes step n + 2 only once it has seen step n + 1
    finish, which the process with the signal begins after it has told. (Steps reduce over all processes.)
    """

    def __init__(self) -> None:
        self._key = _name("stop") if jax.process_count() > 1 else ""
        self._agreed: tuple[int, int] | None = None

    def poll(self, step: int, signum: int) -> int:
        """The signal for which to stop now, or 0."""
        if not self._key:
            return signum
        if self._agreed is None:
            if signum:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                    _client().key_value_set(self._key, json.dumps([signum, step + 2]))
            self._agreed = self._read()
        return self._agreed[0] if self._agreed is not None and step >= self._agreed[1] else 0

    def _read(self) -> tuple[int, int] | None:
        try:
            signum, step = json.loads(_client().key_value_try_get(self._key))
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise
        return signum, step


@contextlib.contextmanager
def lost_processes(doing: str) -> Iterator[None]:
    """Turns the failure of a computation that spans processes into a `ProcessLostError` that says so."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if jax.process_count() == 1 or not any(sign in text for sign in _SIGNS_OF_LOSS):
            raise
        raise ProcessLostError(
            f"process {jax.process_index()} of {jax.process_count()} stops while {doing}: another process has ended "
            f"or cannot be reached ({text.strip().splitlines()[0][:200]})"
        ) from error


# Of gloo (CPU), NCCL (GPU), and the coordinator.
_SIGNS_OF_LOSS = ("Gloo", "gloo", "onnection", "NCCL", "heartbeat", "UNAVAILABLE", "coordination service", "DEADLINE")

_numbers: dict[str, Iterator[int]] = {}


def _name(kind: str) -> str:
    """A name for one agreement: the same on all processes, which count their calls."""
    return f"jaxlm/{kind}/{next(_numbers.setdefault(kind, itertools.count()))}"


def _client() -> Any:
    # JAX shows the coordinator's client nowhere else; Orbax reads it here too.
    from jax._src import distributed

    return distributed.global_state.client


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r}, expected a whole number")
    return int(text)
