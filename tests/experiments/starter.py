"""Starts training processes quickly: imports everything once, then forks one for each line of its input.

A line is JSON with `argv`, `env` and `log`; the answers are the process's id at once, and its exit code at its end. No
device is touched and no thread started before the fork, so the child is what `python -m experiments.pretrain` would be.
"""

import json
import os
import signal
import sys
import traceback

import grain  # noqa: F401
import orbax.checkpoint  # noqa: F401
import tensorboardX.record_writer  # noqa: F401

import jaxlm.decoding
import jaxlm.evals
import jaxlm.reporting.figures
import jaxlm.reporting.html
import jaxlm.training  # noqa: F401
from experiments import pretrain, runner


def train(request):
    os.environ.update(request["env"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        code = runner.execute(pretrain, request["argv"])
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            train(json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
