"""The program of `harness.Worker`: sets up what it is told to, then runs it as often as each line of its input says."""

import contextlib
import importlib
import json
import os
import sys
import time
from pathlib import Path

from experiments.benchmarks.harness import peak_bytes


def serve() -> None:
    """Answers on the real output, a line of JSON each: what setting up had to say, then the seconds of every call."""
    target, settings = sys.argv[1], json.loads(sys.argv[2])
    # Whatever libraries print goes to the error stream; the real output carries answers only.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        module, function = target.split(":")
        facts, once = getattr(importlib.import_module(module), function)(**settings)
        print(json.dumps(facts), file=answers, flush=True)
        _reset_peak()
        for line in sys.stdin:
            seconds = []
            for _ in range(int(line)):
                start = time.perf_counter()
                once()
                seconds.append(time.perf_counter() - start)
            print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes()}), file=answers, flush=True)


def _reset_peak() -> None:
    # Linux alone forgets the peak of resident memory when asked to; elsewhere compiling is counted in.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    serve()
