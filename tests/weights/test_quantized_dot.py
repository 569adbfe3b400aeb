"""Products under policies. The golden file holds AQT 0.9's (PyPI `aqtp`) int8 product and both its gradients; a test
runs AQT itself where it is installed. `python tests/weights/test_quantized_dot.py` writes the file again."""

import dataclasses
import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import fp8_ops
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.core.errors import ConfigError
from jaxlm.core.policies import POLICIES, PrecisionPolicy, Product, precision_policy
from jaxlm.core.scaled import PLAIN, Quantizer, fake_quantize, mx
from jaxlm.core.sharding import MeshConfig, make_mesh, use_mesh
from jaxlm.weights import quantized_dot, quantized_dot_general, quantized_matmul

GOLDEN = Path(__file__).with_name("golden_int8_products.json")
KEY = jax.random.key(0)
ROUNDED = [name for name, policy in POLICIES.items() if not policy.is_plain]
# What a product may be off by, relative to its size: that of the format that is coarsest in it, and then some.
ERRORS = {
    "bfloat16": 0.01, "float16": 1e-3, "int8_switchback": 0.04, "int8_vector": 0.04, "int8_block": 0.04,
    "fp8_current": 0.09, "fp8_delayed": 0.09, "fp8_block": 0.09, "mxfp8": 0.09, "mxfp6": 0.09, "mxfp4": 0.3,
    "mxfp4_stochastic": 0.45, "nvfp4": 0.35, "qat_w4a8": 0.3, "bitnet": 0.8,
}  # fmt: skip


def matrices(rows=24, inputs=40, outputs=56, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"x": (rows, inputs), "w": (inputs, outputs), "g": (rows, outputs)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnums=0)
def three_products(policy, x, w, g, **options):
    """`y`, `dx`, `dw`."""
    y, pull = jax.vjp(lambda x, w: quantized_matmul(x, w, policy, **options), x, w)
    return (y, *pull(g))


multiply = jax.jit(quantized_matmul, static_argnums=2)


def scales_for(policy, **tensors):
    if not policy.history:
        return None
    tops = [jnp.max(jnp.abs(tensors[name])) for name in ("x", "w", "g")]
    return jnp.stack([top / size for top, size in zip(tops, (448, 448, 57344), strict=True)])


@pytest.mark.parametrize("name", ROUNDED)
def test_all_three_products_are_near_those_of_float32(name):
    policy, tensors = precision_policy(name), matrices()
    plain = (tensors["x"] @ tensors["w"], tensors["g"] @ tensors["w"].T, tensors["x"].T @ tensors["g"])
    found = three_products(policy, **tensors, key=KEY, scales=scales_for(policy, **tensors))
    for product, expected in zip(found, plain, strict=True):
        error = float(jnp.linalg.norm(product - expected) / jnp.linalg.norm(expected))
        assert error < ERRORS[name]
    assert any(not np.array_equal(a, b) for a, b in zip(found, plain, strict=True))


round_trip = jax.jit(fake_quantize, static_argnums=1, static_argnames="summed")


@pytest.mark.parametrize("name", [name for name in ROUNDED if not POLICIES[name].is_random])
def test_each_product_is_that_of_the_matrices_its_operands_stand_for(name):
    policy, tensors = precision_policy(name), matrices(rows=48, inputs=96, outputs=160)
    x, w, g = tensors.values()
    scales = scales_for(policy, **tensors)

    def stands_for(m, q, which, summed):
        scale = None if scales is None else scales[which]
        return round_trip(m, q, summed=summed, scale=scale)

    forward = stands_for(x, policy.forward.lhs, 0, 1), stands_for(w, policy.forward.rhs, 1, 0)
    w_back = forward[1] if policy.dgrad.rhs is None else stands_for(w, policy.dgrad.rhs, 1, 1)
    x_back = forward[0] if policy.wgrad.lhs is None else stands_for(x, policy.wgrad.lhs, 0, 0)
    expected = (
        forward[0] @ forward[1],
        stands_for(g, policy.dgrad.lhs, 2, 1) @ w_back.T,
        x_back.T @ stands_for(g, policy.wgrad.rhs, 2, 0),
    )
    for found, product in zip(three_products(policy, **tensors, scales=scales), expected, strict=True):
        np.testing.assert_allclose(found, product, rtol=1e-4, atol=1e-4)


