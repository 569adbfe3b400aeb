"""The Hopper kernels: in Pallas' GPU interpreter, which follows copies and barriers, and compiled for an absent H200.

The interpreter takes seconds for each thread block, so there are few cases here, with small tiles. To compile for the
H200, make an environment with `tests/pallas_kernels/make_cuda_environment.sh FOLDER` and in it run
`pytest -m gpu_aot -n 0 tests/pallas_kernels/attention/test_gpu.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import flash_attention
from pallas_kernels.attention.gpu_tables import GPU_TILES, SHARED_MEMORY_BYTES, GpuTiles, bounds, shared_memory_bytes
from pallas_kernels.attention.problem import Structure
from tests.pallas_kernels import absent_gpu
from tests.pallas_kernels.attention.test_parity import Case, check

KERNEL = {
    "interpret": True,
    "tiles": GpuTiles(rows=8, groups=2, other=8, groups_backward=2, other_backward=8, stages=2),
}

SLOW = {
    "causal": Case(batch=1, queries=29, keys=29, heads=2, kv_heads=1),
    "window, segments, bias, soft cap": Case(
        batch=2, queries=30, keys=30, heads=2, kv_heads=1, window=9, softcap=3.0, segments="any", bias=True
    ),
    "wide heads, more queries than keys": Case(batch=1, queries=30, keys=17, heads=1, kv_heads=1, head_dim=192),
    "bfloat16, sorted segments": Case(
        batch=1, queries=32, keys=32, heads=2, kv_heads=2, dtype="bfloat16", segments="sorted"
    ),
    "not causal": Case(batch=2, queries=20, keys=33, heads=2, kv_heads=1, causal=False, segments="any"),
}


def test_everything_at_once_equals_the_reference():
    case = Case(
        batch=1, queries=13, keys=15, heads=2, kv_heads=1, window=9, softcap=3.0, segments="any", bias=True
    )  # fmt: skip
    tiles = GpuTiles(rows=16, groups=1, other=8, groups_backward=1, other_backward=8, stages=2)
    check(case, "gpu", {"interpret": True, "tiles": tiles}, twice=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_equals_the_reference_in_float64(name):
    check(SLOW[name], "gpu", KERNEL)


@pytest.mark.parametrize("by_query", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 37])
@pytest.mark.parametrize(("queries", "keys", "offset"), [(100, 100, 0), (70, 130, 60), (130, 70, -60), (64, 64, 9)])
def test_bounds_hold_what_is_seen_and_masks_what_is_partly_seen(by_query, causal, window, queries, keys, offset):
    structure, sizes = Structure(causal, window, offset), (16, 32)
    allowed = structure.allowed(np.arange(queries)[:, None], np.arange(keys)[None, :])
    allowed = np.ones((queries, keys), bool) if allowed is None else np.asarray(allowed)
    table = np.asarray(bounds(structure, queries, keys, *sizes, None, None, by_query))[0]
    seen = {}
    for i, j in np.ndindex(-(-queries // sizes[0]), -(-keys // sizes[1])):
        block = allowed[i * sizes[0] : (i + 1) * sizes[0], j * sizes[1] : (j + 1) * sizes[1]]
        if block.any():
            seen.setdefault(i if by_query else j, {})[j if by_query else i] = block.all() and block.shape[1] == sizes[1]
    for tile, (low, whole_low, whole_high, high) in enumerate(table):
        assert low <= whole_low <= whole_high <= high
        expected = seen.get(tile, {})
        assert list(range(low, high)) == sorted(expected)
        assert [j for j in sorted(expected) if expected[j]] == list(range(whole_low, whole_high))


@pytest.mark.parametrize("head_dim", GPU_TILES)
def test_tables_stay_below_the_shared_memory(head_dim):
    needed = shared_memory_bytes(GPU_TILES[head_dim], head_dim)
    assert max(needed.values()) <= SHARED_MEMORY_BYTES, needed


@pytest.mark.gpu_aot
@absent_gpu.needs_plugin
class TestCompiledForAnAbsentH200:
    @pytest.fixture(scope="class")
    def sharding(self):
        return absent_gpu.sharding()

    def compiled(self, sharding, dim, implementation="gpu", segments=False, bias=False, tiles=None, **options):
        def shape(*sizes, dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

        def loss(q, k, v, ids, key_bias):
            out, lse = flash_attention(
                q, k, v, segment_ids=ids if segments else None, bias=key_bias if bias else None, return_lse=True,
                implementation=implementation, tiles=tiles, **options,
            )  # fmt: skip
            return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

        length = 1100
        shapes = shape(1, length, 4, dim), shape(1, length, 2, dim), shape(1, length, 2, dim)
        shapes += shape(1, length, dtype=jnp.int32), shape(1, length, dtype=jnp.float32)
        return jax.jit(jax.grad(loss, (0, 1, 2, 4))).lower(*shapes).compile()

    @pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
    @pytest.mark.parametrize(
        "options", [{}, {"segments": True, "bias": True, "softcap": 30.0, "window": 300}], ids=["causal", "everything"]
    )
    def test_all_kernels_compile(self, sharding, dim, options):
        assert "mosaic_gpu" in self.compiled(sharding, dim, **options).as_text()

    def test_auto_takes_the_kernel(self, sharding):
        assert "mosaic_gpu" in self.compiled(sharding, 128, implementation="auto").as_text()

    def test_tiles_that_need_more_are_refused_by_arithmetic_and_compiler(self, sharding):
        huge = GpuTiles(other=256, stages=3)
        assert shared_memory_bytes(huge, 128)["forward"] > SHARED_MEMORY_BYTES
        with pytest.raises(ValueError, match="shared memory"):
            self.compiled(sharding, 128, tiles=huge)
