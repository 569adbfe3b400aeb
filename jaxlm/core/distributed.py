"""Joining the processes of a pod or cluster; nothing to do, and nothing done, on a single machine."""

import os

import jax

from jaxlm.core.errors import ConfigError

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def initialize() -> bool:
    """Joins this process to the others if there are others; call it before anything touches a device.

    Processes find one another through `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` where these are set, else through what JAX detects by itself (Cloud TPU slices, SLURM,
    Open MPI). Returns whether there is more than one process.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    given = [name for name in _EXPLICIT if os.environ.get(name)]
    if given:
        missing = [name for name in _EXPLICIT if name not in given]
        if missing:
            raise ConfigError(f"{', '.join(given)} set but not {', '.join(missing)}: set all three or none")
        jax.distributed.initialize(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )
    elif _in_cluster():
        jax.distributed.initialize()
    else:
        return False
    return jax.process_count() > 1


def _in_cluster() -> bool:
    hosts = [h for h in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]
    if len(hosts) > 1 or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    return any(int(os.environ.get(name) or 1) > 1 for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes shared files."""
    return jax.process_index() == 0
