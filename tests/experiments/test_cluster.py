"""What the launcher starts, for the environments of a laptop, a TPU slice and a SLURM job."""

import shlex
import sys

import pytest

from experiments import cluster

JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_ON_NODE": "8"}
HERE = [sys.executable, "-m", "experiments.pretrain", "--preset", "llama_1b"]
WORDS = ["pretrain", "--preset", "llama_1b"]


def test_here_where_nothing_else_is_named():
    assert cluster.command(WORDS, {}) == HERE
    assert cluster.command(["--", *WORDS], {"TPU_WORKER_HOSTNAMES": "a,b"}) == HERE


def test_a_slurm_job_gets_one_task_for_each_gpu():
    srun = ["srun", "--nodes=4", "--ntasks=32", "--ntasks-per-node=8", "--kill-on-bad-exit=1", "--label"]
    assert cluster.command(WORDS, JOB) == [*srun, *HERE]
    # The batch script is a step of its own with a number like no other.
    assert cluster.command(WORDS, {**JOB, "SLURM_STEP_ID": "4294967291"})[0] == "srun"
    # A task of srun runs the experiment.
    assert cluster.command(WORDS, {**JOB, "SLURM_STEP_ID": "0", "SLURM_PROCID": "3"}) == HERE


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, 8),
        ({"SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_NODE": "2"}, 2),
        ({}, 0),
    ],
)
def test_gpus_of_a_node(environ, expected):
    assert cluster.gpus_per_node(environ) == expected


def test_nodes_without_gpus_have_one_task_each():
    found = cluster.srun({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"})
    assert found[1:4] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]


def test_a_tpu_slice_runs_the_same_command_on_all_workers():
    words = ["--tpu", "pod", "--zone=us-east5-a", "--dir", "~/my code", "--", "pretrain", "--prompts", "def f():", "x"]
    found = cluster.command(words, JOB)
    assert found[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    assert found[6:8] == ["--zone=us-east5-a", "--worker=all"]
    script = found[8].removeprefix("--command=")
    assert script.startswith("cd ~/'my code' && ")
    run = script[script.index("exec ") :]
    assert shlex.split(run) == ["exec", "python3", "-m", "experiments.pretrain", "--prompts", "def f():", "x"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "which experiment"),
        (["--tpu"], "--tpu needs a value"),
        (["--zone", "z", "pretrain"], "--zone belongs to --tpu"),
        (["--tpus", "x", "pretrain"], "no option '--tpus'"),
    ],
)
def test_bad_options_are_refused_by_name(argv, message, capsys):
    assert cluster.main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_prints_and_runs_nothing(capsys):
    assert cluster.main(["--dry_run", "--tpu", "pod", "pretrain"]) == 0
    assert capsys.readouterr().out.startswith("gcloud compute tpus tpu-vm ssh pod --worker=all")


def test_help_says_how(capsys):
    assert cluster.main(["--help"]) == 0
    assert "sbatch --nodes 4" in (said := capsys.readouterr().out)
    assert cluster.USAGE in said


def test_a_missing_program_is_named(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert cluster.main(["--tpu", "pod", "pretrain"]) == 2
    assert "no program 'gcloud'" in capsys.readouterr().err
