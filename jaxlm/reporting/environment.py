"""What a result was made with: versions, machine, date and commit, without host or user names."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

PACKAGES = ("jaxlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def environment() -> dict[str, str]:
    """Versions, machine, UTC date and commit of this process.

    Devices are named only when JAX has already been imported; it is never started for this.
    """
    facts = {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")}
    facts["commit"] = commit() or "unknown"
    facts["python"] = platform.python_version()
    for package in PACKAGES:
        found = _version(package)
        if found:
            facts[package] = found
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["cpu"] = cpu_model()
    facts["cores"] = str(_cores())
    facts["memory"] = f"{_memory_bytes() / 2**30:.0f} GiB"
    if "jax" in sys.modules:
        facts["devices"] = devices()
    return facts


def small_print(facts: dict[str, str], command: str = "") -> str:
    """One or two lines that say how a figure was made."""
    made = [command] if command else []
    made.append(f"commit {facts['commit']}" if facts.get("commit", "unknown") != "unknown" else "")
    made.append(" ".join(f"{name} {facts[name]}" for name in ("jaxlm", "jax", "flax", "optax") if name in facts))
    made.append(f"{facts.get('devices') or facts.get('cpu', '')}, {facts.get('cores', '?')} cores")
    made.append(facts.get("date", ""))
    return " · ".join(part for part in made if part)


def commit() -> str | None:
    """The commit this package was loaded from, `+changes` if files differ; None if not known."""
    folder = Path(__file__).resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is not None:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
        return f"{head}+changes" if head and changed else head
    try:  # installed by pip from a repository
        origin = json.loads(importlib.metadata.distribution("jaxlm").read_text("direct_url.json") or "{}")
        return origin.get("vcs_info", {}).get("commit_id", "")[:12] or None
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None


def devices() -> str:
    """The devices of JAX, as in `"4 x TPU v5 lite"`."""
    import jax

    kinds = Counter(device.device_kind for device in jax.devices())
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def cpu_model() -> str:
    """The processor's name as its maker writes it, or else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "jaxlm":
            from jaxlm import __version__

            return __version__
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
