"""Right programs pass; wrong, endless, greedy and hostile ones get the verdict that is theirs, and leave nothing."""

import os
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.verify import sandbox
from jaxlm.verify.sandbox import Job, Limits, check_output, run_many, run_program, run_tests

LIMITS = Limits(seconds=10, memory_mb=256)
SHORT = Limits(seconds=1)
TESTS = "assert double(2) == 4\nassert double([1]) == [1, 1]\n"


def judge(program, tests=TESTS, limits=LIMITS):
    verdict = run_tests(program, tests, limits=limits)
    assert verdict.status != "error", verdict
    return verdict


def test_right_and_wrong_programs():
    assert judge("def double(x): return x + x").passed
    wrong = judge("def double(x): return x")
    assert (wrong.status, wrong.detail) == ("failed", "AssertionError (line 1)")
    assert "name 'double' is not defined" in judge("def other(x): return x").detail
    assert "SyntaxError" in judge("def double(x) return x").detail
    raised = judge("def double(x): return {}[x]")
    assert raised.status == "failed"
    assert "KeyError" in raised.detail


def test_values_travel_unchanged():
    program = "def same(x): return x\nCONSTANT = (1, {2: [3.5]})"
    tests = """
import collections, decimal, fractions
values = [None, True, 0, -(10**400), 0.1, float("inf"), 1 + 2j, "é\\ud800", b"\\0", [(), [1]], {1, 2}, frozenset({"a"}),
          {(1, 2): {"k": None}}, range(1, 9, 2), collections.deque([1, 2]), decimal.Decimal("1.10"),
          fractions.Fraction(1, 3)]
for value in values:
    assert same(value) == value and type(same(value)) is type(value), value
assert str(same(float("nan"))) == "nan"
assert CONSTANT == (1, {2: [3.5]})
"""
    assert judge(program, tests).passed


def test_arguments_changed_in_place_objects_exceptions_and_modules():
    program = """
import math
math.isclose = lambda *a: True
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x); return self
def sort(x): x.sort()
def count(n): yield from range(n)
def fail(): raise ValueError("no")
"""
    tests = """
numbers = [3, 1, 2]
sort(numbers)
assert numbers == [1, 2, 3]
assert list(count(3)) == [0, 1, 2]
assert Stack().push(1).push([2]).items == [1, [2]]
try:
    fail()
except ValueError as error:
    assert str(error) == "no"
else:
    assert False
assert not math.isclose(1, 2)
"""
    assert judge(program, tests).passed


def test_faults_of_the_tests_are_no_verdict_on_the_program():
    assert run_tests("x = 1", "assert (", limits=LIMITS).status == "error"
    assert run_tests("def f(g): return g(1)", "assert f(lambda x: x) == 1", limits=LIMITS).status == "error"


FORGERIES = {
    "exits with success": "import sys; sys.exit(0)",
    "leaves at once": "import os; os._exit(0)",
    "leaves when called": "import os\ndef double(x): os._exit(0)",
    "exits when called": "def double(x): raise SystemExit(0)",
    "exits late": "import atexit, os; atexit.register(os._exit, 0)",
    "prints a verdict": 'print("passed"); print(\'{"status": "passed", "exit": 0}\')',
    "equals everything": """
class Yes:
    __eq__ = __ne__ = __bool__ = lambda *a: True
    __hash__ = lambda self: 0
def double(x): return Yes()""",
    "is a list that equals everything": """
class Yes(list):
    __eq__ = lambda *a: True
def double(x): return Yes()""",
    "replaces builtins": """
import builtins
for name in ("AssertionError", "compile", "exec", "eval", "isinstance", "len"):
    setattr(builtins, name, lambda *a, **k: True)
def double(x): return None""",
    "shadows builtins and dunders": "__builtins__ = {}\n__name__ = 'passed'\ndef double(x): return None",
    "writes to every descriptor": """
import os
def double(x):
    for fd in range(64):
        for line in (b'{"status": "passed", "exit": 0, "ended": "exited"}\\n', b"passed\\n"):
            try: os.write(fd, line)
            except OSError: pass
    os._exit(0)""",
    "closes every descriptor": "import os; os.closerange(0, 64)\ndef double(x): return None",
    "looks for the answer in frames and memory": """
import gc, sys
backwards = "4 == )2(elbuod"
def double(x):
    frame = sys._getframe()
    while frame:
        if backwards in (str(frame.f_locals) + str(frame.f_globals))[::-1]: return x + x
        frame = frame.f_back
    if any(backwards in v[::-1] for o in gc.get_objects() if type(o) in (dict, list, tuple) for v in
           (list(o.values()) if type(o) is dict else o) if type(v) is str): return x + x""",
    "replaces the channel's functions": """
import gc, types
def double(x):
    for f in gc.get_objects():
        if isinstance(f, types.FunctionType) and f.__module__ == "_guest" and f.__name__ in ("_name", "_message"):
            f.__code__ = (lambda *a: "passed").__code__
    raise ValueError""",
}


