"""What runs inside a jail: a program on its own, a program that is called from outside, or the tests that call it.

The program and its tests live in two processes in two jails, joined by one socket. The tests call the program's
functions through it, so no object, frame or memory of the tests is within the program's reach.
"""

import atexit
import builtins
import importlib
import json
import os
import socket
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

import _wire

FORBIDDEN = frozenset(
    [f"os.{name}" for name in ("system", "fork", "forkpty", "exec", "posix_spawn", "spawn", "kill", "killpg")]
    + [f"socket.{name}" for name in ("connect", "bind", "sendto", "getaddrinfo", "gethostbyname")]
    + [f"ctypes.{name}" for name in ("dlopen", "dlsym", "cdata", "string_at")]
    + ["signal.pthread_kill", "subprocess.Popen", "pty.spawn"]
)
CHANGES = frozenset(
    f"os.{name}"
    for name in ("remove", "rename", "rmdir", "mkdir", "chmod", "chown", "link", "symlink", "truncate", "utime")
)


def run_alone(source: str, tell: Callable[[dict], None]) -> int:
    """Runs a program as `__main__` to its end; returns its exit code. `tell` takes events for the report."""
    _guard(tell)
    code = 0
    try:
        exec(compile(source, "<program>", "exec"), _fresh_main().__dict__)
    except SystemExit as error:
        code = _exit_code(error)
    except BaseException as error:
        tell({"raised": _name(error), "detail": _last_line(error)})
        code = _print_error(error)
    return _finish(code)


def serve(source: str, channel: socket.socket, tell: Callable[[dict], None]) -> int:
    """Loads a program, then does what the tests ask of it until they close the channel."""
    _guard(tell)
    main = _fresh_main()
    try:
        exec(compile(source, "<program>", "exec"), main.__dict__)
    except BaseException as error:
        tell({"raised": _name(error), "detail": _last_line(error)})
        _wire.send(channel, {"failed": [_name(error), _last_line(error)]})
        return _finish(_print_error(error))
    names = {name: value for name, value in vars(main).items() if isinstance(name, str)}
    modules = {name: value.__name__ for name, value in names.items() if isinstance(value, types.ModuleType)}
    _wire.send(channel, {"ready": list(names), "modules": modules})
    server = _Server(vars(main))
    while True:
        try:
            request = _wire.receive(channel)
        except _wire.WireError:
            return 0
        _wire.send(channel, server.answer(request))


def run_tests(tests: str, channel: socket.socket, tell: Callable[[dict], None]) -> int:
    """Runs the tests against the program at the other end of the channel, and tells the outcome.

    Names that the tests use, do not define themselves and that are no builtins are the program's: functions and
    classes become handles to call, plain values arrive by value.
    """
    _guard(tell)
    try:
        code = compile(tests, "<tests>", "exec")
    except (SyntaxError, ValueError) as error:
        tell({"status": "error", "detail": f"the tests: {_last_line(error)}"})
        return 0
    try:
        client = _Client(channel)
        first = _wire.receive(channel)
        if "failed" in first:
            kind, detail = first["failed"]
            tell({"status": _status_of(str(kind)), "detail": str(detail)})
            return 0
        namespace: dict[str, Any] = {"__name__": "__tests__", "__builtins__": builtins}
        wanted = _names_used(code) & set(first["ready"])
        for name in sorted(wanted - set(dir(builtins)) - {"__name__", "__builtins__"}):
            module = str(first["modules"].get(name, ""))
            if module.partition(".")[0] in sys.stdlib_module_names:
                namespace[name] = importlib.import_module(module)  # not the program's, which it may have changed
            else:
                namespace[name] = client.ask("name", name)
        exec(code, namespace)
        outcome = {"status": "passed", "detail": ""}
    except Unsendable as error:
        outcome = {"status": "error", "detail": str(error)}
    except _wire.WireError as error:
        outcome = {"status": "failed", "detail": f"the program ended before the tests did ({error})"}
    except BaseException as error:
        outcome = {"status": _status_of(_name(error)), "detail": _last_line(error)}
    tell(outcome)
    return 0


