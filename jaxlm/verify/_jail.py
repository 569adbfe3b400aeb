"""A jail for one Python program: started as a process of its own, it confines, runs, watches and reports.

Run as `python -I -S -B _jail.py REPORT_FD CHANNEL_FD` with the job on standard input: its length (8 bytes), the job
(JSON), then, after the confined process has been forked, a nonce that only this warden knows. Closing standard input
stops the jail. The report, one JSON object with the nonce in it, goes to REPORT_FD when nothing of the jail is left.

Three processes: the *warden* (this one), which no longer can be inspected or traced; the *init* of a new PID
namespace; and the *guest*, which has its limits and no capability. Where the kernel grants no namespaces the jail
still has limits, an audit hook, an unprivileged user where it can take one, and the sweeping up of descendants; the
report says which of these held.
"""

import ctypes
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

del sys.path[0]

NOBODY = 65534
NEW_USER, NEW_PID, NEW_NET, NEW_IPC, NEW_UTS, NEW_MOUNT = 1 << 28, 1 << 29, 1 << 30, 1 << 27, 1 << 26, 1 << 17
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache")
DEVICES = ("null", "zero", "full", "random", "urandom")
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
LINUX = sys.platform.startswith("linux")


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
    namespaces = LINUX and _in_child(_enter_namespaces)
    if namespaces:
        _enter_namespaces()
        isolation += ["network", "processes"]
    else:
        isolation += ["own user"] if _become_nobody(folder) else []
    _prctl(PR_SET_DUMPABLE, 0)
    _prctl(PR_SET_SUBREAPER, 1)
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
            _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
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
    for name in os.listdir("/proc") if LINUX else ():
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
            work = _private_root(folder, job)
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
            if _become_nobody(work):
                tell({"nobody": True})
            if not _own_user_namespace(proc):
                namespaces = False
        _limit(job, namespaces)
        _drop_capabilities()
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
        _enter_user_namespace(proc)
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
            if LINUX:
                raise


def _private_root(folder: str, job: dict) -> str:
    """Replaces the file system by one that holds Python and system libraries, read-only, and an empty /tmp.

    There is no /proc in it and nothing of the user's.
    """
    # Not before this point: the warden keeps the file system that it will clean up.
    _check(LIBC.unshare(NEW_MOUNT), "unshare")
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    root = os.path.join(folder, "root")
    os.mkdir(root)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    python = {sys.base_prefix, os.path.dirname(os.__file__), *(p for p in sys.path if os.path.isdir(p))}
    shown: list[str] = []
    for path in sorted({*SYSTEM_FOLDERS, *(os.path.realpath(p) for p in python), *python}):
        if not os.path.exists(path) or path == "/" or any(path.startswith(s + "/") for s in shown):
            continue
        target = root + path
        if os.path.lexists(target):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
            continue
        _show(path, target, read_only=True)
        shown.append(path)
    os.mkdir(root + "/dev")
    for name in DEVICES:
        if os.path.exists(f"/dev/{name}"):
            _show(f"/dev/{name}", f"{root}/dev/{name}")
    os.mkdir(root + "/tmp")
    _set_read_only(root, recursive=False)
    _mount("tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={4 * job['file_mb']}m,mode=1777")
    os.chdir(root)
    _check(LIBC.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(LIBC.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")
    return "/tmp"


def _show(path: str, target: str, read_only: bool = False) -> None:
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(path, target, None, MS_BIND | MS_REC)
    if read_only:
        _set_read_only(target, recursive=True)


def _set_read_only(path: str, recursive: bool) -> None:
    attributes = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # struct mount_attr: MOUNT_ATTR_RDONLY
    flags = 0x8000 if recursive else 0  # AT_RECURSIVE
    number = 442  # mount_setattr has one number on every architecture
    _check(LIBC.syscall(number, -1, path.encode(), flags, ctypes.byref(attributes), 32), "mount_setattr")


_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    data = options.encode() if options else None
    done = LIBC.mount(source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), data)
    _check(done, f"mount {target}")


def _enter_namespaces() -> None:
    """New PID, network, IPC and UTS namespaces; for those who are not root, in a new user namespace."""
    kinds = NEW_PID | NEW_NET | NEW_IPC | NEW_UTS
    if os.geteuid() == 0 and LIBC.unshare(kinds) == 0:
        return
    _enter_user_namespace(os.open("/proc", os.O_RDONLY))
    _check(LIBC.unshare(kinds), "unshare")


def _enter_user_namespace(proc: int) -> None:
    """A new user namespace with the user mapped to itself; `proc` is a descriptor of /proc, which is closed.

    In a namespace of its own the user's processes are counted anew.
    """
    user, group = os.getuid(), os.getgid()
    _prctl(PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root, and the maps cannot be written
    _check(LIBC.unshare(NEW_USER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(file, text.encode())
        os.close(file)
    os.close(proc)


def _in_child(function: Any) -> bool:
    """Whether a function works, tried in a child process."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _become_nobody(folder: str) -> bool:
    """Takes a user without rights where this is root and that user can read this Python; returns whether it did."""

    def become() -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)

    def works() -> None:
        become()
        os.listdir(os.path.dirname(os.__file__))
        os.listdir(folder)

    if not LINUX or os.geteuid() != 0:
        return False
    try:
        os.chown(folder, NOBODY, NOBODY)
    except OSError:  # the root of a container that has no other users
        return False
    if not _in_child(works):
        os.chown(folder, 0, 0)
        return False
    become()
    return True


def _drop_capabilities() -> None:
    if not LINUX:
        return
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    LIBC.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def _prctl(option: int, value: int) -> None:
    if LINUX:
        LIBC.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


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


LIBC = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
