"""The device that a program is traced for, what its chip can do, and why a kernel was not used."""

import dataclasses
import os
import sys
from typing import Any

import jax

DEBUG = "PALLAS_KERNELS_DEBUG"
"""Environment variable: set to `1`, every call says on the error stream, while traced, what it chose and why."""


class KernelError(ValueError):
    """Arguments that do not fit together, or a forced implementation that cannot do what is asked."""


@dataclasses.dataclass(frozen=True)
class Target:
    """`platform` is `cpu`, `gpu` or `tpu`; `kind` the maker's name of the device; `devices` the size of the mesh."""

    platform: str
    kind: str
    devices: int

    @property
    def chip(self) -> "Chip | None":
        """What is known of a TPU; `None` for other platforms and unknown kinds."""
        return CHIPS.get(KINDS.get(self.kind, ""))


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
    """The target of the ambient mesh (`jax.set_mesh`); without one that of the arrays, else the default device's.

    A mesh of devices that are not here (compiling ahead of time) counts like any other. Inside `jax.shard_map` every
    device computes on its own, so `devices` is 1 there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and getattr(mesh, "abstract_device", None) is not None:
        device = mesh.abstract_device
        local = all(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types)
        return Target(_platform(device.platform), device.device_kind, 1 if local else mesh.size)
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
            devices = array.devices()
            device = next(iter(devices))
            return Target(_platform(device.platform), device.device_kind, len(devices))
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return Target(_platform(device.platform), device.device_kind, 1)


def explain(message: str) -> None:
    """Says `message` if debugging is on."""
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        print(f"pallas_kernels: {message}", file=sys.stderr)


def _platform(name: str) -> str:
    return "gpu" if name in ("cuda", "rocm") else name
