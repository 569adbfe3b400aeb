"""Quantized matrices of every layout, and what they stand for in float64."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul import pack


def make(seed, bits, shape, block=None, axis=-2, minimum=False, dtype=np.float32):
    """`(arguments, dense)`: of `quantized_matmul` after `x`, and the matrix by its definition, not by ours."""
    rng = np.random.default_rng(seed)
    block = block or shape[axis]
    codes = rng.integers(*((-127, 128) if bits == 8 else (0, 1 << bits)), shape)
    few = list(shape)
    few[axis] //= block
    scale, low = (rng.normal(size=few).astype(dtype) for _ in range(2))
    offset = 0 if bits == 8 or minimum else 8
    dense = np.repeat(scale.astype(np.float64), block, axis) * (codes - offset)
    arguments = {"scale": jnp.asarray(scale), "bits": bits, "offset": offset, "axis": axis}
    if minimum:
        dense += np.repeat(low.astype(np.float64), block, axis)
        arguments["minimum"] = jnp.asarray(low)
    packed, high = pack(codes, bits, block, axis)
    arguments["codes"] = jnp.asarray(packed)
    if high is not None:
        arguments["high"] = jnp.asarray(high)
    return arguments, dense


def rows(seed, shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(got, expected, tolerance):
    """Whether values agree relative to the largest one."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    error = np.max(np.abs(got - expected)) / max(np.max(np.abs(expected)), 1e-30)
    assert error <= tolerance, f"relative error {error:.2e}"
