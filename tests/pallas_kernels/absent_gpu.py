"""Compiles for an H200 that is not here: jax's CUDA plug-in is the compiler (`make_cuda_environment.sh`)."""

import importlib.util

import numpy as np
import pytest

needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax's CUDA 13 plug-in is missing"
)

# The H200 as XLA's GpuTargetConfigProto, with what its compiler asks for.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 1 patch: 0 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H200"
"""


def sharding():
    """Of arrays that lie on one such GPU."""
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    found = topologies.get_topology_desc(platform="cuda", topology_name="h200", topology="1x1x1", target_config=H200)
    mesh = Mesh(np.array(found.devices)[:1], ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec())
