"""The Hopper kernel: in Pallas' GPU interpreter, compiled for an absent H200, and (`-m gpu`) on one that is here.

The interpreter takes seconds for each product and knows no register layouts and no swizzling, so it proves arithmetic,
copies and barriers alone. To compile for the H200, make an environment with
`tests/pallas_kernels/make_cuda_environment.sh FOLDER` and in it run
`pytest -m gpu_aot -n 0 tests/pallas_kernels/quantized_matmul/test_gpu.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import target
from pallas_kernels.quantized_matmul import KernelError, gpu, quantized_matmul
from pallas_kernels.quantized_matmul.gpu import SHARED_MEMORY_BYTES, TABLE, GpuTiles, shared_memory_bytes
from pallas_kernels.quantized_matmul.layout import Packed
from tests.pallas_kernels import absent_gpu
from tests.pallas_kernels.quantized_matmul.cases import close, make, rows

# (bits, block, minimum): int8 a column and in blocks, int4 in blocks that are smaller than a step, as large, larger.
FORMATS = [(8, None, False), (8, 32, False), (4, 32, True), (4, 128, False), (4, 256, False), (4, None, False)]


def check(count, bits, block, minimum, shape, dtype, implementation):
    w, dense = make(bits, bits, shape, block, -2, minimum, np.float16 if block == 32 else np.float32)
    x = rows(0, (count, shape[0]), dtype)
    product = functools.partial(quantized_matmul, **w, implementation=implementation)
    y = jax.jit(product)(x)
    assert y.dtype == x.dtype
    close(y, np.asarray(x, np.float64) @ dense, 1e-5 if dtype == "float32" else 2e-2)
    return product, x, dense


def test_interpreted_products_and_gradients():
    product, x, dense = check(3, 4, 32, True, (256, 64), "float32", "hopper_interpret")
    # The gradient's product sums over columns: it is the reference's.
    dy = rows(1, (3, 64))
    close(jax.vjp(product, x)[1](dy)[0], np.asarray(dy, np.float64) @ dense.T, 1e-5)


@pytest.mark.release
@pytest.mark.parametrize(("bits", "block", "minimum"), FORMATS)
def test_interpreted_products(bits, block, minimum):
    check(1, bits, block, minimum, (512 if block == 256 else 256, 64), "bfloat16", "hopper_interpret")


@pytest.mark.release
def test_interpreted_over_several_tiles_of_activations_and_columns():
    check(137, 8, 32, False, (128, 192), "float32", "hopper_interpret")


@pytest.mark.slow
def test_buffers_are_neither_overwritten_early_nor_read_early(monkeypatch):
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # has no public name yet

    params = type(gpu.Interpreted.params())(detect_races=True)
    monkeypatch.setattr(gpu.Interpreted, "params", staticmethod(lambda: params))
    w, dense = make(0, 4, (768, 64), 32)
    x = rows(0, (3, 768))
    y = gpu.matmul(x, Packed(**w), dtype=jnp.float32, tiles=GpuTiles(8, groups=1, stages=2, parts=1), interpret=True)
    close(y, np.asarray(x, np.float64) @ dense, 1e-5)
    assert not interpret_pallas_call.get_races().races_found


def packed(bits, block, minimum, shape, sharding=None):
    """Shapes of a matrix's arrays."""

    def array(size, dtype):
        return jax.ShapeDtypeStruct((size, shape[1]), dtype, sharding=sharding)

    codes = array(shape[0] // (2 if bits == 4 else 1), jnp.uint8 if bits == 4 else jnp.int8)
    scale = array(shape[0] // (block or shape[0]), jnp.float16 if block == 32 else jnp.float32)
    offset = 8 if bits == 4 and not minimum else 0
    return Packed(codes, scale, minimum=scale if minimum else None, bits=bits, offset=offset)


@pytest.mark.parametrize("tiles", TABLE)
@pytest.mark.parametrize(("bits", "block", "minimum"), FORMATS)
def test_the_table_stays_below_the_shared_memory(tiles, bits, block, minimum):
    assert shared_memory_bytes(tiles, packed(bits, block, minimum, (4096, 14336))) <= SHARED_MEMORY_BYTES


def test_what_it_cannot_do_is_named(monkeypatch):
    def ask(bits=4, block=32, shape=(256, 128), axis=-2, dtype=jnp.bfloat16, implementation="hopper", **more):
        w, _ = make(0, bits, shape, block, axis)
        quantized_matmul(rows(0, (2, shape[0]), dtype), **w, implementation=implementation, **more)

    with pytest.raises(KernelError, match="it is for Hopper .H100, H200., and the device is 'cpu'"):
        ask()
    monkeypatch.setattr(target, "current", lambda *_: target.Target("gpu", "NVIDIA H200"))
    for message, change in {
        "codes of 5 bits": {"bits": 5},
        "blocks that are not along the summed axis": {"axis": -1},
        "operands in float32": {"dtype": jnp.float32},
        "96 stored rows by 128 columns, expected multiples of 64 and 64": {"shape": (192, 128)},
        "128 stored rows by 72 columns": {"shape": (256, 72)},
        r"blocks of 16 weights \(8 stored rows\), expected 16, 32 or a multiple of 64": {"block": 16},
        "int8 activations": {"bits": 8, "activation_bits": 8},
    }.items():
        with pytest.raises(KernelError, match=message):
            ask(**change)


@pytest.mark.gpu_aot
@absent_gpu.needs_plugin
class TestCompiledForAnAbsentH200:
    @pytest.fixture(scope="class")
    def sharding(self):
        return absent_gpu.sharding()

    @pytest.mark.parametrize("tiles", TABLE)
    @pytest.mark.parametrize(("bits", "block", "minimum"), FORMATS)
    def test_every_row_of_the_table_compiles(self, sharding, tiles, bits, block, minimum):
        x = jax.ShapeDtypeStruct((tiles.rows + 1, 4096), jnp.bfloat16, sharding=sharding)
        for columns in (14336, 576):  # the second are nine times 64: one warp group
            chosen = gpu.choose_tiles(tiles.rows, columns)
            product = functools.partial(gpu.matmul, dtype=jnp.bfloat16, tiles=chosen)
            w = packed(bits, block, minimum, (4096, columns), sharding)
            assert "mosaic_gpu" in jax.jit(product).lower(x, w).compile().as_text()

    def test_forced_it_is_taken_and_auto_does_not_choose_it(self, sharding):
        w = packed(4, 32, False, (4096, 1024), sharding)
        x = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16, sharding=sharding)

        def text(implementation):
            how = {"bits": 4, "offset": 8, "implementation": implementation}
            call = jax.jit(lambda x, codes, scale: quantized_matmul(x, codes, scale, **how))
            return call.lower(x, w.codes, w.scale).compile().as_text()

        assert "mosaic_gpu" in text("hopper")
        assert "mosaic_gpu" not in text("auto")

    def test_tiles_that_need_more_are_refused_by_arithmetic_and_compiler(self, sharding):
        huge, w = GpuTiles(128, stages=6), packed(4, 32, False, (4096, 1024), sharding)
        assert shared_memory_bytes(huge, w) > SHARED_MEMORY_BYTES
        x = jax.ShapeDtypeStruct((128, 4096), jnp.bfloat16, sharding=sharding)
        with pytest.raises(ValueError, match="shared memory"):
            jax.jit(functools.partial(gpu.matmul, dtype=jnp.bfloat16, tiles=huge)).lower(x, w).compile()


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 16, 64, 300])
@pytest.mark.parametrize(("bits", "block", "minimum"), FORMATS)
def test_on_a_gpu(count, bits, block, minimum):
    if not target.current().hopper:
        pytest.skip("no Hopper GPU")
    check(count, bits, block, minimum, (4096, 1152), "bfloat16", "hopper")
