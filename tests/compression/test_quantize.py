"""Rounding within half a step, bytes as the format says, and models that run from what is packed."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import weights
from jaxlm.compression import QuantizeConfig, memory_report, quantize, quantize_matrix
from jaxlm.core import sharding, trees
from jaxlm.core.errors import ConfigError
from jaxlm.objectives import CausalLM
from jaxlm.peft import LoraConfig, adapted_axes, add_lora, remove_lora
from jaxlm.testing import tiny_decoder
from jaxlm.weights import Quantized
from pallas_kernels.quantized_matmul import quantized_matmul
from tests.pallas_kernels import absent_tpu

GOLDEN = Path(__file__).with_name("qwix.json")


def kernel(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, None), (4, 32), (4, 64)])
def test_rounds_to_the_nearest(bits, group, symmetric, axis):
    w = kernel(3, 64, 128)
    q = quantize_matrix(w, QuantizeConfig(bits, group, symmetric), axis)
    assert q.shape == w.shape
    block = group or w.shape[axis]
    step = np.repeat(np.asarray(q.scale, np.float32), block, axis)
    # A float16 minimum may move a whole block by its own rounding.
    slack = 0 if symmetric else 2e-3
    assert np.all(np.abs(np.asarray(q.dense()) - np.asarray(w)) <= 0.501 * step + slack)
    # No fewer steps than the format has.
    levels = {(8, True): 254, (8, False): 255, (4, True): 14, (4, False): 15}[bits, symmetric]
    blocks = np.moveaxis(np.asarray(w), axis, -1).reshape(-1, block)
    whole = 2 * np.abs(blocks).max(-1) if symmetric else np.ptp(blocks, axis=-1)
    expected = np.sort(whole / levels)
    np.testing.assert_allclose(np.sort(np.asarray(q.scale, np.float32).ravel()), expected, rtol=2e-3)


def test_one_group_is_one_scale_a_column_and_a_stack_is_its_layers():
    w = kernel(2, 64, 24)
    whole, grouped = (quantize_matrix(w, QuantizeConfig(4, group)) for group in (None, 64))
    chex.assert_trees_all_equal(whole, grouped)
    each = [quantize_matrix(w[i], QuantizeConfig(4)) for i in range(2)]
    chex.assert_trees_all_equal(whole, jax.tree.map(lambda *x: jnp.stack(x), *each))


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_by_error_is_never_worse_and_by_percentile_cuts_outliers(symmetric):
    w = kernel(256, 16).at[3, 5].set(40.0)

    def errors(clipping, **more):
        q = quantize_matrix(w, QuantizeConfig(4, 64, symmetric, clipping, **more))
        return np.sum(np.square(np.asarray(q.dense() - w)).reshape(4, 64, 16), axis=1), q

    plain, full = errors("none")
    best, _ = errors("mse")
    assert np.all(best <= plain * (1 + 1e-6))
    assert best.sum() < 0.97 * plain.sum()
    _, cut = errors("percentile", percentile=97.0)
    assert float(cut.scale[0, 5]) < 0.5 * float(full.scale[0, 5])
    chex.assert_trees_all_equal(errors("percentile", percentile=100.0)[1], full)


def test_blocks_without_a_range():
    zero, same = jnp.zeros((32, 2)), jnp.full((32, 2), 0.5)
    for symmetric in (True, False):
        assert not np.any(quantize_matrix(zero, QuantizeConfig(4, 32, symmetric)).dense())
        np.testing.assert_allclose(quantize_matrix(same, QuantizeConfig(8, 32, symmetric)).dense(), 0.5, rtol=1e-3)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, None, True), (8, 32, False), (4, 16, True), (4, 32, False)]
)
def test_bytes_are_those_of_the_format(bits, group, symmetric):
    model, params = tiny_decoder("llama")
    packed = quantize(params, QuantizeConfig(bits, group, symmetric))
    kernels = [x for path, x in trees.named_leaves(params) if path.startswith("blocks/") and path.endswith("kernel")]

    def size(w):
        layers, rows, columns = w.shape
        block = group or rows
        # Of 48 inputs, blocks of 32 do not fit: they are of 16.
        block = block if rows % block == 0 else 16
        return layers * columns * (rows * bits // 8 + rows // block * 2 * (1 if symmetric else 2))

    report = memory_report(packed)
    quantized = {name: kind for name, kind in report.kinds.items() if name.startswith("int")}
    assert sum(kind.bytes for kind in quantized.values()) == sum(map(size, kernels))
    assert report.parameters == trees.count(params)
    assert report.bytes == trees.num_bytes(packed)
    assert f"{report.bytes:,} bytes" in str(report)


def test_the_model_runs_from_packed_weights_and_skips_what_it_should():
    model, params = tiny_decoder("llama")
    config = QuantizeConfig(8, 16, skip=("*/down/kernel",), embeddings=True)
    packed = quantize(params, config)
    kinds = {path: type(w) for path, w in trees.named_leaves(packed, is_leaf=lambda x: isinstance(x, Quantized))}
    assert kinds["blocks/0/mlp/up/kernel"] is kinds["embedding/table"] is kinds["head/kernel"] is Quantized
    assert kinds["blocks/0/mlp/down/kernel"] is not Quantized
    ids = jnp.arange(18, dtype=jnp.int32).reshape(2, 9)
    dense = jax.tree.map(weights.dense, packed, is_leaf=lambda x: isinstance(x, Quantized))
    got, exact, before = (jax.jit(model.apply)({"params": p}, ids) for p in (packed, dense, params))
    chex.assert_trees_all_close(got, exact, atol=1e-4)
    assert float(jnp.max(jnp.abs(got - before))) < 0.05 * float(jnp.max(jnp.abs(before)))


def test_int8_activations_change_little():
    model, params = tiny_decoder("llama")
    ids = jnp.arange(18, dtype=jnp.int32).reshape(2, 9)
    w8a16, w8a8 = (quantize(params, QuantizeConfig(activation_bits=bits)) for bits in (None, 8))
    a, b = (jax.jit(model.apply)({"params": p}, ids) for p in (w8a16, w8a8))
    assert 0 < float(jnp.max(jnp.abs(a - b))) < 0.05 * float(jnp.max(jnp.abs(a)))


def test_under_adapters_the_base_is_quantized():
    _, params = tiny_decoder("llama")
    adapted = quantize(add_lora(jax.random.key(0), params, LoraConfig(rank=2)), QuantizeConfig(4, 16))
    chex.assert_trees_all_equal(remove_lora(adapted), quantize(params, QuantizeConfig(4, 16)))


def sharded_case(mesh_config, devices=None):
    model, params = tiny_decoder("llama", vocab_size=64)
    packed = quantize(params, QuantizeConfig(4, 16), model.axes())
    mesh = sharding.make_mesh(mesh_config, devices)
    rules = model.config.sharding_rules(mesh)
    axes = adapted_axes(packed, model.axes())
    return model, packed, mesh, rules, sharding.shardings(mesh, axes, jax.eval_shape(lambda x: x, packed), rules)


def test_a_sharded_quantized_model_equals_one_on_a_device():
    model, packed, mesh, rules, where = sharded_case(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    ids = jnp.arange(32, dtype=jnp.int32).reshape(4, 8)
    batch = {"inputs": ids, "targets": ids, "loss_weights": jnp.ones((4, 8))}
    loss = lambda p: CausalLM(model).sums(p, batch)["loss"]  # noqa: E731
    expected = jax.jit(loss)(packed)
    with sharding.use_mesh(mesh, rules):
        got = jax.jit(loss)(jax.device_put(packed, where))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_sharded_quantized_model_takes_kernels_on_tpus():
    devices = absent_tpu.mesh("v5e", (4,)).devices.flat
    model, packed, mesh, rules, where = sharded_case(sharding.MeshConfig(data=1, fsdp=2, tensor=2), list(devices))
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), packed, where)
    ids = jax.ShapeDtypeStruct((4, 8), jnp.int32, sharding=sharding.batch_sharding(mesh, 2))
    with sharding.use_mesh(mesh, rules), absent_tpu.no_disk_cache():
        text = jax.jit(lambda p, x: model.apply({"params": p}, x)).lower(params, ids).compile().as_text()
    # Query, key, value, out, gate and up of the scanned block; the three blocks of down's 48 inputs would straddle the
    # two chips that divide them, so that product stays XLA's.
    assert text.count('custom_call_target="tpu_custom_call"') == 6


@pytest.mark.parametrize(
    ("message", "config"),
    [
        ("bits is 3", {"bits": 3}),
        ("group is 24", {"group": 24}),
        ("valid: none, percentile", {"clipping": "best"}),
        ("percentile is 50", {"percentile": 50}),
        ("scale_dtype 'int8'", {"scale_dtype": "int8"}),
        ("takes bits=8", {"bits": 4, "activation_bits": 8}),
    ],
)
def test_bad_settings_are_named(message, config):
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig(**config)


def test_bad_parameters_are_named():
    good = {"blocks": [{"up": {"kernel": kernel(1, 63, 4)}}]}
    cases = {
        "blocks/0/up/kernel has 63 inputs: an odd": (good, QuantizeConfig(4)),
        "63 inputs, which blocks of 32": (good, QuantizeConfig(4, 32)),
        r"no parameter's path matches \['\*/gate": (good, QuantizeConfig(skip=("*/gate/kernel",))),
        "no kernel to quantize": ({"norm": jnp.ones(3)}, QuantizeConfig()),
        "quantized already, to 8 bits": (quantize(good, QuantizeConfig()), QuantizeConfig()),
        "not finite": (jax.tree.map(lambda w: w.at[0, 1, 2].set(jnp.nan), good), QuantizeConfig()),
    }
    for message, (params, config) in cases.items():
        with pytest.raises(ConfigError, match=message):
            quantize(params, config)


def qwix_case(bits, group):
    """What qwix 0.1.8 makes of a matrix, and of a product with it."""
    qwix = pytest.importorskip("qwix")
    w, x = kernel(64, 5, seed=1), kernel(3, 64, seed=2)
    tiles = {} if group is None else {0: group}
    q = qwix.quantize(w, f"int{bits}", channelwise_axes=(1,), tiled_axes=tiles)
    y = qwix.dot_general(x, q, (((1,), (0,)), ((), ())))
    return {"codes": np.asarray(q.qvalue, int).tolist(), "scale": np.asarray(q.scale).tolist(), "y": y.tolist()}


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
class TestNumericsOfQwix:
    """Against a file of its results; where qwix is installed, the file is checked against it."""

    def test_products(self, bits, group):
        golden = json.loads(GOLDEN.read_text())[f"int{bits}"]
        codes = np.array(golden["codes"]) + (8 if bits == 4 else 0)
        packed, _ = weights.pack(codes, bits, group or 64)
        scale = jnp.array(golden["scale"], jnp.float32)
        y = quantized_matmul(
            kernel(3, 64, seed=2), jnp.asarray(packed), scale, bits=bits, offset=8 if bits == 4 else 0
        )
        np.testing.assert_allclose(y, golden["y"], rtol=1e-5, atol=1e-5)

    def test_scales_and_codes(self, bits, group):
        golden = json.loads(GOLDEN.read_text())[f"int{bits}"]
        ours = quantize_matrix(kernel(64, 5, seed=1), QuantizeConfig(bits, group, scale_dtype="float32"))
        # Its bound reaches half a step beyond the largest code, so its scale is a little smaller.
        top = 2 ** (bits - 1) - 1
        np.testing.assert_allclose(ours.scale * top, np.array(golden["scale"]) * (top + 0.5), rtol=1e-6)
        theirs = np.array(golden["codes"]) * np.repeat(np.array(golden["scale"]), group or 64, 0)
        # Either is within half a step of the weight.
        step = np.repeat(np.asarray(ours.scale), group or 64, 0)
        assert np.all(np.abs(np.asarray(ours.dense()) - theirs) <= step * 1.001)

    def test_the_file_is_what_qwix_gives(self, bits, group):
        golden, live = json.loads(GOLDEN.read_text())[f"int{bits}"], qwix_case(bits, group)
        assert golden["codes"] == live["codes"]
        np.testing.assert_allclose(golden["scale"], live["scale"], rtol=1e-6)
        np.testing.assert_allclose(golden["y"], live["y"], rtol=1e-5, atol=1e-5)