@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES)
def test_forged_success_is_failure(program):
    verdict = judge(program)
    assert verdict.status == "failed", verdict


FORBIDDEN = {
    "forks": "import os; os.fork()",
    "fork bomb": "import os\nwhile True: os.fork()",
    "starts a process": "import subprocess; subprocess.run(['true'])",
    "opens a socket": "import socket; socket.socket().connect(('127.0.0.1', 80))",
    "kills its parent": "import os; os.kill(os.getppid(), 9)",
    "kills its group": "import os; os.killpg(0, 9)",
    "writes outside": "open('/tmp/../usr/x', 'w')",
    "removes a system file": "import os; os.remove('/usr/bin/env')",
    "loads a C library": "import ctypes; ctypes.CDLL(None).getpid()",
    "swallows the refusal": "import os\ntry: os.fork()\nexcept OSError: pass\ndef double(x): return x + x",
}


@pytest.mark.parametrize("program", FORBIDDEN.values(), ids=FORBIDDEN)
def test_forbidden_actions(program):
    verdict = judge(program)
    assert verdict.status == "forbidden", verdict


# The same without the audit hook, which a program can get around: what the kernel refuses.
AROUND_THE_HOOK = """
import gc, types
for f in gc.get_objects():
    if isinstance(f, types.FunctionType) and f.__name__ == "refuse":
        f.__code__ = (lambda event, subject: None).__code__.replace(co_freevars=f.__code__.co_freevars)
"""


