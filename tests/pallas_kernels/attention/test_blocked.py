"""Memory of the blocked implementation, and its cut of long sequences into blocks and parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import blocked, flash_attention
from pallas_kernels.attention.problem import Structure


def test_at_length_4096_it_needs_an_eighth_of_the_references_memory():
    q = jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.float32)

    def temporary(implementation):
        def loss(q, k, v):
            return jnp.sum(flash_attention(q, k, v, implementation=implementation))

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    assert temporary("blocked") <= temporary("reference") / 8


@pytest.mark.parametrize("queries", [1, 128, 200, 1024, 1030, 1300, 4096, 4100])
def test_blocks_cover_all_queries_once_in_whole_parts(queries):
    found = blocked.blocks(Structure(), queries, queries)
    assert [b.start for b in found] == [0, *(b.end for b in found[:-1])]
    assert found[-1].end == queries
    assert all((b.end - b.start) % blocked.PART == 0 for b in found if b.end - b.start > blocked.PART)
    assert len(found) <= 9


@pytest.mark.parametrize("options", [{"window": 300}, {"causal": False, "softcap": 2.0}])
def test_a_loop_over_parts_equals_the_reference(options):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 1300, heads, 32)).astype(np.float32) for heads in (2, 1, 1))
    bias = rng.normal(size=(1, 1300)).astype(np.float32)
    ids = rng.integers(0, 3, size=(1, 1300))

    def gradients(implementation):
        def loss(q, k, v, bias):
            out = flash_attention(q, k, v, bias=bias, segment_ids=ids, implementation=implementation, **options)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(loss, (0, 1, 2, 3)))(q, k, v, bias)

    for x, y in zip(gradients("blocked"), gradients("reference")):
        np.testing.assert_allclose(x, y, atol=2e-5)
