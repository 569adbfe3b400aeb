"""A jail for one Python program: started as a process of its own, it confines, runs, watches and reports.

Run as `python -I -S -B _jail.py REPORT_FD CHANNEL_FD` with the job on standard input: its length (8 bytes), the job
(JSON), then, after the confined process has been forked, a nonce that only this warden knows. Closing standard input
stops the jail. The report, one JSON object with the nonce in it, goes to REPORT_FD when nothing of the jail is left.

Three processes: the *warden* (this one), which no longer can be inspected or traced; the *init* of a new PID
namespace; and the *guest*, which has its limits and no capability. Where the kernel grants no namespaces the jail
still has limits, an audit hook, an unprivileged user where it can take one, and the sweeping up of descendants; the
report says which of these held.
"""

import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import _guest
import _isolation

del sys.path[0]


def main(report_fd: int, channel_fd: int) -> None:
    """Reads the job, runs it, writes the report."""
    length = int.from_bytes(_read_exactly(0, 8), "big")
    job = json.loads(_read_exactly(0, length))
    isolation: list[str] = []
    folder = tempfile.mkdtemp(prefix="jail-")
    try:
        result = _run(job, folder, isolation, report_fd, channel_fd)
    except Exception as error:  # the report is how anybody learns of it
        result = {"ended": "error", "detail": f"{type(error).__name__}: {error}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result["nonce"] = os.read(0, 64).decode() if "nonce" not in result else result["nonce"]
    data = json.dumps(result).encode()
    while data:
        data = data[os.write(report_fd, data) :]


def _run(job: dict, folder: str, isolation: list[str], report_fd: int, channel_fd: int) -> dict[str, Any]:
    namespaces = _isolation.LINUX and _isolation.in_child(_isolation.enter_namespaces)
    if namespaces:
        _isolation.enter_namespaces()
        isolation += ["network", "processes"]
    else:
        isolation += ["own user"] if _isolation.become_nobody(folder) else []
    _isolation.prctl(_isolation.PR_SET_DUMPABLE, 0)
    _isolation.prctl(_isolation.PR_SET_SUBREAPER, 1)
    facts, events, out, err = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    path = os.path.join(folder, "stdin")
    with open(path, "wb") as file:
        file.write(job["stdin"].encode())
    stdin = os.open(path, os.O_RDONLY)
    os.unlink(path)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            _isolation.prctl(_isolation.PR_SET_PDEATHSIG, signal.SIGKILL)
            for source, target in ((stdin, 0), (out[1], 1), (err[1], 2)):
                os.dup2(source, target)
            _close_all_but({0, 1, 2, facts[1], events[1]} | ({channel_fd} if channel_fd >= 0 else set()))
            code = _init(job, folder, namespaces, facts[1], events[1], channel_fd)
        finally:
            os._exit(code)
    for fd in (facts[1], events[1], out[1], err[1]):
        os.close(fd)
    os.close(stdin)
    if channel_fd >= 0:
        os.close(channel_fd)
    # Only now: what was forked never had it in memory.
    nonce = _read_exactly(0, 32).decode()
    limits = {facts[0]: 1 << 16, events[0]: 1 << 16, out[0]: job["output_bytes"], err[0]: job["output_bytes"]}
    streams, ended = _watch(facts[0], started + job["seconds"], limits)
    seconds = time.monotonic() - started
    _sweep(pid, namespaces)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    known = _messages(streams[facts[0]])
    said = _messages(streams[events[0]])
    if known.get("files"):
        isolation.append("files")
    if said.get("nobody"):
        isolation.append("own user")
    return {
        "nonce": nonce,
        "ended": ended,
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "isolation": isolation,
        "exit": known.get("exit"),
        "said": {key: said[key] for key in ("status", "detail", "raised", "forbidden", "broken") if key in said},
        "stdout": streams[out[0]].decode(errors="replace"),
        "stderr": streams[err[0]].decode(errors="replace"),
    }


def _watch(facts: int, deadline: float, limits: dict[int, int]) -> tuple[dict[int, bytes], str]:
    """Reads pipes, up to their limits, until the init ends, time is up, or the host closes standard input.

    The init alone holds the other end of `facts`. The guest may close its pipes and go on, or end and leave them
    open in a child, so those say nothing.
    """
    streams = dict.fromkeys(limits, b"")
    waiting = [0, *streams]
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            return streams, "timeout"
        ready, _, _ = select.select(waiting, [], [], left)
        for fd in ready:
            data = os.read(fd, 1 << 16)
            if fd == 0:
                return streams, "stopped"
            streams[fd] += data[: max(0, limits[fd] - len(streams[fd]))]
            if not data:
                waiting.remove(fd)
        if facts not in waiting:
            _drain(streams, limits)
            return streams, "exited"


def _drain(streams: dict[int, bytes], limits: dict[int, int]) -> None:
    """What the guest had written before it ended; a pipe that something still holds open does not block."""
    for fd in streams:
        os.set_blocking(fd, False)
        for _ in range(32):
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                break
            if not data:
                break
            streams[fd] += data[: max(0, limits[fd] - len(streams[fd]))]


def _sweep(pid: int, namespaces: bool) -> None:
    """Kills and reaps everything that the jail started. The death of an init takes its whole namespace along."""
    for kill in (os.kill, os.killpg):
        try:
            kill(pid, signal.SIGKILL)
        except OSError:
            continue
    while True:
        try:
            done, _ = os.waitpid(-1, 0 if namespaces else os.WNOHANG)
        except ChildProcessError:
            return
        if done == 0:
            for child in _children():
                _guest.void(os.kill, child, signal.SIGKILL)
            time.sleep(0.002)


def _children() -> list[int]:
    """Processes whose parent is this one: orphans of the jail come here, as their subreaper."""
    found = []
    for name in os.listdir("/proc") if _isolation.LINUX else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                        found.append(int(name))
            except (OSError, ValueError, IndexError):
                continue
    return found


def _init(job: dict, folder: str, namespaces: bool, facts: int, events: int, channel_fd: int) -> int:
    """The first process of the namespace: makes the file system, forks the guest, and reports how it ended.

    What it says goes through a pipe of its own, which the guest does not have.
    """
    state = _guest.report_to(facts)
    work, proc = folder, -1
    if namespaces:
        proc = os.open("/proc", os.O_RDONLY)
        try:
            work = _isolation.private_root(folder, job)
            state({"files": True})
        except OSError as error:
            state({"files": False, "reason": str(error)})
    os.chdir(work)
    guest = os.fork()
    if guest == 0:
        code = 70
        try:
            os.close(facts)
            code = _be_guest(job, namespaces, work, proc, _guest.report_to(events), channel_fd)
        finally:
            os._exit(code)
    os.close(events)
    if channel_fd >= 0:
        os.close(channel_fd)
    while True:
        done, status = os.wait()
        if done == guest:
            state({"exit": os.waitstatus_to_exitcode(status)})
            return 0


def _be_guest(job: dict, namespaces: bool, work: str, proc: int, tell: Any, channel_fd: int) -> int:
    try:
        if proc >= 0:
            if _isolation.become_nobody(work):
                tell({"nobody": True})
            if not _own_user_namespace(proc):
                namespaces = False
        _limit(job, namespaces)
        _isolation.drop_capabilities()
        os.environ.update(HOME=work, TMPDIR=work)
        tempfile.tempdir = None
        channel = _guest.socket.socket(fileno=channel_fd) if channel_fd >= 0 else None
    except Exception as error:
        tell({"broken": f"{type(error).__name__}: {error}"})
        return 70
    if job["role"] == "program":
        return _guest.run_alone(job["source"], tell)
    if job["role"] == "server":
        return _guest.serve(job["source"], channel, tell)
    return _guest.run_tests(job["source"], channel, tell)


def _own_user_namespace(proc: int) -> bool:
    try:
        _isolation.enter_user_namespace(proc)
    except OSError:
        return False
    return True


def _limit(job: dict, namespaces: bool) -> None:
    cpu = int(job["seconds"]) + 2
    limits = {
        "RLIMIT_CPU": cpu,
        "RLIMIT_AS": job["memory_mb"] << 20,
        "RLIMIT_FSIZE": job["file_mb"] << 20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    if namespaces:  # elsewhere it would count the user's other processes too
        limits["RLIMIT_NPROC"] = job["processes"]
    for name, value in limits.items():
        kind = getattr(resource, name, None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            if _isolation.LINUX:
                raise


def _messages(data: bytes) -> dict[str, Any]:
    """The fields of the JSON lines that a process wrote, later ones over earlier ones."""
    found: dict[str, Any] = {}
    for line in data.split(b"\n"):
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(message, dict):
            found.update(message)
    return found


def _close_all_but(keep: set[int]) -> None:
    low = 0
    for fd in sorted(keep):
        if low < fd:  # an empty range would be taken for all
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, max(low + 1, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 16)))


def _read_exactly(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.read(fd, count - len(data))
        if not part:
            raise SystemExit(1)  # the host is gone
        data += part
    return data


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
