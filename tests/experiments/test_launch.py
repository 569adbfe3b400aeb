"""The process set-up: what is set, when the process restarts itself, and that it never does twice."""

import os
import sys

import pytest

from experiments import launch


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A Linux machine with glibc and no accelerator, whatever this one is."""
    monkeypatch.setattr(launch, "_glibc_has_huge_pages", lambda: True)
    monkeypatch.setattr(launch, "ACCELERATORS", {})


@pytest.fixture
def restarts(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda *args: calls.append(args))
    return calls


def test_the_process_restarts_once_with_its_own_command_line(restarts, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-m", "experiments.x", "--name", "a b"])
    environ = {"HOME": "/home/x"}
    launch.prepare_environment(environ)
    ((executable, argv, env),) = restarts
    assert executable == sys.executable
    assert argv == [sys.executable, "-X", "dev", "-m", "experiments.x", "--name", "a b"]
    assert env["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    launch.prepare_environment(env)  # what the restarted process does
    launch.prepare_environment({key: value for key, value in env.items() if key != "GLIBC_TUNABLES"})
    assert len(restarts) == 1


def test_tunables_of_the_user_are_kept():
    assert launch.huge_page_tunables({"GLIBC_TUNABLES": "glibc.malloc.check=3"}) == (
        "glibc.malloc.check=3:glibc.malloc.hugetlb=1"
    )
    assert launch.huge_page_tunables({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) is None


@pytest.mark.parametrize(
    "environ", [{"JAXLM_HUGE_PAGES": "0"}, {"JAX_PLATFORMS": "tpu,cpu"}, {"JAX_PLATFORMS": "cuda"}]
)
def test_no_restart_when_switched_off_or_on_an_accelerator(environ):
    assert launch.huge_page_tunables(environ) is None


def test_no_restart_without_a_glibc_that_can(monkeypatch):
    monkeypatch.setattr(launch, "_glibc_has_huge_pages", lambda: False)
    assert launch.huge_page_tunables({}) is None


@pytest.mark.parametrize(
    ("device", "package", "cpu"),
    [(True, True, False), (True, False, True), (False, True, True), (False, False, True)],
)
def test_an_accelerator_counts_when_jax_could_use_it(monkeypatch, tmp_path, device, package, cpu):
    path = tmp_path if device else tmp_path / "absent"
    monkeypatch.setattr(launch, "ACCELERATORS", {str(path): ("json" if package else "no_such_package",)})
    assert launch.runs_on_cpu({}) is cpu
    assert launch.runs_on_cpu({"JAX_PLATFORMS": "cpu"}) is True


def test_the_compilation_cache_is_set_unless_the_user_did():
    settings = launch.cache_settings({"XDG_CACHE_HOME": "/cache"})
    assert settings["JAX_COMPILATION_CACHE_DIR"].startswith("/cache/jaxlm/xla-")
    assert settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0"
    assert launch.cache_settings({"JAX_COMPILATION_CACHE_DIR": ""}) == {}
    assert launch.cache_settings({"JAXLM_COMPILATION_CACHE": "0"}) == {}
    kept = launch.cache_settings({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "5"})
    assert list(kept) == ["JAX_COMPILATION_CACHE_DIR"]


def test_several_cpu_devices_get_four_threads_each(monkeypatch):
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 2)
    on_cpu = {"JAX_PLATFORMS": "cpu"}
    assert launch.thread_settings({**on_cpu, "JAX_NUM_CPU_DEVICES": "8"}) == {"PJRT_NPROC": "32"}
    forced = "--xla_dump_to=x --xla_force_host_platform_device_count=4"
    assert launch.thread_settings({**on_cpu, "XLA_FLAGS": forced}) == {"PJRT_NPROC": "16"}
    assert launch.thread_settings({**on_cpu, "JAX_NUM_CPU_DEVICES": "1"}) == launch.thread_settings(on_cpu) == {}
    assert launch.thread_settings({**on_cpu, "JAX_NUM_CPU_DEVICES": "8", "PJRT_NPROC": "9"}) == {}
    assert launch.thread_settings({"JAX_PLATFORMS": "cuda", "JAX_NUM_CPU_DEVICES": "8"}) == {}


def test_the_names_of_the_variables_are_those_jax_reads():
    import jax

    for name in launch.cache_settings({}):
        assert hasattr(jax.config, name.lower()), name


@pytest.mark.parametrize(
    ("argv", "prepared"),
    [
        (["python", "-m", "experiments", "list"], False),
        (["python", "-m", "experiments.runner"], True),
        (["python", "-Xdev", "-um", "experiments.runner", "experiments.x"], True),
        (["python", "-mexperiments.runner"], True),
        (["python", "-m", "pytest", "tests/experiments"], False),
    ],
)
def test_only_an_experiment_is_prepared(monkeypatch, argv, prepared):
    calls = []
    monkeypatch.setattr(sys, "orig_argv", argv)
    monkeypatch.setattr(launch, "prepare_environment", lambda: calls.append(1))
    launch.prepare()
    assert bool(calls) is prepared


def test_a_module_that_does_not_exist_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "experiments.optimization.nothing"])
    with pytest.raises(SystemExit) as end:
        launch.prepare()
    assert end.value.code == 2
    assert "no experiment 'experiments.optimization.nothing'" in capsys.readouterr().err
