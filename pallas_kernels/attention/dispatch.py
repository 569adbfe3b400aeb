"""Which implementation computes a call: chosen by the platform of the mesh's devices, shapes and dtype.

The platform is that of the ambient mesh (`jax.set_mesh`), else of the mesh or devices that the arrays lie on, else
JAX's default. `implementation="auto"` takes the first kernel made for that platform that fits, then a plain JAX one,
and under `PALLAS_KERNELS_DEBUG=1` logs why no kernel fitted; a forced implementation that does not fit is an error.
"""

import dataclasses
import difflib
import logging
import os
import re

import jax
import jax.numpy as jnp

from pallas_kernels.attention import tiles
from pallas_kernels.attention.errors import AttentionError, UnsupportedError
from pallas_kernels.attention.problem import Structure

logger = logging.getLogger("pallas_kernels")

HEAD_DIMS = (32, 256)
"""The smallest and largest head_dim of the kernels."""

SHORT = 64
"""With fewer queries all logits are small: the reference has less overhead than blocks."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What is compiled for: `cpu`, `gpu` or `tpu`, and the chip's name. `parts`: devices that arrays may be cut over
    outside of `shard_map`."""

    platform: str
    kind: str = ""
    parts: int = 1

    @property
    def hopper(self) -> bool:
        return self.platform == "gpu" and re.search(r"\bG?H(20|100|200|800)\b", self.kind) is not None


@dataclasses.dataclass(frozen=True)
class Request:
    """What the choice depends on. `decode`: one or few queries against a cache."""

    device: Device
    structure: Structure
    shape: tuple[int, int, int, int, int, int]  # batch, kv_heads, group, queries, keys, head_dim
    dtype: jnp.dtype
    bias: bool = False
    segments: bool = False
    with_lse: bool = False
    interpret: bool = False
    decode: bool = False


def device_of(*arrays: jax.Array) -> Device:
    """The device that a computation on these arrays is compiled for."""
    meshes = [jax.sharding.get_abstract_mesh()]
    meshes += [getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None) for x in arrays]
    for mesh in meshes:
        described = getattr(mesh, "abstract_device", None)
        if described is not None and not mesh.empty:
            free = [size for name, size in mesh.shape.items() if name not in mesh.manual_axes]
            parts = 1
            for size in free:
                parts *= size
            return Device(_platform(described.platform), described.device_kind, parts)
    for x in arrays:
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            devices = list(x.devices())
            return Device(_platform(devices[0].platform), devices[0].device_kind, len(devices))
    device = jax.config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return Device(_platform(device.platform), device.device_kind)


def why_not(name: str, request: Request) -> str | None:
    """Why this implementation cannot compute the request, or `None` if it can."""
    dtype, head_dim = request.dtype, request.shape[5]
    if name == "reference":
        return None
    if name == "blocked":
        if request.decode:
            return "it computes whole sequences, not queries against a cache"
        return _wrong_dtype(dtype, jnp.float32, jnp.bfloat16, jnp.float16)
    if name == "cudnn":
        return _why_not_cudnn(request)
    if not request.interpret:
        if name != request.device.platform:
            return f"its kernels are for {name}, and the arrays are on {request.device.platform}"
        if request.device.parts > 1:
            return (
                f"a Pallas kernel cannot be partitioned over a mesh of {request.device.parts} devices: call it inside "
                "jax.shard_map, or flash_attention_sharded"
            )
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        return f"head_dim is {head_dim}, expected {HEAD_DIMS[0]} to {HEAD_DIMS[1]}"
    if name == "tpu":
        reason = _wrong_dtype(dtype, jnp.float32, jnp.bfloat16)
        return reason or tiles.why_not_tpu(request)
    if request.decode:
        return "there is no decoding kernel for GPUs: a few queries are bound by reading the cache, which XLA does well"
    if not request.interpret and not request.device.hopper:
        return f"its kernels are for Hopper (H100, H200), and the device is '{request.device.kind}'"
    if request.interpret:  # it multiplies in any format, the chip's units in 16 bits
        return None
    return _wrong_dtype(dtype, jnp.bfloat16, jnp.float16) or _why_not_cuda()


def choose(implementation: str, request: Request, options: tuple[str, ...]) -> str:
    """The implementation that computes the request. Raises `UnsupportedError` if it was forced and cannot."""
    if implementation != "auto":
        if implementation not in options:
            close = difflib.get_close_matches(implementation, options, n=1, cutoff=0.4)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise AttentionError(f"implementation '{implementation}': {hint}(valid: auto, {', '.join(options)})")
        reason = why_not(implementation, request)
        if reason is not None:
            raise UnsupportedError(f"implementation '{implementation}' cannot compute this: {reason}")
        return implementation
    reasons = []
    if request.device.platform in options:
        reason = why_not(request.device.platform, request)
        if reason is None:
            return _say(request.device.platform, reasons)
        reasons.append(f"{request.device.platform}: {reason}")
    else:
        reasons.append(f"no kernel is made for {request.device.platform}")
    plain = "blocked" if "blocked" in options and request.shape[3] >= SHORT else "reference"
    if why_not(plain, request) is not None:
        plain = "reference"
    return _say(plain, reasons)


def _say(name: str, reasons: list[str]) -> str:
    if os.environ.get("PALLAS_KERNELS_DEBUG", "0") not in ("", "0"):
        logger.warning("attention: %s%s", name, f" ({'; '.join(reasons)})" if reasons else "")
    return name


def _platform(name: str) -> str:
    return "gpu" if name in ("cuda", "rocm") else name


def _wrong_dtype(dtype, *expected) -> str | None:
    names = [jnp.dtype(d).name for d in expected]
    return None if dtype in expected else f"dtype is {jnp.dtype(dtype).name}, expected {' or '.join(names)}"


def _why_not_cuda() -> str | None:
    # jax's own Hopper attention refuses these versions: their assembler miscompiles causal masks.
    try:
        from jax._src.lib import cuda_versions
    except ImportError:
        return None
    if cuda_versions is not None and 12080 <= cuda_versions.cuda_runtime_get_version() < 12091:
        return "CUDA 12.8.0 to 12.9.0 miscompiles its kernels: use 12.9.1 or newer"
    return None


def _why_not_cudnn(request: Request) -> str | None:
    structure = request.structure
    _, _, _, queries, keys, head_dim = request.shape
    if request.device.platform != "gpu":
        return f"the arrays are on {request.device.platform}"
    for present, what in (
        (request.bias, "bias"),
        (request.segments, "segment_ids"),
        (structure.softcap is not None, "softcap"),
        (request.with_lse, "return_lse"),
        (structure.q_offset != 0 or queries != keys, "another number of queries than keys"),
        (structure.window is not None and not structure.causal, "a window without causal"),
    ):
        if present:
            return f"cuDNN attention is used here without {what}"
    if head_dim % 8 or head_dim > 128:
        return f"head_dim is {head_dim}, expected a multiple of 8 of at most 128"
    return _wrong_dtype(request.dtype, jnp.bfloat16, jnp.float16)