def test_a_policy_that_rounds_nothing_is_the_plain_product_to_the_bit():
    tensors, policy = matrices(), PrecisionPolicy()

    @jax.jit
    def plain(x, w, g):
        y, pull = jax.vjp(lambda x, w: jax.lax.dot_general(x, w, (((1,), (0,)), ((), ()))), x, w)
        return (y, *pull(g))

    for found, expected in zip(three_products(policy, **tensors), plain(**tensors), strict=True):
        np.testing.assert_array_equal(found, expected)


def whole_numbers():
    """Exact in float32, and so the same everywhere."""
    i, j = np.arange(24), np.arange(40)
    x = ((i[:, None] * 37 + j * 53) % 101 - 50) / 64
    w = ((j[:, None] * 29 + i[:16] * 31) % 97 - 48) / 512
    g = ((i[:, None] * 41 + i[:16] * 17) % 89 - 44) / 256
    return [jnp.asarray(m, jnp.float32) for m in (x, w, g)]


def aqts(x, w, g):
    """AQT's own int8 products, in all three of which the largest value of a channel is 127."""
    aqt = pytest.importorskip("aqt.jax.v2.config")
    config = aqt.fully_quantized(fwd_bits=8, bwd_bits=8, use_stochastic_rounding=False, use_fwd_quant=False)
    for product in (config.fwd, config.dlhs, config.drhs):
        for side in (product.dg_quantizer.lhs, product.dg_quantizer.rhs):
            side.numerics = side.numerics.replace(preserve_max_val=True)
    y, pull = jax.vjp(lambda x, w: config(x, w, (((1,), (0,)), ((), ()))), x, w)
    return (y, *pull(g))


def test_int8_products_are_aqts():
    expected = json.loads(GOLDEN.read_text())
    found = three_products(precision_policy("int8_vector"), *whole_numbers())
    for product, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(product, np.array(wanted, np.float32), atol=1e-7, rtol=1e-6)


def test_int8_products_beside_aqt_itself():
    tensors = matrices().values()
    for product, wanted in zip(three_products(precision_policy("int8_vector"), *tensors), aqts(*tensors), strict=True):
        np.testing.assert_allclose(product, wanted, atol=1e-5, rtol=1e-5)


def test_integers_add_up_exactly_whatever_their_number():
    rng = np.random.default_rng(0)
    x, w = rng.integers(-127, 128, (3, 5000)), rng.integers(-127, 128, (5000, 4))
    x[:, 0], w[0] = 127, 127  # so that scales are 1
    y = multiply(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), precision_policy("int8_vector"))
    np.testing.assert_array_equal(y, (x @ w).astype(np.float32))


@pytest.mark.parametrize("name", ["int8_vector", "fp8_current", "bfloat16", "fp8_block", "int8_block"])
def test_native_products_give_what_emulated_ones_do(name):
    # XLA's CPU backend multiplies these formats too, if slowly.
    policy, (x, w, _) = precision_policy(name), matrices(inputs=256).values()
    pair = policy.forward

    @functools.partial(jax.jit, static_argnums=2)
    def product(x, w, native):
        operands = quantized_dot._operands(pair, x, w, (1, 0), None, (0, 1), None, 0)
        return quantized_dot._multiply(quantized_dot._How(policy, "float32", native), pair, operands, (1, 0))

    found = [product(x, w, native) for native in (True, False)]
    np.testing.assert_allclose(*found, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_native_block_scaled_products_compile_for_gpus(name):
    x, w = jnp.ones((128, 128)), jnp.ones((128, 128))
    pair = precision_policy(name).forward

    def multiply(x, w):
        return quantized_dot._block_scaled(
            pair, quantized_dot._operands(pair, x, w, (1, 0), None, (0, 1), None, 0), (1, 0)
        )

    text = jax.jit(multiply).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert "block_scaled_dot" in text


def test_hadamard_leaves_the_product_and_spreads_outliers():
    x, w, _ = matrices(inputs=70).values()
    x = x.at[3, 7].set(100.0)
    pair = Product(hadamard=16)
    operands = quantized_dot._operands(pair, x, w, (1, 0), None, (0, 1), KEY, 0)
    how = quantized_dot._How(PrecisionPolicy(), "float32", False)
    np.testing.assert_allclose(quantized_dot._multiply(how, pair, operands, (1, 0)), x @ w, atol=1e-3)
    assert operands[0].values.shape[1] == 80  # whole blocks
    assert float(jnp.max(jnp.abs(operands[0].values[3]))) < 40


def test_random_backward_operands_give_an_unbiased_gradient():
    tensors, policy = matrices(rows=32, inputs=32, outputs=32), precision_policy("mxfp4_stochastic")
    x, w, g = tensors.values()
    one = jax.jit(jax.vmap(lambda key: three_products(policy, x, w, g, key=key)[1:]))  # of the two gradients
    nearest = three_products(precision_policy("mxfp4"), x, w, g)[1:]
    for found, rounded, exact in zip(
        one(jax.random.split(KEY, 1000)), nearest, (g @ w.T, x.T @ g), strict=True
    ):
        error = jnp.linalg.norm(jnp.mean(found, axis=0) - exact) / jnp.linalg.norm(exact)
        assert float(error) < 0.02
        assert float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)) > 0.1


