"""Chat templates, rendered in a process of their own whose memory and time are limited.

Jinja's sandbox keeps a template from Python's internals, not from filling the memory (text doubled forty times is a
terabyte) or from never ending, and no check of operations inside one process finds all the ways. So one process
renders for this one, and is ended, by the system where it has limits (Linux), when a template takes too much. It is
started once, by exec and not by forking, and takes a tenth of a millisecond a rendering.
"""

import json
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.core.errors import ConfigError, DataError

_WAIT_SECONDS = 120
"""Beyond any CPU time that the process may use, for systems without that limit."""


def check(source: str) -> None:
    """Raises `ConfigError` for a template that does not parse, with the line."""
    _ask({"source": source, "variables": None})


def render(source: str, variables: Mapping[str, Any], date: str) -> str:
    """The text that a template writes; `date` (ISO) is what `strftime_now` formats.

    `variables` are JSON.

    Raises `ConfigError` for a template that does not parse, takes more than 1 GiB, four seconds of CPU time or two
    million lines of its compiled form, or writes more than 16 MiB, and for variables that are not JSON; `DataError`
    for messages that it refuses, or on which it fails.
    """
    return _ask({"source": source, "variables": dict(variables), "date": date})


def _ask(request: Mapping[str, Any]) -> str:
    try:
        data = json.dumps(request).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"a variable of the chat template is not JSON: {error}") from error
    with _LOCK:
        answer = _guest().ask(data)
    kind, message = answer.get("error"), answer.get("message")
    if kind is None:
        return answer["text"]
    if kind == "syntax":
        line = f" in line {answer['line']}" if answer.get("line") else ""
        raise ConfigError(f"the chat template does not parse{line}: {message}")
    if kind == "limit":
        raise ConfigError(f"the chat template cannot be rendered: {message}")
    raise DataError(f"the chat template {'refuses' if kind == 'refused' else 'fails on'} these messages: {message}")


_LOCK = threading.Lock()
_GUESTS: dict[int, "_Guest"] = {}


def _guest() -> "_Guest":
    """This process's own: one that was forked must not talk to its parent's."""
    pid = os.getpid()
    if pid not in _GUESTS:
        _GUESTS.clear()
        _GUESTS[pid] = _Guest()
    return _GUESTS[pid]


class _Guest:
    """The rendering process; one that ended is started again."""

    def __init__(self):
        self._process: subprocess.Popen | None = None

    def ask(self, data: bytes) -> dict[str, Any]:
        """The answer to a request, or the limit that ended the process."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        try:
            self._process.stdin.write(struct.pack("!I", len(data)) + data)
            self._process.stdin.flush()
            (size,) = struct.unpack("!I", self._read(4))
            return json.loads(self._read(size))
        except (BrokenPipeError, EOFError):
            message = "it runs on and on, or takes more memory than there is"
        except TimeoutError:
            message = f"it runs on and on: no answer for {_WAIT_SECONDS} seconds"
        except BaseException:  # an interrupt: what comes next is no answer to the next request
            self._stop()
            raise
        self._stop()
        return {"error": "limit", "message": message}

    def _start(self) -> None:
        script = str(Path(__file__).with_name("_jinja_guest.py"))
        # Isolated: neither its folder nor the environment decides what it imports, only where this process looks.
        command = [sys.executable, "-I", script, json.dumps([place for place in sys.path if place])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def _stop(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._process = None

    def _read(self, count: int) -> bytes:
        parts, pipe = [], self._process.stdout.fileno()
        while count:
            if not select.select([pipe], [], [], _WAIT_SECONDS)[0]:
                raise TimeoutError
            part = os.read(pipe, min(count, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)
