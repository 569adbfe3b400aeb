"""Fuzzes one target: `python -m tests.fuzz.run TARGET COUNT`, within bounds on memory and on the time of an input.

Deterministic: the same inputs each time. Prints how many there were; a finding ends it with the input, made small.
"""

import signal
import sys

from hypothesis import HealthCheck, given, settings

from jaxlm.core.errors import JaxlmError
from tests.fuzz.target import home
from tests.fuzz.targets import TARGETS

EXTRA_MEMORY = 1 << 31
"""Address space that reading damaged files may take beyond what the process has to begin with."""
SECONDS = 30
"""Of CPU time that one input may take here (the process that renders chat templates has limits of its own)."""


class Hang(Exception):
    """An input that takes too long. (Not an error of the readers, so it is a finding.)"""


def fuzz(name: str, count: int) -> dict[str, int]:
    """Reads `count` inputs; how many were read, and how many were refused."""
    target, folder = TARGETS[name], home() / "in" / name
    seen = {"inputs": 0, "refused": 0}

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(target.inputs())
    def check(case):
        folder.mkdir(parents=True, exist_ok=True)
        seen["inputs"] += 1
        try:
            target.read(case, folder)
        except JaxlmError:
            seen["refused"] += 1

    check()
    return seen


def _confine() -> None:
    import resource

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY, used + EXTRA_MEMORY))

    def stop(*_):
        raise Hang(f"an input took more than {SECONDS} seconds of CPU time")

    signal.signal(signal.SIGPROF, stop)


def main() -> None:
    name, count = sys.argv[1], int(sys.argv[2])
    fuzz(name, 3)  # imports, and what is made once
    _confine()
    target = TARGETS[name]

    def timed(case, folder, read=target.read):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            read(case, folder)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    object.__setattr__(target, "read", timed)
    print(fuzz(name, count))


if __name__ == "__main__":
    main()
