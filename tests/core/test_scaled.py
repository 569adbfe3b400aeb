"""Blocks and scales: the golden file is what gfloat 0.5.2 (PyPI) makes of the same blocks; the last test runs gfloat
itself where it is installed. `python tests/core/test_scaled.py` writes the file again."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.core.formats import number_format
from jaxlm.core.scaled import NVFP4, Quantizer, block_amax, dequantize, fake_quantize, mx, quantize

GOLDEN = Path(__file__).with_name("golden_mx.json")
ELEMENTS = {
    "e4m3": "mxfp8_e4m3", "e5m2": "mxfp8_e5m2", "e3m2": "mxfp6_e3m2", "e2m3": "mxfp6_e2m3", "e2m1": "mxfp4_e2m1",
    "q2.6": "mxint8",
}  # fmt: skip


def blocks():
    """Blocks of 32: mixed sizes, saturating, with zeros, all zeros, one outlier. Exact in float32."""
    i = np.arange(32)
    mixed = ((i * 37) % 101 - 50) / 64 * np.exp2(i % 7 - 3.0)
    large = ((i * 29) % 97 - 48) * 10.4375
    sparse = np.where(i % 3 == 0, 0.0, ((i * 13) % 31 - 15) / 4096)
    outlier = np.where(i == 5, 7.890625, i / 128)
    return np.stack([mixed, large, sparse, np.zeros(32), outlier]).astype(np.float32)


def gfloats(element):
    gfloat = pytest.importorskip("gfloat")
    formats = pytest.importorskip("gfloat.formats")
    info = getattr(formats, f"format_info_{ELEMENTS[element]}")
    rows = [gfloat.quantize_block(info, row.astype(np.float64), gfloat.compute_scale_amax) for row in blocks()]
    return np.stack(rows)


@pytest.mark.parametrize("element", ELEMENTS)
def test_mx_is_gfloats(element):
    expected = json.loads(GOLDEN.read_text())[element]
    np.testing.assert_array_equal(fake_quantize(jnp.asarray(blocks()), mx(element)), expected)


@pytest.mark.parametrize("element", ELEMENTS)
def test_mx_beside_gfloat_itself(element):
    np.testing.assert_array_equal(fake_quantize(jnp.asarray(blocks()), mx(element)), gfloats(element))


@pytest.mark.parametrize("element", ELEMENTS)
def test_mx_of_one_power_of_two_is_exact(element):
    x = jnp.asarray(np.exp2(np.arange(-20.0, 20))[:, None] * np.ones((1, 32)), jnp.float32)
    np.testing.assert_array_equal(fake_quantize(x, mx(element)), x)


def test_mx_rounds_its_scale_down_and_saturates():
    s = quantize(jnp.full((1, 32), 500.0), mx("e4m3"))
    assert (s.scale[0, 0], s.values[0, 0]) == (1.0, 448.0)


def test_shrunk_mx_saturates_nowhere_and_is_unbiased():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 64)) * np.exp2(rng.integers(-4, 4, (4, 1))), jnp.float32)
    means = {}
    for shrink in (1.0, 0.75):
        q = mx("e2m1", rounding="stochastic", shrink=shrink)
        one = jax.jit(jax.vmap(lambda key, q=q: fake_quantize(x, q, key=key)))
        means[shrink] = jnp.mean(one(jax.random.split(jax.random.key(0), 4000)), axis=0)
        scaled = quantize(x, q, key=jax.random.key(0))
        exact = jnp.repeat(scaled.scale, 32, axis=1) * scaled.whole
        assert bool(jnp.any(jnp.abs(x / exact) > 6)) == (shrink == 1.0)
    error = jnp.abs(means[0.75] - x) / block_amax(x, (1, None))
    assert float(jnp.max(error)) < 0.02
    assert float(jnp.max(jnp.abs(means[1.0] - x) / block_amax(x, (1, None)))) > 0.05  # what saturates stays short


def test_nvfp4_by_hand():
    x = np.zeros((1, 32), np.float32)
    x[0, :3], x[0, 16:18] = (12.0, -3.0, 0.9), (0.5, 0.25)
    s = quantize(jnp.asarray(x), NVFP4)
    whole = 12 / (448 * 6)
    # Block 1: 12/6 is 448 of them; block 2: 0.5/6 is 18.67 of them, of which E4M3 has 18 and 20.
    np.testing.assert_allclose(s.whole, whole, rtol=1e-6)
    np.testing.assert_array_equal(s.scale, [[448.0, 18.0]])
    np.testing.assert_array_equal(s.values[0, :3], [6, -1.5, 0.5])
    np.testing.assert_array_equal(s.values[0, 16:18], [6, 3])  # 6.22 and 3.11
    np.testing.assert_allclose(dequantize(s, NVFP4)[0, 16], 6 * 18 * whole, rtol=1e-6)


@pytest.mark.parametrize("summed", [0, 1])
@pytest.mark.parametrize("block", [(None, None), (1, None), (2, 4), (32, 32), (1, 3)])
def test_int8_by_blocks_equals_a_loop(block, summed):
    x = np.random.default_rng(0).normal(size=(10, 7)).astype(np.float32)
    x[:2] = 0
    found = fake_quantize(jnp.asarray(x), Quantizer("int8", block), summed=summed)
    rows, columns = (min(b or 99, n) for b, n in zip(block if summed else block[::-1], x.shape, strict=True))
    expected = np.zeros_like(x)
    for i in range(0, 10, rows):
        for j in range(0, 7, columns):
            part = x[i : i + rows, j : j + columns]
            top = np.abs(part).max()
            scale = np.float32(1 if top == 0 else top / np.float32(127))
            expected[i : i + rows, j : j + columns] = np.clip(np.round(part / scale), -127, 127) * scale
    np.testing.assert_allclose(found, expected, rtol=3e-7)


def test_ternary_weights_are_bitnets():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    mean = jnp.mean(jnp.abs(w))
    expected = jnp.clip(jnp.round(w / (mean + 1e-5)), -1, 1)
    s = quantize(w, Quantizer("ternary", (None, None), "mean"), summed=0)
    np.testing.assert_array_equal(s.values, expected)
    np.testing.assert_allclose(s.scale[0, 0], mean, atol=2e-5)


def test_a_scale_that_is_given_is_used():
    x = jnp.asarray([[1.0, 300.0, -900.0]])
    s = quantize(x, Quantizer("e4m3", history=4), scale=jnp.float32(0.5))
    np.testing.assert_array_equal(s.values, [[2.0, 448.0, -448.0]])
    half = Quantizer("e4m3", history=4, shrink=0.5)
    s = quantize(x, half, scale=jnp.float32(0.5))
    np.testing.assert_array_equal(s.values, [[1.0, 288.0, -448.0]])  # 300 is between 288 and 320
    np.testing.assert_array_equal(dequantize(s, half), [[1.0, 288.0, -448.0]])


def test_the_largest_value_of_a_block_comes_back_and_others_nearly():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 64)), jnp.float32)
    # Half the distance of the largest two values.
    for name, half in {"e4m3": 16.0, "e5m2": 4096.0, "int8": 0.5, "int4": 0.5, "e2m1": 1.0}.items():
        back = fake_quantize(x, Quantizer(name, (1, None)))
        np.testing.assert_allclose(jnp.max(jnp.abs(back), axis=1), jnp.max(jnp.abs(x), axis=1), rtol=1e-6)
        step = jnp.max(jnp.abs(x), axis=1, keepdims=True) / number_format(name).largest
        assert float(jnp.max(jnp.abs(back - x) / step)) <= half * (1 + 1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "int9"}, "no number format 'int9'"),
        ({"block": (0, None)}, r"block of a quantizer is \(0, None\)"),
        ({"scale": "e8m1"}, "did you mean 'e8m0'"),
        ({"block": None, "scale": "e8m0"}, "without blocks has no scale"),
        ({"block": None, "shrink": 0.5}, "scales nothing, but its shrink is 0.5"),
        ({"shrink": 0.0}, "shrink of a quantizer is 0.0"),
        ({"format": "e4m3", "block": (1, None), "history": 16}, "one float32 scale a tensor"),
        ({"rounding": "random"}, "rounding of a quantizer is 'random'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Quantizer(**settings)


def test_rounding_at_random_needs_a_key():
    with pytest.raises(ConfigError, match="e2m1 with stochastic rounding needs a random key"):
        quantize(jnp.ones((1, 32)), mx("e2m1", rounding="stochastic"))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: gfloats(name).tolist() for name in ELEMENTS}) + "\n")
