"""Formats against `ml_dtypes` (through bits and casts), against their definitions, and against chance."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.core.formats import FORMATS, fixed_point, number_format, stochastic_round

THEIRS = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


def all_values(name):
    """Every finite value of a format, by its bits, and the bits."""
    form = number_format(name)
    codes = np.arange(2**form.bits, dtype=np.uint8 if form.bits <= 8 else np.uint16)
    with np.errstate(invalid="ignore"):
        values = codes.view(THEIRS[name]).astype(np.float32)
    normal = np.isfinite(values) & ((np.abs(values) >= 2.0**-126) | (values == 0))
    return values[normal], codes[normal]


def points(name):
    """Random float32 of every size, all values of a format, ties between neighbors and what is next to those."""
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    near = rng.normal(size=20_000).astype(np.float32) * np.exp2(rng.integers(-20, 20, 20_000)).astype(np.float32)
    values = np.unique(all_values(name)[0]).astype(np.float64)
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (1, -1)]
    x = np.concatenate([anything, near, values.astype(np.float32), ties, *beside])
    return x[np.isfinite(x) & ((np.abs(x) >= 2.0**-126) | (x == 0))]


@pytest.mark.parametrize("name", THEIRS)
def test_rounding_is_that_of_ml_dtypes_after_clipping(name):
    form, x = number_format(name), points(name)
    with np.errstate(over="ignore"):
        expected = (x if form.infinite else np.clip(x, form.smallest, form.largest)).astype(THEIRS[name])
    np.testing.assert_array_equal(jax.jit(form.round)(x), expected.astype(np.float32))


@pytest.mark.parametrize("name", THEIRS)
def test_codes_are_the_bits(name):
    values, codes = all_values(name)
    form = number_format(name)
    np.testing.assert_array_equal(form.encode(jnp.asarray(values)), codes)
    np.testing.assert_array_equal(form.decode(jnp.asarray(codes)), values)
    assert form.largest == values.max()


def test_overflow():
    x = jnp.array([448.0, 464.0, 465.0, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(number_format("e4m3").round(x), [448, 448, 448, 448, -448, np.nan])
    assert np.isnan(np.asarray(x[2]).astype(ml_dtypes.float8_e4m3fn))  # what a plain cast makes of 465
    np.testing.assert_array_equal(
        number_format("float16").round(jnp.array([65519.0, 65520.0, -1e9])), [65504, np.inf, -np.inf]
    )


@pytest.mark.parametrize("name", ["int8", "int4", "ternary", "q3.13", "q2.6"])
def test_grids(name):
    form = number_format(name)
    grid = np.arange(round(form.smallest / form.step), round(form.largest / form.step) + 1) * form.step
    np.testing.assert_array_equal(form.round(jnp.asarray(grid, jnp.float32)), grid)
    np.testing.assert_array_equal(form.decode(form.encode(jnp.asarray(grid, jnp.float32))), grid)
    x = np.random.default_rng(0).uniform(1.2 * form.smallest, 1.2 * form.largest, 300).astype(np.float32)
    found = np.asarray(form.round(jnp.asarray(x)), np.float64)
    assert np.isin(found, grid).all()
    np.testing.assert_array_equal(np.abs(found - x), np.abs(x[:, None] - grid[None]).min(axis=1))


def test_fixed_point_is_guptas():
    form = fixed_point(3, 13)
    assert (form.bits, form.step, form.smallest, form.largest) == (16, 2.0**-13, -4.0, 4 - 2.0**-13)
    with pytest.raises(ConfigError, match="fixed point with 0 integer"):
        number_format("q0.8")


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"float32"}) + ["q3.13"])
def test_stochastic_rounding_takes_a_neighbor_and_has_no_bias(name):
    form, keys = number_format(name), jax.random.split(jax.random.key(0), 4000)
    x = jnp.array([0.3, -0.0371, 0.75 * form.exponent / 8, 1e-3], jnp.float32)
    rounded = np.asarray(jax.jit(jax.vmap(lambda key: form.round(x, key)))(keys), np.float64)
    for i, value in enumerate(np.asarray(x, np.float64)):
        seen = np.unique(rounded[:, i])
        assert len(seen) <= 2
        np.testing.assert_array_equal(form.round(jnp.asarray(seen, jnp.float32)), seen)  # values of the format
        error = 4 * (seen[-1] - seen[0]) / 2 / len(keys) ** 0.5
        assert abs(rounded[:, i].mean() - value) <= error + 1e-9
        if len(seen) == 2:
            assert seen[0] < value < seen[1]


def test_stochastic_rounding_to_bfloat16_keeps_what_nearest_loses():
    x = jnp.full(200_000, 1 + 2.0**-10, jnp.float32)
    assert number_format("bfloat16").round(x[:1]) == 1
    rounded = stochastic_round(x, jax.random.key(0))
    assert rounded.dtype == jnp.bfloat16
    assert float(jnp.mean(rounded.astype(jnp.float32))) == pytest.approx(1 + 2.0**-10, abs=2e-5)
    assert not np.isfinite(stochastic_round(jnp.array([jnp.inf]), jax.random.key(0)).astype(jnp.float32))


def test_unknown_formats_are_refused():
    with pytest.raises(ConfigError, match="no number format 'e4m4': did you mean 'e4m3'"):
        number_format("e4m4")
