"""Starts an experiment on every host of a machine: a TPU pod slice, the nodes of a SLURM job, or this one.

From anywhere with `gcloud`, on all workers of a TPU VM slice (the code is there already, in the folder `--dir`, with
its virtual environment in `.venv` if it has one):

    python -m experiments.cluster --tpu my-v5p-64 --zone us-east5-a -- pretrain --preset llama_1b --out gs://bucket/run

From a login node, or inside a batch script, on all GPUs of a SLURM job (one process a GPU):

    sbatch --nodes 4 --gpus-per-node 8 --requeue --signal TERM@120 \
        --wrap "python -m experiments.cluster pretrain --preset llama_1b --out /shared/run"

Without `--tpu` the environment decides: in a SLURM job that has no tasks yet it starts them with `srun`; anywhere else
it runs the experiment here (so a script that runs on every host may use it, too). `--dry_run` prints the command.
The run folder must be one that all hosts share. A run that was stopped, or that lost a host, resumes when the same
command is given again; SLURM does so by itself with `--requeue`.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence

USAGE = "usage: python -m experiments.cluster [--tpu NAME [--zone Z] [--project P] [--dir D]] [--dry_run] [--] NAME ..."

_VALUES = ("--tpu", "--zone", "--project", "--dir")


def main(argv: Sequence[str]) -> int:
    """Runs the command that `command` makes of the words, and returns its exit code."""
    if argv[:1] in (["--help"], ["-h"]):
        print(f"{__doc__.strip()}\n\n{USAGE}")
        return 0
    try:
        words = command(argv, os.environ)
    except ValueError as error:
        print(f"error: {error}\n{USAGE}", file=sys.stderr)
        return 2
    print(shlex.join(words), flush=True)
    if "--dry_run" in split(argv)[0]:
        return 0
    try:
        return subprocess.run(words).returncode
    except FileNotFoundError:
        print(f"error: there is no program '{words[0]}' on this machine", file=sys.stderr)
        return 2


def command(argv: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The words of the command that starts the experiment on all hosts that the options and the environment name.

    Raises `ValueError` for options that mean nothing.
    """
    options, words = split(argv)
    if not words:
        raise ValueError("which experiment? for example: pretrain --preset small")
    if options.get("--tpu"):
        return tpu_command(options, words)
    for name in ("--zone", "--project", "--dir"):
        if name in options:
            raise ValueError(f"{name} belongs to --tpu NAME")
    here = [sys.executable, "-m", f"experiments.{words[0]}", *words[1:]]
    return [*srun(environ), *here] if waits_for_tasks(environ) else here


def split(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The launcher's own options, and the words after them."""
    options: dict[str, str] = {}
    rest = list(argv)
    while rest and rest[0].startswith("--"):
        word = rest.pop(0)
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if name == "--dry_run":
            options[name] = ""
        elif name not in _VALUES:
            raise ValueError(f"no option '{name}' before the experiment's name")
        elif equals:
            options[name] = value
        elif not rest:
            raise ValueError(f"{name} needs a value")
        else:
            options[name] = rest.pop(0)
    return options, rest


def tpu_command(options: Mapping[str, str], words: Sequence[str]) -> list[str]:
    """`gcloud` running the experiment on every worker of a slice; JAX finds the other workers by itself."""
    folder = options.get("--dir", "jaxlm")
    run = shlex.join(["python3", "-m", f"experiments.{words[0]}", *words[1:]])
    # The worker's shell puts its own home for ~, which it must not be quoted for.
    place = "~/" + shlex.quote(folder[2:]) if folder.startswith("~/") else shlex.quote(folder)
    there = f"cd {place} && if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi && exec {run}"
    where = [f"{name}={options[name]}" for name in ("--zone", "--project") if options.get(name)]
    return [
        *("gcloud", "compute", "tpus", "tpu-vm", "ssh", options["--tpu"]),
        *(*where, "--worker=all", f"--command={there}"),
    ]


def waits_for_tasks(environ: Mapping[str, str]) -> bool:
    """Whether this is the batch script or shell of a SLURM job, rather than one of its tasks."""
    return "SLURM_JOB_ID" in environ and environ.get("SLURM_STEP_ID") in (None, "", "4294967291", "4294967290")


def srun(environ: Mapping[str, str]) -> list[str]:
    """`srun` for one process a GPU (a node, where there are none) on all nodes of the job; one that dies ends all."""
    per_node = gpus_per_node(environ)
    nodes = int(environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
    return [
        *("srun", f"--nodes={nodes}", f"--ntasks={nodes * max(per_node, 1)}"),
        *(f"--ntasks-per-node={max(per_node, 1)}", "--kill-on-bad-exit=1", "--label"),
    ]


def gpus_per_node(environ: Mapping[str, str]) -> int:
    """The GPUs of each node, as SLURM says it in one of its ways: `8`, `h100:8`."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        text = environ.get(name, "").rsplit(":", 1)[-1]
        if text.isdecimal():
            return int(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
