import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.layers import LayerNorm, RMSNorm, RopeScaling, rotary


def test_rotation_is_multiplication_by_a_complex_number():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 1000, (2, 5)).astype(np.int32)
    cos, sin = rotary.tables(jnp.asarray(positions), 8, 10_000.0)
    got = np.asarray(rotary.rotate(jnp.asarray(x), cos, sin))
    angle = positions[:, :, None, None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-4)


def test_only_the_first_dimensions_are_rotated():
    x = jnp.ones((1, 3, 1, 8))
    cos, sin = rotary.tables(jnp.arange(3)[None], 2, 100.0)
    got = rotary.rotate(x, cos, sin)
    np.testing.assert_array_equal(got[..., 2:], x[..., 2:])
    assert float(jnp.abs(got[:, 1:, :, :2] - 1).max()) > 0.1


def test_linear_scaling_divides_positions():
    plain = rotary.frequencies(8, 1e4)
    np.testing.assert_allclose(rotary.frequencies(8, 1e4, RopeScaling("linear", 4.0, 128)), plain / 4)


def test_dynamic_scaling_changes_the_base_beyond_the_original_length():
    scaling = RopeScaling("dynamic", 2.0, 128)
    np.testing.assert_allclose(rotary.frequencies(8, 1e4, scaling, 100), rotary.frequencies(8, 1e4), rtol=1e-6)
    base = 1e4 * (2.0 * 512 / 128 - 1) ** (8 / 6)
    np.testing.assert_allclose(rotary.frequencies(8, 1e4, scaling, 512), base ** (-np.arange(0, 8, 2) / 8), rtol=1e-5)


def test_llama3_scaling_by_wavelength():
    scaling = RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    got = np.asarray(rotary.frequencies(128, 5e5, scaling))
    for i, f in enumerate(5e5 ** (-np.arange(0, 128, 2) / 128)):
        wavelength = 2 * np.pi / f
        if wavelength > 8192 / 1.0:
            expected = f / 8
        elif wavelength < 8192 / 4.0:
            expected = f
        else:
            s = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected = (1 - s) * f / 8 + s * f
        np.testing.assert_allclose(got[i], expected, rtol=1e-4)


def test_yarn_keeps_fast_and_stretches_slow_dimensions():
    scaling = RopeScaling("yarn", 4.0, 4096)
    plain, got = rotary.frequencies(64, 1e4), rotary.frequencies(64, 1e4, scaling)
    np.testing.assert_allclose(got[:5], plain[:5], rtol=1e-6)
    np.testing.assert_allclose(got[-5:], plain[-5:] / 4, rtol=1e-6)
    cos, _ = rotary.tables(jnp.zeros((1, 1), jnp.int32), 64, 1e4, scaling)
    np.testing.assert_allclose(cos, 0.1 * np.log(4.0) + 1, rtol=1e-6)


def test_unknown_scaling_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'yarn'"):
        RopeScaling("yarm", 2.0, 128)


def test_norms_equal_their_definitions_in_float64():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)) * 5 + 2, jnp.float32)
    scale = jnp.asarray(np.random.default_rng(1).normal(size=16), jnp.float32)
    bias = jnp.asarray(np.random.default_rng(2).normal(size=16), jnp.float32)
    ours = RMSNorm(1e-5).apply({"params": {"scale": scale}}, x)
    wide = np.asarray(x, np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    offset = RMSNorm(1e-5, unit_offset=True).apply({"params": {"scale": scale - 1}}, x)
    np.testing.assert_allclose(offset, ours, atol=1e-5)
    ours = LayerNorm(1e-5).apply({"params": {"scale": scale, "bias": bias}}, x)
    centered = np.asarray(x, np.float64) - np.asarray(x, np.float64).mean(-1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale) + np.asarray(bias)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
