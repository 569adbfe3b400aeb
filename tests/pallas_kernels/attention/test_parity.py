"""One suite for every implementation of attention: values, gradients and determinism against the reference in float64.

Kernels run in Pallas' interpreter with small blocks, so that tables, masks and ragged edges all occur at tiny shapes.
`test_gpu` runs it over the Hopper kernels.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import flash_attention
from pallas_kernels.attention.tiles import Tiles

IMPLEMENTATIONS = {
    "reference": {},
    "blocked": {},
    "tpu": {"interpret": True, "tiles": Tiles(16, 32, 32, 16)},
}


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 2
    queries: int = 40
    keys: int = 40
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    causal: bool = True
    window: int | None = None
    q_offset: int | None = None
    softcap: float | None = None
    segments: str | None = None
    bias: bool = False
    dtype: str = "float32"
    seed: int = 0

    @property
    def options(self):
        names = ("causal", "window", "q_offset", "softcap")
        return {name: getattr(self, name) for name in names}


CASES = {
    "causal": Case(),
    "window": Case(window=7, heads=2, kv_heads=2, head_dim=64),
    "full, one key head": Case(causal=False, kv_heads=1, head_dim=80, queries=33, keys=33),
    "window forward and back": Case(causal=False, window=9, queries=21, keys=50),
    "fewer queries": Case(queries=17, keys=45, softcap=2.0, head_dim=96),
    "more queries: the first see nothing": Case(queries=45, keys=19),
    "offset": Case(queries=24, keys=40, q_offset=5, window=11),
    "segments": Case(segments="sorted", window=13),
    "segments in any order, bias, soft cap": Case(segments="any", bias=True, softcap=3.0),
    "bias hides whole rows": Case(bias=True, segments="sorted", head_dim=192, heads=2),
    "bfloat16": Case(dtype="bfloat16", head_dim=128, segments="sorted"),
    "bfloat16, wide heads": Case(dtype="bfloat16", head_dim=256, heads=2, kv_heads=1, window=20, softcap=5.0),
}


def arrays(case):
    rng = np.random.default_rng(case.seed)
    q = rng.normal(size=(case.batch, case.queries, case.heads, case.head_dim)).astype(np.float32)
    k, v = (rng.normal(size=(case.batch, case.keys, case.kv_heads, case.head_dim)).astype(np.float32) for _ in "kv")
    q, k, v = (np.asarray(x, jnp.dtype(case.dtype)) for x in (q, k, v))
    ids = None
    if case.segments == "any":
        ids = tuple(rng.integers(0, 4, size=(case.batch, n), dtype=np.int32) for n in (case.queries, case.keys))
    elif case.segments:
        ids = np.sort(rng.integers(0, 4, size=(case.batch, case.keys), dtype=np.int32), axis=1)
    bias = None
    if case.bias:
        bias = rng.normal(size=(case.batch, case.keys)).astype(np.float32)
        bias[0, : case.keys // 3] = -np.inf
    return q, k, v, bias, ids


@functools.partial(jax.jit, static_argnames=("case", "implementation", "options"))
def run(q, k, v, bias, ids, case, implementation, options=()):
    """Gradients of a function of both results, and the results."""

    def loss(q, k, v, bias):
        out, lse = flash_attention(
            q, k, v, bias=bias, segment_ids=ids, return_lse=True, implementation=implementation,
            **case.options, **dict(options),
        )  # fmt: skip
        wide = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        return jnp.sum(jnp.sin(2 * wide)) + jnp.sum(jnp.cos(jnp.where(jnp.isneginf(lse), 0.0, lse))), (out, lse)

    argnums = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    return jax.grad(loss, argnums, has_aux=True)(q, k, v, bias)


@functools.cache
def expected(case):
    with jax.enable_x64(True):
        wide = [None if x is None else np.asarray(x, np.float64) for x in arrays(case)[:4]]
        return jax.tree.map(np.asarray, run(*wide, arrays(case)[4], case, "reference"))


def check(case, implementation, options=None, twice=True):
    options = tuple((IMPLEMENTATIONS[implementation] if options is None else options).items())
    got = jax.tree.map(np.asarray, run(*arrays(case), case, implementation, options))
    if twice:
        again = jax.tree.map(np.asarray, run(*arrays(case), case, implementation, options))
        jax.tree.map(np.testing.assert_array_equal, got, again)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected(case)), strict=True):
        x = x.astype(np.float64)
        assert not np.isnan(x).any()
        np.testing.assert_array_equal(np.isneginf(x), np.isneginf(y))
        x, y = (np.where(np.isneginf(z), 0.0, z) for z in (x, y))
        tolerance = 2e-5 if case.dtype == "float32" else 2e-2
        np.testing.assert_allclose(x, y, atol=tolerance * max(1.0, np.abs(y).max()), rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_float64(name, implementation):
    check(CASES[name], implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_see_nothing_give_zero_and_gradients_of_zero(implementation):
    q, k, v, _, _ = arrays(Case())
    ids = np.ones((2, 40), np.int32)
    ids[1, 7:] = 3
    # Their own keys are hidden, the others of another segment.
    bias = np.where(ids == 3, -np.inf, 0.0).astype(np.float32)

    def loss(q, k, v):
        out = flash_attention(
            q, k, v, segment_ids=ids, bias=bias, implementation=implementation, **IMPLEMENTATIONS[implementation]
        )
        return jnp.sum(jnp.cos(out)), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    for x in (out, *gradients):
        assert not np.isnan(x).any()
        assert not np.asarray(x)[1, 7:].any()
        assert np.asarray(x)[0].any()


lengths = st.integers(1, 50)
some_case = st.builds(
    Case,
    queries=lengths,
    keys=lengths,
    heads=st.sampled_from([2, 4]),
    kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([32, 48]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 40),
    q_offset=st.none() | st.integers(-20, 20),
    softcap=st.none() | st.just(2.0),
    segments=st.none() | st.just("any"),
    bias=st.booleans(),
)


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "reference"])
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(some_case)
def test_any_shape_and_mask(implementation, case):
    check(case, implementation)
