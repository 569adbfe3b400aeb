"""Generated Python programs, run where they can do no harm and cannot forge the verdict on them.

`run_tests` runs a program and its tests in two jails that share one socket: the tests call the program's functions
through it and compare plain values in their own process. A program that prints "passed", exits with code 0, replaces
builtins, searches frames and memory, or returns an object that equals everything therefore gains nothing: the
outcome is what the tests' process says, with a nonce that neither process ever had.

A jail (`_jail.py`) is a fresh interpreter, started by exec and never by forking the caller, which may have JAX's
threads running. It has its own user, PID, network and mount namespaces where the kernel grants them, limits on CPU
time, address space, files and processes, an audit hook, and an empty folder to work in; everything else of the file
system is absent, or at least refused. When it ends, by itself or by the clock, every process in it is killed.
`Verdict.isolation` says what was in force: `("network", "processes", "files")` at best, and "own user" where the
caller is root. Memory is limited for each process, so a jail may use `processes` times `memory_mb`. This confines
mistakes and cheats of a language model; against a determined attacker with a kernel exploit use a virtual machine.
"""

import dataclasses
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from jaxlm.core.errors import ConfigError

Status = Literal["passed", "failed", "timeout", "out_of_memory", "forbidden", "error"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
      seconds: wall-clock time of the program, its tests included (CPU time is limited to about the same).
      memory_mb: address space of each process, in MiB.
      output_bytes: how much of standard output and standard error is kept, each; the rest is read and dropped.
      file_mb: size of a file, in MiB; the working folder holds four times this.
      processes: processes and threads at once (where the kernel grants a user namespace).
    """

    seconds: float = 3.0
    memory_mb: int = 1024
    output_bytes: int = 1 << 16
    file_mb: int = 1
    processes: int = 8

    def __post_init__(self):
        for name, least in (("seconds", 0), ("memory_mb", 63), ("output_bytes", -1), ("file_mb", 0), ("processes", 0)):
            if not getattr(self, name) > least:
                raise ConfigError(f"the limit '{name}' of the sandbox is {getattr(self, name)}, expected > {least}")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a program fared.

    Attributes:
      status: "passed"; "failed" (a wrong result, an exception, an early exit); "timeout"; "out_of_memory";
        "forbidden" (it tried the network, another process, or a change outside its folder); "error" (the tests or
        the sandbox itself are at fault, so nothing is known about the program).
      detail: one line on why.
      seconds: wall-clock time that the program had.
      cpu_seconds: CPU time that it used.
      stdout, stderr: what it wrote, cut off at the limit.
      isolation: the kinds of isolation that were in force.
    """

    status: Status
    detail: str
    seconds: float
    cpu_seconds: float = 0.0
    stdout: str = ""
    stderr: str = ""
    isolation: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the status is "passed"."""
        return self.status == "passed"


@dataclasses.dataclass(frozen=True)
class Job:
    """A program with what to do with it: tests to run against it, or standard input and the output expected.

    Exactly one of `tests` and `expected_stdout` may be given; with neither, the program passes by ending with exit
    code 0.
    """

    program: str
    tests: str | None = None
    stdin: str = ""
    expected_stdout: str | None = None

    def __post_init__(self):
        if self.tests is not None and self.expected_stdout is not None:
            raise ConfigError("a job has both 'tests' and 'expected_stdout', expected at most one of them")


def run_tests(program: str, tests: str, *, limits: Limits | None = None) -> Verdict:
    """Runs tests against a program, each in a process of its own.

    The tests are statements that raise where the program is wrong, such as `assert add(1, 2) == 3`. A global name
    that they use, do not define, and that is no builtin is taken from the program. Arguments and results travel as
    plain values (numbers, strings, bytes, and lists, tuples, sets, dicts and deques of them; what a call changes in
    a mutable argument is copied back); any other result arrives as a handle with calls, attributes, items and
    iteration, equal to nothing but itself. A function cannot be an argument: that gives status "error".
    """
    return run(Job(program, tests), limits=limits)


def run_program(program: str, *, stdin: str = "", limits: Limits | None = None) -> Verdict:
    """Runs a program as `__main__`; it passes by ending with exit code 0."""
    return run(Job(program, stdin=stdin), limits=limits)


def check_output(program: str, stdin: str, expected: str, *, limits: Limits | None = None) -> Verdict:
    """Runs a program and compares its standard output, trailing whitespace of lines and of the whole aside."""
    return run(Job(program, stdin=stdin, expected_stdout=expected), limits=limits)


def run_many(jobs: Iterable[Job], *, workers: int | None = None, limits: Limits | None = None) -> list[Verdict]:
    """The verdicts of many jobs, in their order, `workers` (by default all cores but one) at a time.

    A job that timed out having had the CPU for less than half of its time is run once more, alone: on a busy machine
    the clock judges the neighbors too.

    Raises:
      ConfigError: `workers` is less than 1.
    """
    jobs = list(jobs)
    workers = max(1, (os.cpu_count() or 2) - 1) if workers is None else workers
    if workers < 1:
        raise ConfigError(f"the number of workers is {workers}, expected >= 1")
    # Threads only wait here; each job has processes of its own.
    with ThreadPoolExecutor(workers) as pool:
        verdicts = list(pool.map(lambda job: run(job, limits=limits), jobs))
    for index, verdict in enumerate(verdicts):
        if workers > 1 and verdict.status == "timeout" and verdict.cpu_seconds < verdict.seconds / 2:
            verdicts[index] = run(jobs[index], limits=limits)
    return verdicts


def run(job: Job, *, limits: Limits | None = None) -> Verdict:
    """The verdict on one job.

    Raises:
      ConfigError: this interpreter does not know its own executable, or the system has no process groups (Windows).
    """
    limits = limits or Limits()
    if not sys.executable or os.name != "posix":
        raise ConfigError("the sandbox needs a POSIX system and a Python executable to start")
    try:
        job.program.encode()
        (job.stdin + (job.tests or "")).encode()
    except UnicodeEncodeError as error:
        return Verdict("failed", f"a program that is not Unicode text: {error}", 0.0)
    return _run_alone(job, limits) if job.tests is None else _run_with_tests(job.program, job.tests, limits)


def _run_alone(job: Job, limits: Limits) -> Verdict:
    jail = _Jail("program", job.program, limits, stdin=job.stdin)
    try:
        report = jail.wait(limits.seconds)
    finally:
        jail.close()
    status, detail = _fault(report)
    if status is None:
        code = report["exit"]
        if code:
            status, detail = "failed", report["said"].get("detail") or f"exit code {code}"
        elif job.expected_stdout is not None and _lines(report["stdout"]) != _lines(job.expected_stdout):
            status, detail = "failed", _difference(_lines(report["stdout"]), _lines(job.expected_stdout))
        else:
            status, detail = "passed", ""
    return _verdict(status, detail, report)


def _run_with_tests(program: str, tests: str, limits: Limits) -> Verdict:
    ours, theirs = socket.socketpair()
    jails = []
    try:
        with ours, theirs:
            server = _Jail("server", program, limits, channel=theirs)
            jails.append(server)
            # The program's clock decides; the tests' own starts earlier or later by what starting takes.
            patient = dataclasses.replace(limits, seconds=limits.seconds + 5)
            tester = _Jail("tests", tests, patient, channel=ours)
            jails.append(tester)
        outcome = tester.wait(patient.seconds)
        server.stop()
        report = server.wait(limits.seconds)
    finally:
        for jail in jails:
            jail.close()
    said = outcome["said"]
    status, detail = _fault(report)
    if status is None and outcome["ended"] == "timeout":
        status, detail = "timeout", "the tests did not end"
    if status is None and (outcome["ended"] != "exited" or outcome["exit"] != 0 or "status" not in said):
        # The tests' process fails to say anything only where it was overwhelmed by what the program sent.
        status, detail = "error", f"the tests' process: {said.get('broken') or outcome.get('detail') or 'no outcome'}"
    if status is None and "forbidden" in said:
        status, detail = "error", f"the tests: {said['forbidden']}"
    if status is None:
        status, detail = said["status"], said["detail"]
        code = report["exit"]
        if status == "failed" and report["ended"] == "exited" and "raised" not in report["said"]:
            detail = f"{detail}: exit code {code}" if "ended before" in detail else detail
    return _verdict(status, detail, report)


def _fault(report: dict[str, Any]) -> tuple[Status | None, str]:
    """What is to be said of a program whatever its results are."""
    said = report["said"]
    if report["ended"] == "error":
        return "error", f"the sandbox: {report['detail']}"
    if "forbidden" in said:
        return "forbidden", str(said["forbidden"])
    if report["ended"] == "timeout" or report["exit"] == -signal.SIGXCPU:
        return "timeout", f"no end after {report['seconds']:.1f} s"
    if "broken" in said:
        return "error", f"the sandbox: {said['broken']}"
    if said.get("raised") == "MemoryError":
        return "out_of_memory", str(said.get("detail", "MemoryError"))
    if report["exit"] is not None and report["exit"] < 0:
        return "failed", f"killed by signal {-report['exit']}"
    return None, ""


def _verdict(status: Status, detail: str, report: dict[str, Any]) -> Verdict:
    return Verdict(
        status=status,
        detail=detail,
        seconds=report["seconds"],
        cpu_seconds=report["cpu_seconds"],
        stdout=report["stdout"],
        stderr=report["stderr"],
        isolation=tuple(report["isolation"]),
    )


class _Jail:
    """A jail that was started, and the pipe on which its warden reports."""

    def __init__(self, role: str, source: str, limits: Limits, stdin: str = "", channel: socket.socket | None = None):
        self.nonce = secrets.token_hex(16)
        job = {"role": role, "source": source, "stdin": stdin, **dataclasses.asdict(limits)}
        data = json.dumps(job).encode()
        self.report, write_end = os.pipe()
        fds = [write_end] if channel is None else [write_end, channel.fileno()]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", _WARDEN, str(write_end), str(-1 if channel is None else fds[1])],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
                pass_fds=fds,
            )
        except BaseException:
            os.close(self.report)
            raise
        finally:
            os.close(write_end)
        try:
            self.process.stdin.write(len(data).to_bytes(8, "big") + data + self.nonce.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `wait` reports that there was no report

    def stop(self) -> None:
        """Tells the warden to end the jail."""
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            return

    def wait(self, seconds: float) -> dict[str, Any]:
        """The warden's report. A warden that gives none in time, or has not the nonce, makes it one of an error."""
        data = b""
        deadline = time.monotonic() + seconds + _PATIENCE
        with selectors.DefaultSelector() as selector:
            selector.register(self.report, selectors.EVENT_READ)
            while selector.select(max(0.0, deadline - time.monotonic())):
                part = os.read(self.report, 1 << 16)
                if not part:
                    break
                data += part
        empty = {"seconds": 0.0, "cpu_seconds": 0.0, "said": {}, "stdout": "", "stderr": "", "isolation": ()}
        try:
            report = json.loads(data)
        except ValueError:
            return {**empty, "ended": "error", "exit": None, "detail": "its warden ended without a report"}
        if not secrets.compare_digest(str(report.get("nonce")), self.nonce):
            return {**empty, "ended": "error", "exit": None, "detail": "a report without the nonce"}
        return {**empty, "exit": None, **report}

    def close(self) -> None:
        """Ends the warden if it is still there, which ends its jail, and lets go of the pipes."""
        self.stop()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self.report)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _difference(found: list[str], expected: list[str]) -> str:
    for number, (a, b) in enumerate(zip(found, expected), 1):
        if a != b:
            return f"line {number} of the output is {a[:80]!r}, expected {b[:80]!r}"
    return f"{len(found)} lines of output, expected {len(expected)}"


_WARDEN = str(Path(__file__).with_name("_jail.py"))
# Seconds, beyond its own limit, that a warden may take to start and to clean up on a busy machine.
_PATIENCE = 20.0