def test_the_meter_reads_the_largest_magnitudes():
    tensors, policy = matrices(), precision_policy("fp8_delayed")
    x, w, g = tensors.values()

    def total(meter):
        return jnp.sum(quantized_matmul(x, w, policy, scales=jnp.ones(3), meter=meter) * g)

    expected = [jnp.max(jnp.abs(m)) for m in (x, w, g)]
    np.testing.assert_array_equal(jax.jit(jax.grad(total))(jnp.zeros(3)), expected)


def test_flax_layers_take_it():
    policy = precision_policy("fp8_current")
    x = jax.random.normal(KEY, (2, 5, 16))
    layer = nn.Dense(8, use_bias=False, dot_general=functools.partial(quantized_dot_general, policy=policy))
    params = layer.init(KEY, x)
    expected = multiply(x, params["params"]["kernel"], policy)
    np.testing.assert_allclose(jax.jit(layer.apply)(params, x), expected, rtol=1e-6)


def test_dot_general_with_batch_and_several_summed_axes():
    policy = precision_policy("int8_vector")
    lhs, rhs = jax.random.normal(KEY, (4, 3, 5, 6)), jax.random.normal(KEY, (6, 4, 7, 5))
    dims = (((2, 3), (3, 0)), ((0,), (1,)))
    found = jax.jit(lambda lhs, rhs: quantized_dot_general(lhs, rhs, dims, policy=policy))(lhs, rhs)
    x, w = lhs.reshape(4, 3, 30), jnp.transpose(rhs, (1, 3, 0, 2)).reshape(4, 30, 7)
    expected = jnp.stack([multiply(a, b, policy) for a, b in zip(x, w, strict=True)])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    plain = quantized_dot_general(lhs, rhs, dims, policy=PrecisionPolicy())
    np.testing.assert_array_equal(plain, jax.lax.dot_general(lhs, rhs, dims))
    np.testing.assert_allclose(found, plain, atol=0.5)


def test_batches_of_dot_general_are_rounded_apart():
    policy = precision_policy("mxfp4_stochastic")
    x, w, g = (jnp.stack([m, m]) for m in matrices().values())
    dims = (((2,), (1,)), ((0,), (0,)))

    @jax.jit
    def gradient(w):
        return jax.vjp(lambda w: quantized_dot_general(x, w, dims, policy=policy, key=KEY), w)[1](g)[0]

    first, second = gradient(w)
    assert np.any(first != second)
    np.testing.assert_array_equal(gradient(w)[0], first)


@pytest.mark.parametrize("name", ["fp8_current", "fp8_delayed", "int8_switchback", "mxfp8", "int8_block"])
def test_scales_are_those_of_the_whole_array_on_a_mesh(name):
    policy, tensors = precision_policy(name), matrices(rows=64, inputs=64, outputs=64)
    tensors["x"] = tensors["x"].at[60, 3].set(50.0)  # on the last device alone
    scales = scales_for(policy, **tensors)
    expected = three_products(policy, **tensors, scales=scales)
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    places = {"x": ("data", None), "w": (None, "tensor"), "g": ("data", "tensor")}
    with use_mesh(mesh):
        placed = {n: jax.device_put(t, NamedSharding(mesh, PartitionSpec(*places[n]))) for n, t in tensors.items()}
        found = three_products(policy, **placed, scales=scales)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-4, atol=1e-3)


