"""`quantized_matmul`: checks, the choice of an implementation, several devices, and the gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import target as targets
from pallas_kernels.quantized_matmul import reference, sharded, tpu
from pallas_kernels.quantized_matmul.layout import Packed, check
from pallas_kernels.quantized_matmul.sharded import Shards
from pallas_kernels.target import KernelError, Target

Array = jax.Array

IMPLEMENTATIONS = ("auto", "reference", "tpu", "tpu_interpret", "hopper", "hopper_interpret")


def quantized_matmul(
    x: Array,
    codes: Array,
    scale: Array,
    *,
    minimum: Array | None = None,
    high: Array | None = None,
    super_scale: Array | None = None,
    super_minimum: Array | None = None,
    bits: int = 8,
    offset: int = 0,
    axis: int = -2,
    transposed: bool = False,
    weight_dtype: Any = "float32",
    operand_dtype: Any = None,
    activation_bits: int | None = None,
    shards: Shards | None = None,
    implementation: str = "auto",
) -> Array:
    """`x @ w`, or `x @ w.T` if `transposed`, for a matrix `w` `(in, out)` that is stored quantized.

    `x` is `[..., in]` (`[..., out]`). A weight is `scale * (code - offset) + minimum`, scale and minimum being those
    of its block along `axis`; for the layout of the arrays, and `high`, `super_scale` and `super_minimum`, see
    `Packed`. With `activation_bits=None` unpacked weights are rounded to `weight_dtype`, operands multiplied in
    `operand_dtype` (by default that of `x`), sums are float32 and the result has the dtype of `x`: W8A16, W4A16. With
    `activation_bits=8` each row of `x` is quantized to int8 with a scale of its own and products are exact integers
    (W8A8; 8 bits, symmetric, blocks along the input): faster only where the chip multiplies int8 faster (TPU v5e, v5p,
    v6e).

    `x` alone has a gradient: that of the product with the unpacked matrix, also for `activation_bits=8`
    (straight-through).

    `implementation`: `reference` (plain JAX, everywhere; GPUs take it), `tpu` (Mosaic kernels), `hopper` (a Mosaic GPU
    kernel for H100 and H200 and blocks along the input, not yet run on a chip), `tpu_interpret` and `hopper_interpret`
    (these, interpreted, anywhere: for tests), `auto`: `tpu` where it fits. What is computed is the same up to rounding
    (`hopper` does not round unpacked weights: it multiplies whole numbers and scales sums in float32). On a mesh of
    several devices kernels need `shards`; the reference leaves the division to XLA. Inside `jax.shard_map` neither is
    needed. With `PALLAS_KERNELS_DEBUG=1` in the environment each call says what was chosen and why.

    Raises `KernelError` (a `ValueError`) when arrays do not fit together or a forced implementation cannot do it.
    """
    w = Packed(
        codes, scale, high, minimum, super_scale, super_minimum, bits, offset, axis, np.dtype(jnp.dtype(weight_dtype))
    )
    _check(x, w, transposed, activation_bits, implementation)
    dtype = jnp.dtype(operand_dtype or x.dtype).name
    chosen = _choose(x, w, transposed, dtype, activation_bits, shards, implementation)
    options = _Options(transposed, dtype, activation_bits, shards, chosen)
    return _product(x, w, options)


@dataclasses.dataclass(frozen=True)
class _Options:
    transposed: bool
    dtype: str
    activation_bits: int | None
    shards: Shards | None
    chosen: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, w: Packed, options: _Options) -> Array:
    return _multiply(x, w, options)


def _product_forward(x: Array, w: Packed, options: _Options) -> tuple[Array, Packed]:
    return _multiply(x, w, options), w


def _product_backward(options: _Options, w: Packed, dy: Array) -> tuple[Array, None]:
    back = dataclasses.replace(options, transposed=not options.transposed, activation_bits=None)
    if back.chosen != "reference":
        # A kernel may do the product but not its transpose.
        reason = _cannot(back.chosen, dy, w, back.transposed, back.dtype, None, back.shards, targets.current(dy))
        if reason is not None:
            targets.explain(f"gradient of quantized_matmul: reference, because of {reason}")
            back = dataclasses.replace(back, chosen="reference")
    return _multiply(dy, w, back), None


_product.defvjp(_product_forward, _product_backward)


def _multiply(x: Array, w: Packed, options: _Options) -> Array:
    target = targets.current(x)
    run = functools.partial(_on_one_device, options=options, target=target)
    if options.chosen == "reference" or target.devices == 1:
        return run(x, w)
    return sharded.multiply(run, x, w, options.shards, options.transposed)


def _on_one_device(x: Array, w: Packed, options: _Options, target: Target) -> Array:
    interpret = options.chosen == "tpu_interpret"
    if options.activation_bits == 8:
        flat = x.reshape(-1, x.shape[-1])
        codes, scale = reference.quantize_tokens(flat)
        if options.chosen == "reference":
            y = reference.matmul_int8(codes, scale, w)
        else:
            y = tpu.matmul_int8(codes, scale, w, interpret=interpret)
        return y.astype(x.dtype).reshape(*x.shape[:-1], y.shape[-1])
    dtype = jnp.dtype(options.dtype)
    if options.chosen == "reference":
        return reference.matmul(x, w, transposed=options.transposed, dtype=dtype, target=target)
    if options.chosen in ("hopper", "hopper_interpret"):
        # Imported by who uses it: it exists on Linux alone.
        from pallas_kernels.quantized_matmul import gpu

        return gpu.matmul(x, w, dtype=dtype, interpret=options.chosen == "hopper_interpret")
    return tpu.matmul(x, w, transposed=options.transposed, dtype=dtype, interpret=interpret)


def _choose(
    x: Array,
    w: Packed,
    transposed: bool,
    dtype: str,
    activation_bits: int | None,
    shards: Shards | None,
    implementation: str,
) -> str:
    target = targets.current(x)
    if implementation == "reference":
        return "reference"
    wanted = "tpu" if implementation == "auto" else implementation
    reason = _cannot(implementation, x, w, transposed, dtype, activation_bits, shards, target)
    what = f"quantized_matmul {tuple(x.shape)} x {tuple(w.shape)}{' transposed' if transposed else ''}, {w.bits} bits"
    if reason is None:
        targets.explain(f"{what}: {wanted}")
        return wanted
    if implementation != "auto":
        raise KernelError(f"implementation='{implementation}' cannot do {what}: {reason}")
    targets.explain(f"{what}: reference, because of {reason}")
    return "reference"


def _cannot(
    implementation: str,
    x: Array,
    w: Packed,
    transposed: bool,
    dtype: str,
    activation_bits: int | None,
    shards: Shards | None,
    target: Target,
) -> str | None:
    """Why the kernel cannot do it."""
    hopper = implementation in ("hopper", "hopper_interpret")
    if implementation == "hopper" and not target.hopper:
        return f"it is for Hopper (H100, H200), and the device is '{target.kind or target.platform}'"
    if target.platform != "tpu" and implementation in ("auto", "tpu"):
        return f"platform {target.platform}, for which there is no kernel"
    if hopper and activation_bits == 8:
        return "int8 activations"
    if x.size == 0 or w.codes.size == 0:
        return f"no elements in x {tuple(x.shape)} or codes {tuple(w.codes.shape)}"
    if activation_bits == 8 and implementation != "tpu_interpret" and not (target.chip and target.chip.int8_matmul):
        return f"no fast int8 products on {target.kind}"
    local = w
    if target.devices > 1:
        if shards is None:
            return f"a mesh of {target.devices} devices without shards"
        reason = sharded.cannot(shards, w, activation_bits == 8)
        if reason is not None:
            return reason
        local = sharded.local_shapes(w, shards)
    if hopper:
        from pallas_kernels.quantized_matmul import gpu

        return gpu.unsupported(local, jnp.dtype(dtype), transposed, implementation == "hopper_interpret")
    return tpu.unsupported(local, x.dtype, jnp.dtype(dtype), transposed, activation_bits == 8)


def _check(x: Array, w: Packed, transposed: bool, activation_bits: int | None, implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise KernelError(f"implementation '{implementation}' (valid: {', '.join(IMPLEMENTATIONS)})")
    if w.codes.ndim != 2:
        raise KernelError(f"codes have shape {tuple(w.codes.shape)}, expected one matrix (map over leading axes)")
    check(w)
    size = w.shape[1 if transposed else 0]
    if x.ndim < 1 or x.shape[-1] != size:
        odd = x.ndim and w.bits < 8 and x.shape[-1] % 2 and size - x.shape[-1] == 1
        raise KernelError(
            f"x has shape {tuple(x.shape)}, but the matrix {tuple(w.shape)}{' transposed' if transposed else ''} takes "
            f"{size} inputs" + (f" ({w.bits} bits pack an even number: pad {x.shape[-1]} to {size})" if odd else "")
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise KernelError(f"x is {x.dtype}, expected floating point")
    if activation_bits not in (None, 8):
        raise KernelError(f"activation_bits is {activation_bits}, expected None or 8")
    if activation_bits == 8 and (w.bits != 8 or w.axis != -2 or transposed or w.minimum is not None or w.offset):
        raise KernelError(
            "activation_bits=8 takes symmetric 8-bit kernels with blocks along their input, got "
            f"bits={w.bits}, axis={w.axis}, transposed={transposed}, offset={w.offset}"
            + (", minimum" if w.minimum is not None else "")
        )
    if activation_bits == 8 and (w.super_scale is not None or w.group > (2**31 - 1) // 127**2):
        raise KernelError(f"activation_bits=8 sums blocks of {w.group} codes in 32 bits, or has superblock scales")
