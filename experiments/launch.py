"""Sets up the process of `python -m experiments.<name>` before JAX is imported.

These settings have to be there before JAX starts, and are worth it:

- *Huge pages for malloc*, on Linux with glibc when training on the CPU: `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` makes a
  training step there 10 % faster and more. glibc reads it when a process starts, so the process replaces itself once
  (same process id). `JAXLM_HUGE_PAGES=0` leaves it out.
- *The persistent compilation cache*, `JAX_COMPILATION_CACHE_DIR`, under `~/.cache/jaxlm` with no minimum compile time,
  so that a restarted run compiles nothing again. A value of your own is left alone; `JAXLM_COMPILATION_CACHE=0` leaves
  it out. The folder may be deleted at any time.
- *Threads for several CPU devices* (`JAX_NUM_CPU_DEVICES`): `PJRT_NPROC`, four a device. They share one pool, by
  default of one a device: where some wait in two collectives at once, none are left for the rest, and all wait for
  good.

A program that imports `jaxlm` as a library decides for itself: call `prepare_environment()` before importing
JAX, or set the variables in the shell.
"""

import hashlib
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

HUGE_PAGES = "glibc.malloc.hugetlb"

ACCELERATORS = {  # device files, and the packages through which JAX would use them
    "/dev/nvidia0": ("jax_cuda12_plugin", "jax_cuda13_plugin"),
    "/dev/kfd": ("jax_rocm60_plugin", "jax_rocm7_plugin"),
    "/dev/accel0": ("libtpu",),
    "/dev/vfio": ("libtpu",),
}


def prepare() -> None:
    """Called while `python -m experiments.<name>` looks for its module.

    Exits with 2 and the nearest names if there is no such module; otherwise prepares the environment, which
    may replace the process.
    """
    words = [re.fullmatch(r"(?:-\w*m)?(experiments(?:\.\w+)*)", word) for word in sys.orig_argv[1:]]
    name = next((word[1] for word in words if word), "")
    if not name.startswith("experiments."):
        return  # `python -m experiments` itself needs no JAX
    path = Path(__file__).parent.joinpath(*name.split(".")[1:])
    if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
        from experiments import catalog

        print(f"error: {catalog.unknown(name)}", file=sys.stderr)
        sys.exit(2)
    prepare_environment()


def prepare_environment(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets the compilation cache, and restarts this process with huge pages for malloc where that helps.

    Call it before JAX is imported. The restart happens at most once, and repeats the command line exactly.
    """
    environ.update(cache_settings(environ) | thread_settings(environ))
    tunables = huge_page_tunables(environ)
    if tunables is not None:
        environ["GLIBC_TUNABLES"] = tunables
        environ["JAXLM_RESTARTED"] = "1"
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(environ))


def cache_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that turn on the persistent compilation cache; none if it is set or switched off.

    The folder is named after the processor's features: programs compiled for one CPU may crash on another
    that shares the home directory.
    """
    if environ.get("JAXLM_COMPILATION_CACHE") == "0" or "JAX_COMPILATION_CACHE_DIR" in environ:
        return {}
    home = environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    settings = {"JAX_COMPILATION_CACHE_DIR": os.path.join(home, "jaxlm", f"xla-{_cpu_features()}")}
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environ:
        settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return settings


def thread_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The size of the pool of threads where several CPU devices share it; none for one device, or if it is set."""
    flag = re.search(r"--xla_force_host_platform_device_count=(\d+)", environ.get("XLA_FLAGS", ""))
    given = environ.get("JAX_NUM_CPU_DEVICES") or (flag[1] if flag else "")
    devices = int(given) if given.isdigit() else 1
    if devices < 2 or "PJRT_NPROC" in environ or not runs_on_cpu(environ):
        return {}
    return {"PJRT_NPROC": str(max(4 * devices, os.cpu_count() or 1))}


def huge_page_tunables(environ: Mapping[str, str]) -> str | None:
    """The value of `GLIBC_TUNABLES` to restart with; None if this process should go on as it is."""
    tunables = environ.get("GLIBC_TUNABLES", "")
    if (
        environ.get("JAXLM_HUGE_PAGES") == "0"
        or environ.get("JAXLM_RESTARTED") == "1"
        or HUGE_PAGES in tunables
        or not _glibc_has_huge_pages()
        or not runs_on_cpu(environ)
    ):
        return None
    return ":".join(part for part in (tunables, f"{HUGE_PAGES}=1") if part)


def runs_on_cpu(environ: Mapping[str, str]) -> bool:
    """Whether JAX will compute on the CPU: as `JAX_PLATFORMS` says, or for want of an accelerator."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not any(
        os.path.exists(device) and any(importlib.util.find_spec(package) for package in packages)
        for device, packages in ACCELERATORS.items()
    )


def _glibc_has_huge_pages() -> bool:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (ValueError, OSError, AttributeError):  # no glibc, another libc, another system
        return False
    return name == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)


def _cpu_features() -> str:
    features = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return hashlib.sha256(features.encode()).hexdigest()[:8]