def test_members_of_a_population_have_scales_of_their_own():
    policy = precision_policy("fp8_current")
    x, w = jax.random.normal(KEY, (3, 8, 16)) * jnp.array([1, 100, 1e-3])[:, None, None], jnp.eye(16)
    found = jax.jit(jax.vmap(lambda x: quantized_matmul(x, w, policy)))(x)
    np.testing.assert_allclose(found, jnp.stack([multiply(m, w, policy) for m in x]), rtol=1e-6)


def test_delayed_fp8_is_flaxs():
    """Scales, histories and products of `Fp8DirectDotGeneralOp`, over steps with a gradient of a size that changes."""
    from jaxlm.training.low_precision import delayed_scales, record_amax

    policy, tensors = precision_policy("fp8_delayed"), matrices()
    op = fp8_ops.Fp8DirectDotGeneralOp(amax_history_length=4)
    x, w, g = tensors.values()
    dims = (((1,), (0,)), ((), ()))
    theirs = op.init(KEY, x, w, dims)["_overwrite_with_gradient"]
    ours = {"scale": jnp.ones(3), "history": jnp.zeros((3, 4))}

    @jax.jit
    def their_step(meta, x, w, g):
        call = lambda meta, x, w: op.apply({"_overwrite_with_gradient": meta}, x, w, dims)  # noqa: E731
        y, pull = jax.vjp(call, meta, x, w)
        return (y, *pull(g))

    @jax.jit
    def our_step(state, x, w, g):
        scales = delayed_scales(state, policy)
        call = lambda meter, x, w: quantized_matmul(x, w, policy, scales=scales, meter=meter)  # noqa: E731
        y, pull = jax.vjp(call, jnp.zeros(3), x, w)
        meter, dx, dw = pull(g)
        return y, record_amax(state, meter, policy), dx, dw

    for i in range(7):
        sizes = jnp.array([1.0, 0.5, 10.0 ** (i % 3)]) * (0.0 if i == 5 else 1.0)
        step = (x * sizes[0], w * sizes[1], g * sizes[2])
        their_y, theirs, their_dx, their_dw = their_step(theirs, *step)
        our_y, ours, our_dx, our_dw = our_step(ours, *step)
        for i, name in enumerate(("input", "kernel", "output_grad")):
            np.testing.assert_allclose(ours["scale"][i], theirs[f"{name}_scale"][0], rtol=1e-6)
            np.testing.assert_array_equal(ours["history"][i], theirs[f"{name}_amax_history"])
        np.testing.assert_allclose(our_y, their_y, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(our_dw, their_dw, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(our_dx, their_dx, rtol=1e-4, atol=1e-4)


def test_native_products_that_there_are_not_are_refused_by_name():
    x = jnp.ones((4, 32))
    for name, what in (("fp8_current", "e[45]m[32]"), ("mxfp8", "e4m3 in blocks with e8m0 scales")):
        policy = precision_policy(name)
        policy = dataclasses.replace(policy, implementation="native")
        with pytest.raises(ConfigError, match=f"'{name}' multiplies {what}, of which cpu has no products.*'emulated'"):
            quantized_matmul(x, x.T, policy)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quantized_matmul(x, x.T, precision_policy("mxfp4_stochastic")), "need a key"),
        (lambda x: quantized_matmul(x, x.T, precision_policy("fp8_delayed")), "need scales"),
        (lambda x: Product(hadamard=24), "expected a power of two"),
        (lambda x: Product(None, PLAIN, hadamard=16), "neither may be the forward's"),
        (lambda x: PrecisionPolicy(weights="int8"), "weights of a policy is 'int8'"),
        (lambda x: PrecisionPolicy(weights="bfloat16", master="float16"), "master is 'float16'"),
        (lambda x: PrecisionPolicy(implementation="fast"), "implementation of a policy is 'fast'"),
        (lambda x: PrecisionPolicy(forward=Product(None, mx("e4m3"))), "says how both its operands"),
        (lambda x: PrecisionPolicy(wgrad=Product(Quantizer("e4m3", history=4))), "each is stored in one way"),
        (lambda x: PrecisionPolicy(wgrad=Product(PLAIN, Quantizer("e5m2", history=4))), "each is stored in one way"),
        (lambda x: PrecisionPolicy(dgrad=Product(None)), "is in no forward product"),
        (
            lambda x: PrecisionPolicy(forward=Product(hadamard=16), wgrad=Product(None, PLAIN)),
            "backward ones store their own",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call(jnp.ones((4, 32)))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps([np.asarray(product).tolist() for product in aqts(*whole_numbers())]) + "\n")
