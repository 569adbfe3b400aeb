"""Compiles for TPUs that are not here: `libtpu` is the compiler, and part of the `test` extra."""

import contextlib
import functools
import os

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
KERNEL_CHIPS = ("v5e", "v5p", "v6e")
"""Every kernel and table of tiles is compiled for these."""


# Read when the library is loaded: there is no metadata server to ask, and other processes may load it too.
for _name, _value in {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}.items():
    os.environ.setdefault(_name, _value)


@functools.cache
def devices(chip: str) -> list[jax.Device]:
    """The four chips of a small topology, or all of one that is named whole (`v5e:2x4`).

    Fails without `libtpu`: no silent skips.
    """
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS.get(chip, chip)).devices


@functools.cache
def mesh(chip: str, shape: tuple[int, ...] = (1,), names: tuple[str, ...] = ("all",)) -> Mesh:
    """A mesh of some of these."""
    types = (jax.sharding.AxisType.Auto,) * len(names)
    return Mesh(np.array(devices(chip)[: int(np.prod(shape))]).reshape(shape), names, axis_types=types)


def compile_for(on: Mesh, function, *args, specs=None):
    """Compiles `function` for the mesh; `args` are trees of arrays' shapes, `specs` their partition (else whole)."""
    specs = specs or (PartitionSpec(),) * len(args)

    def place(arg, spec):
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(on, spec)), arg
        )

    with jax.set_mesh(on), no_disk_cache():
        return jax.jit(function).lower(*map(place, args, specs)).compile()


@contextlib.contextmanager
def no_disk_cache():
    """Keeps what is compiled inside out of the compilation cache: programs for absent devices cannot be read back."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