class Unsendable(Exception):
    """An argument of the tests that cannot be handed to the program."""


class ProgramError(Exception):
    """An exception of the program that is of no built-in type."""


class ProgramExit(BaseException):
    """The program called for the end of its process."""


class Remote:
    """An object of the program's process. Calls, attributes, items, length and iteration go there; comparison and
    arithmetic do not, so what a test compares is never decided by the program."""

    __slots__ = ("_client", "_number", "_type")

    def __init__(self, client: "_Client", number: int, name: str):
        self._client, self._number, self._type = client, number, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._client.ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._client.ask("getattr", self, (name,))

    def __getitem__(self, key: Any) -> Any:
        return self._client.ask("getitem", self, (key,))

    def __len__(self) -> int:
        length = self._client.ask("len", self)
        return length if isinstance(length, int) else 0

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Any:
        iterator = self._client.ask("iter", self)
        while True:
            try:
                yield self._client.ask("next", iterator)
            except StopIteration:
                return

    def __next__(self) -> Any:
        return self._client.ask("next", self)

    def __repr__(self) -> str:
        return f"<{self._type} of the program>"


class _Client:
    """The tests' side of the channel."""

    def __init__(self, channel: socket.socket):
        self.channel, self.count = channel, 0

    def ask(self, op: str, target: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += 1
        request = {
            "id": self.count,
            "op": op,
            "target": target if op == "name" else target._number,
            "args": [_wire.encode(a, self._handle) for a in args],
            "kwargs": {k: _wire.encode(v, self._handle) for k, v in (kwargs or {}).items()},
        }
        _wire.send(self.channel, request)
        reply = _wire.receive(self.channel)
        if reply.get("id") != self.count:
            raise _wire.WireError("an answer to no question")
        for index, form in enumerate(reply.get("changed") or ()):
            if form is not None and index < len(args) and isinstance(args[index], _wire.MUTABLE):
                _replace(args[index], self._decode(form))
        if "raised" in reply:
            raise _rebuilt(*map(str, reply["raised"]))
        return self._decode(reply.get("value"))

    def _handle(self, value: Any) -> list:
        if isinstance(value, Remote):
            return ["object", value._number, value._type]
        raise Unsendable(f"the tests hand the program a {type(value).__name__}, which cannot travel between processes")

    def _decode(self, form: Any) -> Any:
        return _wire.decode(form, lambda number, name: Remote(self, number, name))


class _Server:
    """The program's side: objects that the tests hold handles to, and what can be done with them."""

    def __init__(self, names: dict[str, Any]):
        self.names = names
        self.objects: list[Any] = []

    def answer(self, request: dict) -> dict:
        changed: list[Any] = []
        try:
            value = self._do(request, changed)
            reply = {"value": _wire.encode(value, self._handle)}
        except BaseException as error:
            # Tracebacks hold frames, and frames hold what used up the memory.
            error.__traceback__ = None
            reply = {"raised": [_name(error), _message(error)]}
        return {"id": request["id"], "changed": changed, **reply}

    def _do(self, request: dict, changed: list[Any]) -> Any:
        op = request["op"]
        if op == "name":
            return self.names[request["target"]]
        target = self.objects[request["target"]]
        args = [self._decode(form) for form in request["args"]]
        if op == "call":
            try:
                return target(*args, **{k: self._decode(form) for k, form in request["kwargs"].items()})
            finally:
                changed.extend(self._change(arg, form) for arg, form in zip(args, request["args"]))
        return {"getattr": getattr, "getitem": lambda o, k: o[k], "len": len, "iter": iter, "next": next}[op](
            target, *args
        )

    def _change(self, value: Any, before: Any) -> Any:
        """The new form of an argument that the call changed in place, else None."""
        if not isinstance(value, _wire.MUTABLE):
            return None
        after = _wire.encode(value, self._handle)
        return None if after == before else after

    def _handle(self, value: Any) -> list:
        self.objects.append(value)
        return ["object", len(self.objects) - 1, type(value).__name__]

    def _decode(self, form: Any) -> Any:
        return _wire.decode(form, lambda number, name: self.objects[number])


def _replace(old: Any, new: Any) -> None:
    if type(old) is not type(new):
        raise _wire.WireError("an argument that changed its type")
    if isinstance(old, (list, bytearray)):
        old[:] = new
    else:
        old.clear()
        old.extend(new) if hasattr(old, "extend") else old.update(new)


def _guard(tell: Callable[[dict], None]) -> None:
    """Refuses network, processes and changes outside the working folder, by an audit hook, and tells of attempts.

    Within one interpreter this cannot be made proof; it gives a clear verdict, and it is what there is where the
    kernel grants no namespaces.
    """
    home = os.path.realpath(os.getcwd())
    allowed = {getattr(socket, "AF_UNIX", None)}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    absolute, join, sep = os.path.realpath, os.path.join, os.sep

    def inside(path: Any) -> bool:
        if isinstance(path, int) or path is None:
            return True
        full = absolute(join(home, os.fsdecode(path)))
        return full == home or full.startswith(home + sep) or full == "/dev/null"

    def refuse(event: str, subject: Any) -> None:
        tell({"forbidden": f"{event} {subject!r}"[:200]})
        raise PermissionError(f"the sandbox forbids {event} {subject!r}"[:300])

    def hook(event: str, args: tuple) -> None:
        if event in FORBIDDEN:
            refuse(event, args[:1])
        elif event == "socket.__new__" and args[1] not in allowed:
            refuse(event, int(args[1]))
        elif event in CHANGES or (event == "open" and args[2] is not None and args[2] & writing):
            paths = args[: 2 if event in _TWO_PATHS else 1]
            if not all(map(inside, paths)):
                refuse(event, paths[0])

    sys.addaudithook(hook)


_TWO_PATHS = frozenset(["os.rename", "os.link"])


def _fresh_main() -> types.ModuleType:
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.argv = ["program.py"]
    for name in ("_guest", "_isolation", "_wire", "ctypes", "_ctypes"):
        sys.modules.pop(name, None)
    return main


def _finish(code: int) -> int:
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        code = code or 1
    return code


def _exit_code(error: SystemExit) -> int:
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _print_error(error: BaseException) -> int:
    try:
        first = error.__traceback__  # a frame of this module
        traceback.print_exception(type(error), error, first and first.tb_next, limit=-20)
    except BaseException:
        return 1
    return 1


def _names_used(code: types.CodeType) -> set[str]:
    nested = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_names_used, nested))


