"""Every kernel and table of tiles compiles for the TPUs that it is for, and fits their vector memory."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.quantized_matmul import KernelError, Shards, quantized_matmul
from pallas_kernels.quantized_matmul.layout import Packed
from pallas_kernels.quantized_matmul.tpu import VMEM_BUDGET, choose_tiles, vmem_bytes
from pallas_kernels.target import CHIPS
from tests.pallas_kernels import absent_tpu

GRANTED = 16 << 20
FORMATS = [(8, None, False), (8, 32, False), (4, 32, False), (4, 32, True), (4, 128, False), (4, None, False)]


def shapes(bits, shape, block, axis, minimum):
    few, stored = list(shape), list(shape)
    few[axis] = 1 if block is None else few[axis] // block
    stored[axis] //= 2 if bits == 4 else 1
    codes = jax.ShapeDtypeStruct(stored, jnp.uint8 if bits == 4 else jnp.int8)
    scale = jax.ShapeDtypeStruct(few, jnp.float16 if block == 32 else jnp.float32)
    arrays = {"codes": codes, "scale": scale} | ({"minimum": scale} if minimum else {})
    return arrays, {"bits": bits, "axis": axis, "offset": 8 if bits == 4 and not minimum else 0}


# Between them these take every path of the kernels; the other formats differ in sizes alone.
EVERY_PATH = [(8, None, False), (8, 32, False), (4, 32, True)]


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize(
    ("chip", "bits", "block", "minimum"),
    [("v5e", *f) for f in FORMATS] + [(chip, *f) for chip in ("v5p", "v6e") for f in EVERY_PATH],
)
def test_forward_and_gradient_compile(chip, bits, block, minimum, axis):
    # A ragged matrix for few rows, one of Llama for many.
    problems = [(1, (640, 1544)), (512, (4096, 14336))]
    formats = [shapes(bits, shape if axis == -2 else shape[::-1], block, axis, minimum) for _, shape in problems]

    def forward_and_back(xs, arrays, dys):
        for x, stored, (_, how), dy in zip(xs, arrays, formats, dys, strict=True):
            product = functools.partial(quantized_matmul, **stored, **how, transposed=axis == -1, implementation="tpu")
            y, pull = jax.vjp(product, x)
            yield y, pull(dy)

    xs, dys = ([jax.ShapeDtypeStruct((count, s[i]), jnp.bfloat16) for count, s in problems] for i in range(2))
    everything = lambda *args: list(forward_and_back(*args))  # noqa: E731
    text = absent_tpu.compile_for(absent_tpu.mesh(chip), everything, xs, [a for a, _ in formats], dys).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 4


@pytest.mark.parametrize("chip", absent_tpu.KERNEL_CHIPS)
@pytest.mark.parametrize("block", [None, 128])
def test_int8_products_compile(chip, block):
    assert CHIPS[chip].int8_matmul
    arrays, how = shapes(8, (1024, 1024), block, -2, False)
    for count in (8, 512) if chip == "v5e" else (512,):
        x = jax.ShapeDtypeStruct((count, 1024), jnp.bfloat16)
        product = functools.partial(quantized_matmul, **how, activation_bits=8, implementation="tpu")
        text = absent_tpu.compile_for(
            absent_tpu.mesh(chip), lambda x, arrays, product=product: product(x, **arrays), x, arrays
        ).as_text()
        assert "tpu_custom_call" in text


@pytest.mark.parametrize("by", ["columns", "inputs"])
def test_auto_takes_the_kernel_on_a_mesh_of_absent_chips(by):
    arrays, how = shapes(4, (1024, 512), 32, -2, False)
    shards = Shards(("data", None), "tensor", None) if by == "inputs" else Shards(("data", None), None, "tensor")
    mesh = absent_tpu.mesh("v5e", (2, 2), ("data", "tensor"))
    x = jax.ShapeDtypeStruct((2, 64, 1024), jnp.bfloat16)
    spec = P("tensor", None) if by == "inputs" else P(None, "tensor")

    def product(x, arrays, shards=shards):
        return quantized_matmul(x, **arrays, **how, shards=shards)

    text = absent_tpu.compile_for(mesh, product, x, arrays, specs=(P("data"), spec)).as_text()
    assert "tpu_custom_call" in text
    assert ("all-reduce" in text) == (by == "inputs")
    without = absent_tpu.compile_for(mesh, lambda x, a: product(x, a, None), x, arrays, specs=(P("data"), spec))
    assert "tpu_custom_call" not in without.as_text()


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("sums_blocks", [True, False])
@pytest.mark.parametrize("count", [1, 8, 64, 512, 4096])
@pytest.mark.parametrize("shape", [(576, 1536), (4096, 14336), (8192, 28672), (640, 262144)])
def test_tiles_fit_the_memory_that_is_granted(axis, sums_blocks, count, shape):
    for bits, block, minimum in FORMATS:
        if shape[0] % (block or 1):
            continue
        arrays, how = shapes(bits, shape if axis == -2 else shape[::-1], block, axis, minimum)
        w = Packed(**arrays, **how)
        for dtype in (jnp.float32, jnp.bfloat16):
            tiles = choose_tiles(count, w, jnp.dtype(dtype), sums_blocks=sums_blocks)
            size = vmem_bytes(tiles, w, jnp.dtype(dtype), sums_blocks=sums_blocks)
            assert size <= VMEM_BUDGET < GRANTED <= min(chip.vmem for chip in CHIPS.values())


def test_forced_where_it_cannot_run_says_so():
    arrays, how = shapes(8, (256, 128), None, -2, False)
    x = jax.ShapeDtypeStruct((1, 256), jnp.float32)

    def product(x, arrays):
        return quantized_matmul(x, **arrays, **how, activation_bits=8, implementation="tpu")

    with pytest.raises(KernelError, match="platform cpu"):
        jax.eval_shape(product, x, arrays)
    with jax.set_mesh(absent_tpu.mesh("v4")), pytest.raises(KernelError, match="no fast int8 products on TPU v4"):
        jax.eval_shape(product, x, arrays)
