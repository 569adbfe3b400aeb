"""Machines that are not here: the devices to compile for, and what their chips can do.

TPU topologies come from `libtpu`, which compiles without any TPU; the H200 from jax's CUDA plug-in, which compiles
without any GPU. Neither is needed to import this module.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

from jaxlm.core.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, per second and in bytes; dense bfloat16 products. The makers' figures."""

    name: str
    memory: float
    flops: float
    bandwidth: float
    """Of the main memory."""
    interconnect: float
    """Bytes that the chip sends to its neighbors, all links together."""
    clock: float | None = None
    """Cycles in which the compiler estimates."""


# cloud.google.com/tpu/docs (v5e, v5p, v6e: memory, peak, bandwidth, interchip interconnect); clocks: peak divided by
# 2 x 128 x 128 x 4 (v5e), x 8 (v5p), and 2 x 256 x 256 x 4 (v6e) operations a cycle. H200 SXM: NVIDIA's data sheet.
CHIPS = {
    "v5e": Chip("TPU v5e", 16 * 2**30, 197e12, 819e9, 200e9, 1.5e9),
    "v5p": Chip("TPU v5p", 95 * 2**30, 459e12, 2765e9, 600e9, 1.75e9),
    "v6e": Chip("TPU v6e", 32 * 2**30, 918e12, 1640e9, 448e9, 1.75e9),
    "h200": Chip("NVIDIA H200", 141e9, 989e12, 4800e9, 450e9),
}

# Slices that can be rented.
SHAPES: dict[str, tuple[str, ...]] = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": (
        *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x12", "8x8x16"),
        *("8x16x16", "16x16x16", "16x16x24"),
    ),
    "h200": ("1", "2", "4", "8"),
}

INSTALL_LIBTPU = (
    "planning for TPUs needs libtpu, which compiles on any Linux machine: pip install '.[tpu]'"
)
INSTALL_CUDA = (
    "planning for GPUs needs jax's CUDA plug-in, in an environment of its own beside a CPU jax of the same version: "
    "python -m venv cuda && cuda/bin/pip install '.[cuda]', then run with cuda/bin/python (4.4 GB, no GPU needed)"
)

# What XLA asks of the GPU that it compiles for, in the text form of its GpuTargetConfigProto.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 1 patch: 0 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H200"
"""


_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # several processes may compile at a time
    # libtpu asks nobody what machine it runs on, and does not complain that it is none; any answer will do.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """`name` as given (`v5e:16x16`), its devices for a mesh (one a chip), and their chip."""

    name: str
    chip: Chip
    devices: Sequence[Any]


def prepare_environment() -> None:
    """Settings of libtpu and the CUDA plug-in without hardware; call it before JAX makes its first array."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def parse_topology(name: str) -> tuple[str, tuple[int, ...]]:
    """The generation and shape that a name like `v5e:16x16`, `v5p:2x4x4`, `h200` or `h200:8` stands for.

    Raises:
      ConfigError: there is no such machine; says which come nearest.
    """
    kind, _, shape = name.lower().partition(":")
    if kind not in SHAPES:
        examples = [f"{k}:{SHAPES[k][-1]}" for k in SHAPES]
        raise ConfigError(f"topology '{name}': no machine '{kind}', {nearest(kind, SHAPES)}; for example {examples}")
    shape = shape or ("1" if kind == "h200" else "")
    if shape not in SHAPES[kind]:
        near = ", ".join(f"{kind}:{s}" for s in _nearest_shapes(shape, SHAPES[kind]))
        raise ConfigError(f"topology '{name}' does not exist; the nearest are {near}")
    return kind, tuple(map(int, shape.split("x")))


def num_chips(name: str) -> int:
    """The number of chips of a topology."""
    return math.prod(parse_topology(name)[1])


def find_topology(name: str) -> Topology:
    """The devices that a name stands for.

    Raises:
      ConfigError: there is no such machine, or what compiles for it is not installed (says how to install it).
    """
    kind, shape = parse_topology(name)
    prepare_environment()
    from jax.experimental import topologies

    if kind == "h200":
        devices = _gpus(topologies, math.prod(shape))
    else:
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError(f"topology '{name}': {INSTALL_LIBTPU}")
        options = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(shape) == 1 else {}
        text = f"{kind}:{'x'.join(map(str, shape))}"
        devices = topologies.get_topology_desc(platform="tpu", topology_name=text, **options).devices
    return Topology(name, CHIPS[kind], list(devices))


def _gpus(topologies: Any, count: int) -> Sequence[Any]:
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(importlib.util.find_spec(plugin) for plugin in plugins):
        raise ConfigError(f"topology 'h200': {INSTALL_CUDA}")
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="h200", topology=f"1x{count}x1", target_config=_H200
    )
    return found.devices


def _nearest_shapes(shape: str, known: Sequence[str]) -> list[str]:
    sizes = [int(part) for part in shape.split("x") if part.isdigit()]
    if not sizes or "x".join(map(str, sizes)) != shape:
        return difflib.get_close_matches(shape, known, n=3, cutoff=0.0)
    wanted = math.log(max(1, math.prod(sizes)))
    return sorted(known, key=lambda s: abs(math.log(math.prod(map(int, s.split("x")))) - wanted))[:3]
