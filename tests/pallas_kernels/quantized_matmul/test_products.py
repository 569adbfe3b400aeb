"""One suite over every implementation: values in float64, exact integers, gradients; then packing and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.quantized_matmul import BITS, KernelError, Shards, dequantize, pack, quantized_matmul
from pallas_kernels.quantized_matmul.layout import Packed
from pallas_kernels.quantized_matmul.reference import quantize_tokens
from tests.pallas_kernels.quantized_matmul.cases import close, make, rows

IMPLEMENTATIONS = ("reference", "tpu_interpret")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}

# (bits, block, minimum): int8 a column and in blocks (Q8_0's among them), int4 in blocks (Q4_0), with minimum (Q4_1).
FORMATS = [(8, None, False), (8, 32, False), (4, 32, False), (4, 32, True), (4, 128, False), (4, None, False)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize(("bits", "block", "minimum"), FORMATS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_products_and_gradients(implementation, bits, block, minimum, axis, transposed):
    # Neither 5 rows, 1152 / 2 blocked codes nor 136 columns fill whole tiles.
    shape = (1152, 136) if axis == -2 else (136, 1152)
    w, dense = make(bits, bits, shape, block, axis, minimum, np.float16 if block == 32 else np.float32)
    dense = dense.T if transposed else dense
    x = rows(0, (5, dense.shape[0]))
    dy = rows(1, (5, dense.shape[1]))
    y, pull = jax.vjp(lambda x: quantized_matmul(x, **w, transposed=transposed, implementation=implementation), x)
    close(y, np.asarray(x, np.float64) @ dense, 1e-5)
    close(pull(dy)[0], np.asarray(dy, np.float64) @ dense.T, 1e-5)


some_product = st.fixed_dictionaries(
    {
        "count": st.integers(1, 70),
        "blocks": st.integers(1, 9),
        "block": st.sampled_from([16, 32, 48, 64, 160]),
        "columns": st.integers(1, 150),
        "bits": st.sampled_from([4, 8]),
        "axis": st.sampled_from([-2, -1]),
        "minimum": st.booleans(),
        "transposed": st.booleans(),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
    }
)


def check_product(count, blocks, block, columns, bits, axis, minimum, transposed, dtype):
    shape = (blocks * block, columns)[:: 1 if axis == -2 else -1]
    w, dense = make(count, bits, shape, block, axis, minimum)
    dense = dense.T if transposed else dense
    x, dy = rows(0, (1, count, dense.shape[0]), dtype), rows(1, (1, count, dense.shape[1]), dtype)
    y, pull = jax.vjp(
        lambda x: quantized_matmul(x, **w, transposed=transposed, implementation="tpu_interpret"), x
    )
    (dx,) = pull(dy)
    assert y.dtype == dx.dtype == x.dtype
    close(y, np.asarray(x, np.float64) @ dense, TOLERANCE[dtype])
    close(dx, np.asarray(dy, np.float64) @ dense.T, TOLERANCE[dtype])


@settings(max_examples=5, derandomize=True, deadline=None, database=None)
@given(some_product)
def test_kernels_of_any_shape(product):
    check_product(**product)


def test_blocks_that_fill_no_tile_of_the_size_for_many_rows():
    # 320 codes in blocks of 160: within one tile for up to 64 rows (512), beyond that for more (256).
    check_product(65, 2, 160, 3, 8, -2, False, False, "float32")


@pytest.mark.release
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(some_product)
def test_kernels_of_many_shapes(product):
    check_product(**product)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_by_finite_differences(implementation):
    w, _ = make(0, 4, (64, 40), 32)
    x, direction, weights = rows(0, (3, 64)), rows(1, (3, 64)), rows(2, (3, 40))

    def total(x):
        return jnp.sum(weights * jnp.tanh(quantized_matmul(x, **w, implementation=implementation)))

    slope = jnp.sum(jax.grad(total)(x) * direction)
    numeric = (total(x + 1e-3 * direction) - total(x - 1e-3 * direction)) / 2e-3
    np.testing.assert_allclose(numeric, slope, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("block", "count"), [(None, 3), (128, 3), (256, 70)])
def test_int8_activations_are_exact_integers(implementation, block, count):
    w, _ = make(0, 8, (1280, 200), block)
    x = rows(0, (count, 1280))
    y = quantized_matmul(x, **w, activation_bits=8, implementation=implementation)
    codes, scale = (np.asarray(a) for a in quantize_tokens(x))
    assert np.all(np.max(np.abs(codes), axis=1) == 127)
    # Rounding moves a value by half a step at most.
    assert np.all(np.abs(codes * scale - np.asarray(x)) <= scale * 0.5001)
    step = block or 1280
    exact = np.einsum(
        "mbk,bkn->bmn",
        codes.astype(np.int64).reshape(count, -1, step),
        np.asarray(w["codes"], np.int64).reshape(-1, step, 200),
    )
    close(y, np.einsum("bmn,bn->mn", exact, np.asarray(w["scale"], np.float64)) * scale, 1e-6)


def test_gradient_through_int8_activations_is_that_of_the_unquantized():
    w, dense = make(0, 8, (64, 24))
    x, dy = rows(0, (3, 64)), rows(1, (3, 24))
    dx = jax.vjp(lambda x: quantized_matmul(x, **w, activation_bits=8), x)[1](dy)[0]
    close(dx, np.asarray(dy, np.float64) @ dense.T, 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_batches_under_vmap(implementation):
    one, two = (make(seed, 4, (64, 40), 32)[0] for seed in range(2))
    x = rows(0, (2, 3, 64))

    def product(x, codes, scale):
        return quantized_matmul(x, codes, scale, bits=4, offset=8, implementation=implementation)

    got = jax.vmap(product)(x, *(jnp.stack([one[n], two[n]]) for n in ("codes", "scale")))
    for y, part, w in zip(got, x, (one, two), strict=True):
        close(y, product(part, w["codes"], w["scale"]), 1e-6)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("bits", BITS)
def test_packing_loses_nothing(bits, axis):
    w, dense = make(0, bits, (64, 96), 32, axis, minimum=True)
    got = dequantize(Packed(**w))
    close(got, dense, 1e-6)


def test_every_byte_is_two_codes():
    codes = np.stack([np.arange(256) % 16, np.arange(256) // 16])
    packed, _ = pack(codes, 4, 2)
    assert np.array_equal(packed[0], np.arange(256))


BAD = {
    "takes 64 inputs": {"x": (3, 60)},
    "no elements in x": {"x": (0, 64), "implementation": "tpu_interpret"},
    r"pad 63 to 64": {"x": (3, 63)},
    "5 blocks along axis -2, which do not divide its 64": {"scale": (5, 16)},
    "minimum has shape": {"minimum": (4, 16)},
    "high": {"bits": 5},
    "expected one of": {"bits": 3},
    "expected int8": {"bits": 8},
    "valid: auto": {"implementation": "triton"},
    "symmetric 8-bit": {"activation_bits": 8},
    "expected floating": {"x": (3, 64), "dtype": jnp.int32},
    "one matrix": {"codes": (1, 32, 16)},
    "blocks of 8 weights": {"scale": (8, 16), "implementation": "tpu_interpret"},
    "in float16": {"x": (3, 64), "dtype": jnp.float16, "implementation": "tpu_interpret"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    case = {"x": (3, 64), "dtype": jnp.float32, "codes": (32, 16), "scale": (2, 16), "bits": 4} | BAD[message]
    x = jnp.ones(case.pop("x"), case.pop("dtype"))
    codes = jnp.ones(case.pop("codes"), jnp.uint8)
    arrays = {name: jnp.ones(case.pop(name)) for name in ("scale", "minimum") if name in case}
    with pytest.raises(KernelError, match=message):
        quantized_matmul(x, codes, **arrays, **case)


def test_odd_counts_do_not_pack():
    with pytest.raises(KernelError, match="63 codes of 4 bits"):
        pack(np.zeros((63, 2)), 4, 63)


def test_debugging_says_why_no_kernel_was_used(monkeypatch, caplog):
    w, _ = make(0, 4, (64, 16), 32)
    monkeypatch.setenv("PALLAS_KERNELS_DEBUG", "1")
    quantized_matmul(jnp.ones((3, 64)), **w)
    assert "(3, 64) x (64, 16), 4 bits: reference, because of platform cpu" in caplog.text


MESH = ((2, 2), ("rows", "tensor"))
SHARDS = {"columns": Shards(("rows",), None, "tensor"), "inputs": Shards(("rows",), "tensor", None)}


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (8, None)])
def test_on_a_mesh_of_several_devices(implementation, shards, bits, block):
    w, dense = make(0, bits, (128, 64), block)
    x, dy = rows(0, (4, 3, 128)), rows(1, (4, 3, 64))
    kept = {name: w.pop(name) for name in ("codes", "scale")}
    types = (jax.sharding.AxisType.Auto,) * 2

    def product(x, kept):
        return quantized_matmul(x, **kept, **w, shards=SHARDS[shards], implementation=implementation)

    with jax.set_mesh(jax.make_mesh(*MESH, axis_types=types)):
        y, pull = jax.jit(lambda x, kept: jax.vjp(lambda x: product(x, kept), x))(x, kept)
        dx = jax.jit(lambda pull, dy: pull(dy)[0])(pull, dy)
    close(y, np.asarray(x, np.float64) @ dense, 1e-5)
    close(dx, np.asarray(dy, np.float64) @ dense.T, 1e-5)


def test_blocks_that_straddle_devices_are_named():
    w, _ = make(0, 4, (96, 64), 32)
    with (
        jax.set_mesh(jax.make_mesh(*MESH, axis_types=(jax.sharding.AxisType.Auto,) * 2)),
        pytest.raises(KernelError, match="3 blocks of 32 in 2 parts: blocks would straddle"),
    ):
        quantized_matmul(rows(0, (4, 96)), **w, shards=SHARDS["inputs"], implementation="tpu_interpret")
