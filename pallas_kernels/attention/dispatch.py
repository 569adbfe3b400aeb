"""Which implementation computes a call: chosen by the platform of the mesh's devices, shapes and dtype.

The platform is that of the ambient mesh (`jax.set_mesh`), else of the mesh or devices that the arrays lie on, else
JAX's default. `implementation="auto"` takes the first kernel made for that platform that fits, then a plain JAX one,
and under `PALLAS_KERNELS_DEBUG=1` logs why no kernel fitted; a forced implementation that does not fit is an error.
"""

import dataclasses
import difflib

import jax.numpy as jnp

from pallas_kernels.attention import tiles
from pallas_kernels.attention.errors import AttentionError, UnsupportedError
from pallas_kernels.attention.problem import Structure
from pallas_kernels.target import Target, explain

HEAD_DIMS = (32, 256)
"""The smallest and largest head_dim of the kernels."""

SHORT = 64
"""With fewer queries all logits are small: the reference has less overhead than blocks."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the choice depends on. `decode`: one or few queries against a cache."""

    target: Target
    structure: Structure
    shape: tuple[int, int, int, int, int, int]  # batch, kv_heads, group, queries, keys, head_dim
    dtype: jnp.dtype
    bias: bool = False
    segments: bool = False
    with_lse: bool = False
    interpret: bool = False
    decode: bool = False
    cache_dtype: jnp.dtype | None = None


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
        if name != request.target.platform:
            return f"its kernels are for {name}, and the arrays are on {request.target.platform}"
        if request.target.devices > 1:
            return (
                f"a Pallas kernel cannot be partitioned over a mesh of {request.target.devices} devices: call it "
                "inside jax.shard_map, or flash_attention_sharded"
            )
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        return f"head_dim is {head_dim}, expected {HEAD_DIMS[0]} to {HEAD_DIMS[1]}"
    if name == "tpu":
        reason = _wrong_dtype(dtype, jnp.float32, jnp.bfloat16)
        if request.cache_dtype is not None:
            reason = reason or _wrong_dtype(request.cache_dtype, jnp.float32, jnp.bfloat16, what="the cache's dtype")
        return reason or tiles.why_not_tpu(request)
    if request.decode:
        return "there is no decoding kernel for GPUs: a few queries are bound by reading the cache, which XLA does well"
    if not request.interpret and not request.target.hopper:
        return f"its kernels are for Hopper (H100, H200), and the device is '{request.target.kind}'"
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
    if request.target.platform in options:
        reason = why_not(request.target.platform, request)
        if reason is None:
            return _say(request.target.platform, reasons)
        reasons.append(f"{request.target.platform}: {reason}")
    else:
        reasons.append(f"no kernel is made for {request.target.platform}")
    plain = "blocked" if "blocked" in options and request.shape[3] >= SHORT else "reference"
    if why_not(plain, request) is not None:
        plain = "reference"
    return _say(plain, reasons)


def _say(name: str, reasons: list[str]) -> str:
    because = f" ({'; '.join(reasons)})" if reasons else ""
    explain(f"attention: {name}{because}")
    return name


def _wrong_dtype(dtype, *expected, what: str = "dtype") -> str | None:
    names = [jnp.dtype(d).name for d in expected]
    return None if dtype in expected else f"{what} is {jnp.dtype(dtype).name}, expected {' or '.join(names)}"


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
    if request.target.platform != "gpu":
        return f"the arrays are on {request.target.platform}"
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