def _rebuilt(kind: str, message: str) -> BaseException:
    cls = getattr(builtins, kind, None)
    if isinstance(cls, type) and issubclass(cls, Exception):
        try:
            return cls(message)
        except TypeError:  # such as UnicodeDecodeError, which takes five arguments
            return ProgramError(f"{kind}: {message}")
    if kind in ("SystemExit", "KeyboardInterrupt", "GeneratorExit"):
        return ProgramExit(f"the program raised {kind}")
    return ProgramError(f"{kind}: {message}")


def _status_of(kind: str) -> str:
    return "out_of_memory" if kind == "MemoryError" else "failed"


def _name(error: BaseException) -> str:
    # A class of the program may bear any name; only the built-in ones mean what they say.
    cls = type(error)
    return cls.__name__ if getattr(builtins, cls.__name__, None) is cls else f"program.{cls.__name__}"


def _message(error: BaseException) -> str:
    try:
        return str(error)[:2000]
    except BaseException:
        return ""


def _last_line(error: BaseException) -> str:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename in ("<tests>", "<program>")]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {_message(error)}".rstrip(": ")[:2000] + where


def report_to(fd: int) -> Callable[[dict], None]:
    """A function that writes messages, one JSON line each, to a file descriptor."""
    write, dumps = os.write, json.dumps
    return lambda message: void(write, fd, dumps(message).encode() + b"\n")


def void(function: Callable, *args: Any) -> None:
    """Calls a function of the operating system whose failure changes nothing."""
    try:
        function(*args)
    except OSError:
        return