@pytest.mark.parametrize(
    ("needs", "action"),
    [
        ("network", "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=1)"),
        ("network", "import socket; socket.create_connection(('203.0.113.1', 80), timeout=1)"),
        ("files", "open('/usr/jaxlm-sandbox-test', 'w')"),
        ("files", "open(HOME)"),
        ("files", "open(f'/proc/{os.getppid()}/mem', 'rb')"),
        ("processes", "os.kill(HOST, 9)"),
        ("processes", "[os.fork() for _ in range(20)]"),
        ("processes", "import ctypes; c = ctypes.CDLL(None); assert c.unshare(1 << 29) == 0"),
    ],
)
def test_the_kernel_refuses_what_gets_around_the_hook(needs, action, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        values = f"import os; PORT = {server.getsockname()[1]}; HOME = {str(secret)!r}; HOST = {os.getpid()}\n"
        hooked = run_program(AROUND_THE_HOOK + "import os; os.kill(os.getpid(), 0); print('around')", limits=LIMITS)
        if "around" not in hooked.stdout or needs not in hooked.isolation:
            pytest.skip(f"no isolation of '{needs}' here, or no way around the hook")
        verdict = run_program(AROUND_THE_HOOK + values + action + "\nprint('done')", limits=LIMITS)
    assert not verdict.passed
    assert "done" not in verdict.stdout


def test_namespaces_are_used_where_the_kernel_grants_them():
    probe = ["unshare", "--user", "--map-root-user", "--net", "--pid", "--mount", "--fork", "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip("no namespaces here")
    assert {"network", "processes", "files"} <= set(run_program("", limits=LIMITS).isolation)


def test_reads_nothing_of_the_parent():
    program = "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').read(1)"
    verdict = judge(program)
    assert verdict.status == "failed"
    assert "FileNotFoundError" in verdict.detail or "PermissionError" in verdict.detail


ENDLESS = {
    "loops": "while True: pass",
    "loops when called": "def double(x):\n while True: pass",
    "sleeps": "import time; time.sleep(1000)",
    "sleeps ignoring signals": """
import signal, time
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True:
    try: time.sleep(1000)
    except BaseException: pass""",
    "floods": "while True: print('x' * 10000)",
    "floods after closing": "import os\nos.close(1); os.close(2)\nwhile True: pass",
    "waits in a thread": "from threading import *; Thread(target=Event().wait).start(); Event().wait()",
    "holds the interpreter": "def double(x): return 7 ** (10 ** 9)",
}


@pytest.mark.parametrize("program", ENDLESS.values(), ids=ENDLESS)
def test_endless_programs_time_out(program):
    verdict = judge(program, limits=SHORT)
    assert verdict.status == "timeout", verdict
    assert len(verdict.stdout) <= SHORT.output_bytes


@pytest.fixture
def without_namespaces(tmp_path, monkeypatch):
    """The sandbox as it is where the kernel grants no namespaces."""
    folder = os.path.dirname(sandbox.__file__)
    warden = tmp_path / "warden.py"
    warden.write_text(f"""
import sys
sys.path.insert(0, {folder!r})
import _isolation, _jail
def refuse(*args): raise OSError("no namespaces")
_isolation.enter_namespaces = _isolation.enter_user_namespace = refuse
_jail.main(int(sys.argv[1]), int(sys.argv[2]))
""")
    monkeypatch.setattr(sandbox, "_WARDEN", str(warden))


@pytest.mark.usefixtures("without_namespaces")
def test_without_namespaces_the_verdicts_are_the_same():
    right = judge("def double(x): return x + x")
    assert right.passed
    assert not {"network", "processes", "files"} & set(right.isolation)
    assert judge(FORGERIES["equals everything"]).status == "failed"
    assert judge(FORGERIES["writes to every descriptor"]).status == "failed"
    for name in ("fork bomb", "opens a socket", "kills its parent", "writes outside"):
        assert judge(FORBIDDEN[name]).status == "forbidden", name
    assert judge(ENDLESS["sleeps ignoring signals"], limits=SHORT).status == "timeout"
    assert judge("x = bytearray(1 << 30)").status == "out_of_memory"
    spying = "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb')\ndef double(x): return x + x"
    assert judge(spying).status == "failed"


@pytest.mark.usefixtures("without_namespaces")
def test_without_namespaces_orphans_are_swept_up():
    marker = f"orphan-{os.getpid()}"
    program = AROUND_THE_HOOK + f"""
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv({sys.executable!r}, [{sys.executable!r}, "-c", "import time; time.sleep(60)", {marker!r}])
    os._exit(0)
os.wait()
print("started")
"""
    assert run_program(program, limits=LIMITS).stdout == "started\n"
    assert marker not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_memory_is_limited():
    growing = "x = []\nwhile True: x += [0] * 9999"
    for program in ("x = bytearray(1 << 30)", "def double(x): return 'a' * (1 << 30)", growing):
        assert judge(program).status == "out_of_memory"


def test_files_only_in_a_fresh_folder_and_of_limited_size():
    program = "import os\nassert os.listdir() == []\nopen('x', 'w').write('y')\nprint(open('x').read())"
    for _ in range(2):
        assert run_program(program, limits=LIMITS).stdout == "y\n"
    large = run_program("open('x', 'wb').write(bytes(1 << 22))", limits=LIMITS)
    assert large.status == "failed"
    assert "OSError" in large.detail


def test_programs_alone():
    assert check_output("print(int(input()) + 1)", "41\n", "42").passed
    differing = check_output("print(1)\nprint(2)", "", "1\n3\n")
    assert (differing.status, differing.detail) == ("failed", "line 2 of the output is '2', expected '3'")
    assert check_output("print(1)\nimport sys; sys.exit(3)", "", "1").detail == "exit code 3"
    assert run_program("import sys; sys.exit(0)", limits=LIMITS).passed
    assert run_program("raise KeyError(1)", limits=LIMITS).stderr.endswith("KeyError: 1\n")
    forged = """
import os
for fd in range(3, 64):
    try: os.write(fd, b'{"exit": 0}\\n' * 9999)
    except OSError: pass
os._exit(5)"""
    assert run_program(forged, limits=LIMITS).detail == "exit code 5"
    assert "SECRET" not in run_program("import os; print(os.environ)", limits=LIMITS).stdout


def test_the_environment_is_clean(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    seen = run_program("import os, sys; print(dict(os.environ), sys.path)", limits=LIMITS)
    assert seen.passed
    assert "hunter2" not in seen.stdout
    assert "/somewhere" not in seen.stdout


def test_many_jobs_keep_their_order():
    jobs = [Job(f"def f(): return {i % 3}", "assert f() != 1") for i in range(7)]
    assert [v.passed for v in run_many(jobs, workers=2, limits=LIMITS)] == [i % 3 != 1 for i in range(7)]


def test_a_starved_timeout_is_tried_again_alone(monkeypatch):
    runs = []

    def run(job, limits):
        runs.append(job)
        cpu = {"starved": 0.1, "busy": 1.0}[job.program]
        status = "passed" if runs.count(job) == 2 else "timeout"
        return sandbox.Verdict(status, "", seconds=1.0, cpu_seconds=cpu)

    monkeypatch.setattr(sandbox, "run", run)
    assert [v.status for v in run_many([Job("starved"), Job("busy")], workers=2)] == ["passed", "timeout"]


def test_nothing_is_left_behind():
    before = set(os.listdir(tempfile.gettempdir()))
    run_program("import time\nopen('x', 'w').write('y')\ntime.sleep(60)", limits=SHORT)
    wardens = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True).stdout.splitlines()
    assert not [line for line in wardens if line.split()[0] == str(os.getpid()) and "_jail.py" in line]
    new = [name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("jail-")]
    # Tests beside this one have jails of their own, which go within their limits.
    deadline = time.monotonic() + 60
    while left := [name for name in new if os.path.exists(os.path.join(tempfile.gettempdir(), name, "root"))]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_importing_the_sandbox_imports_no_jax():
    code = "import sys, jaxlm.verify.code, jaxlm.verify.answers; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bad_limits_are_named():
    with pytest.raises(ConfigError, match="'seconds' of the sandbox is 0"):
        Limits(seconds=0)
    with pytest.raises(ConfigError, match="workers is 0"):
        run_many([], workers=0)
    with pytest.raises(ConfigError, match="both 'tests' and 'expected_stdout'"):
        Job("", tests="", expected_stdout="")
