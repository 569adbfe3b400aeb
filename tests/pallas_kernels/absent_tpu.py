"""Compiles programs for TPUs that are not here, with `libtpu` (an ordinary dependency of the tests on Linux x86-64)."""

import functools
import os
import warnings

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

# Read when the library is loaded: there is no metadata server to ask, and other processes may load it too.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


@functools.cache
def devices(name: str) -> list[jax.Device]:
    """The four absent chips of a host: `v5e`, `v5p` or `v6e`."""
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[name]).devices


@functools.cache
def chip(name: str) -> Mesh:
    """A mesh of one absent chip."""
    return Mesh(np.array(devices(name))[:1], ("data",), axis_types=(AxisType.Auto,))


def compiled(f, mesh: Mesh, *shapes: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """`jax.jit(f)` compiled for the mesh's first device."""
    sharding = NamedSharding(mesh, PartitionSpec())
    lowered = jax.jit(f).lower(*(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes))
    with warnings.catch_warnings():
        # Programs for absent chips cannot be read back from the cache of compiled programs.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
        return lowered.compile()
