"""The device that a program is traced for, what its chip can do, and why a kernel was not used."""

import dataclasses
import logging
import math
import os
import re
from typing import Any

import jax

DEBUG = "PALLAS_KERNELS_DEBUG"
"""Environment variable: set to `1`, every call logs, while traced, what it chose and why."""

logger = logging.getLogger("pallas_kernels")


class KernelError(ValueError):
    """Arguments that do not fit together, or a forced implementation that cannot do what is asked."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for: `platform` is `cpu`, `gpu` or `tpu`, `kind` the maker's name of the device.

    `devices`: over how many of them XLA may cut arrays here; inside `jax.shard_map` each is alone.
    """

    platform: str
    kind: str = ""
    devices: int = 1

    @property
    def chip(self) -> "Chip | None":
        """What is known of a TPU; `None` for other platforms and unknown kinds."""
        return CHIPS.get(KINDS.get(self.kind, ""))

    @property
    def hopper(self) -> bool:
        """Whether it is an NVIDIA GPU of that generation."""
        return self.platform == "gpu" and re.search(r"\bG?H(20|100|200|800)\b", self.kind) is not None


@dataclasses.dataclass(frozen=True)
class Chip:
    """`vmem`: bytes of vector memory a core; `int8_matmul`: whether int8 products are faster than bfloat16's."""

    vmem: int
    int8_matmul: bool


# Facts as in jax.experimental.pallas.tpu's own table (`get_tpu_info`).
CHIPS = {
    "v4": Chip(16 << 20, False),
    "v5e": Chip(128 << 20, True),
    "v5p": Chip(64 << 20, True),
    "v6e": Chip(128 << 20, True),
    "v7": Chip(64 << 20, False),
}
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7",
    "TPU7": "v7",
}


def current(*arrays: Any) -> Target:
    """The target of the ambient mesh (`jax.set_mesh`); without one that of the mesh or devices that the arrays lie on,
    else the default device's.

    A mesh of devices that are not here (compiling ahead of time) counts like any other.
    """
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None) for x in arrays]
    for mesh in meshes:
        device = getattr(mesh, "abstract_device", None)
        if device is not None and not mesh.empty:
            free = math.prod(size for name, size in mesh.shape.items() if name not in mesh.manual_axes)
            return Target(_platform(device.platform), device.device_kind, free)
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
            devices = list(array.devices())
            return Target(_platform(devices[0].platform), devices[0].device_kind, len(devices))
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return Target(_platform(device.platform), device.device_kind)


def explain(message: str) -> None:
    """Logs `message` if debugging is on."""
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        logger.warning(message)


def _platform(name: str) -> str:
    return "gpu" if name in ("cuda", "rocm") else name
