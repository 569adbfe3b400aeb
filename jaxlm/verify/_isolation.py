"""What the kernel can do to confine a process: namespaces, a file system of its own, a user without rights.

Linux only, through the C library; elsewhere these functions do nothing or say that they did nothing.
"""

import ctypes
import os
import sys
from collections.abc import Callable

NOBODY = 65534
NEW_USER, NEW_PID, NEW_NET, NEW_IPC, NEW_UTS, NEW_MOUNT = 1 << 28, 1 << 29, 1 << 30, 1 << 27, 1 << 26, 1 << 17
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache")
DEVICES = ("null", "zero", "full", "random", "urandom")
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
LINUX = sys.platform.startswith("linux")
LIBC = ctypes.CDLL(None, use_errno=True)


def in_child(function: Callable[[], None]) -> bool:
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


def enter_namespaces() -> None:
    """New PID, network, IPC and UTS namespaces; for those who are not root, in a new user namespace."""
    kinds = NEW_PID | NEW_NET | NEW_IPC | NEW_UTS
    if os.geteuid() == 0 and LIBC.unshare(kinds) == 0:
        return
    enter_user_namespace(os.open("/proc", os.O_RDONLY))
    _check(LIBC.unshare(kinds), "unshare")


def enter_user_namespace(proc: int) -> None:
    """A new user namespace with the user mapped to itself; `proc` is a descriptor of /proc, which is closed.

    In a namespace of its own the user's processes are counted anew.
    """
    user, group = os.getuid(), os.getgid()
    prctl(PR_SET_DUMPABLE, 1)  # else /proc/self belongs to root, and the maps cannot be written
    _check(LIBC.unshare(NEW_USER), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(file, text.encode())
        os.close(file)
    os.close(proc)


def private_root(folder: str, job: dict) -> str:
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


def become_nobody(folder: str) -> bool:
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
    if not in_child(works):
        os.chown(folder, 0, 0)
        return False
    become()
    return True


def drop_capabilities() -> None:
    if not LINUX:
        return
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    LIBC.capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def prctl(option: int, value: int) -> None:
    if LINUX:
        LIBC.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0))


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


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    data = options.encode() if options else None
    done = LIBC.mount(source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), data)
    _check(done, f"mount {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
