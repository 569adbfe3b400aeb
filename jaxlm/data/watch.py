"""Reading that cannot hang for good: each call gets a time limit, and the source that exceeds it is named.

Reading happens in a thread of its own; the caller waits for it with a limit. Nothing here looks at the clock of the
wall, which may jump. What holds Python's global lock while it stalls (a page of a memory map on a dead network drive)
stops the caller as well, and is beyond the reach of any thread; a reading process (`workers=1`) is not.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from jaxlm.core.errors import DataError

T = TypeVar("T")

TIMEOUT = 600.0
"""Seconds that a source may take by default: longer than any hiccup of a network drive or a data set's server."""

_LOT_SECONDS, _LOT_SIZE = 0.05, 256

_stalled = False


def stalled() -> bool:
    """Whether a read of this process exceeded its limit; then its thread may hang for good, and so would an orderly
    exit, which waits for the threads of libraries."""
    return _stalled


class Reader:
    """Calls functions in a thread of its own, each with a time limit in seconds (0: none, in the caller's thread)."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self._results: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, function: Callable[[], T], what: Callable[[], str]) -> T:
        """What `function()` returns or raises; `DataError` with the words of `what()` when it takes too long."""
        global _stalled
        if not self.timeout:
            return function()
        if self._thread is None:
            # Daemon: a thread that hangs does not keep the process.
            arguments = (self._requests, self._results)
            self._thread = threading.Thread(target=_serve, args=arguments, name="jaxlm-reader", daemon=True)
            self._thread.start()
        self._requests.put(function)
        try:
            error, value = self._results.get(timeout=self.timeout)
        except queue.Empty:
            _stalled = True
            self._forget()
            raise DataError(f"{what()}: nothing came within {self.timeout:g} s (data.timeout): it hangs") from None
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """Ends the thread, unless it hangs."""
        if self._thread is not None:
            self._requests.put(None)
            self._thread.join(1.0)
            self._forget()

    def __del__(self) -> None:
        if self._thread is not None:
            self._requests.put(None)

    def _forget(self) -> None:
        self._requests, self._results, self._thread = queue.SimpleQueue(), queue.SimpleQueue(), None


def watched(items: Iterable[T], name: str, timeout: float = TIMEOUT) -> Iterator[T]:
    """The items, unless the next one takes longer than `timeout` seconds (0: no limit).

    Raises `DataError` with `name` then. Items are handed over in lots, so that many small ones cost nothing.
    """
    iterator = iter(items)

    def lot() -> list[T]:
        until, found = time.monotonic() + _LOT_SECONDS, []
        for item in iterator:
            found.append(item)
            if len(found) >= _LOT_SIZE or time.monotonic() >= until:
                break
        return found

    reader = Reader(timeout)
    try:
        while found := reader(lot, lambda: f"source '{name}'"):
            yield from found
    finally:
        reader.close()


def _serve(requests: queue.SimpleQueue, results: queue.SimpleQueue) -> None:
    while (function := requests.get()) is not None:
        result: tuple[BaseException | None, Any]
        try:
            result = (None, function())
        except BaseException as error:
            result = (error, None)
        results.put(result)
        del function, result  # a batch must not stay alive until the next one
