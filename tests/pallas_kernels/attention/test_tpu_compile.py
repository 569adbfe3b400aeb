"""Every TPU kernel and every row of the block tables, compiled for chips that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import flash_attention, flash_decode, tiles
from pallas_kernels.attention.problem import Structure
from tests.pallas_kernels.absent_tpu import KERNEL_CHIPS, compile_for, mesh

LENGTH = 1100  # a last block that is not full, and more than one block

# What each row of the table is compiled with: together they take every path of the kernels.
FEATURES = {
    (128, 2): {"window": 700, "softcap": 30.0, "segments": True, "bias": True},
    (128, 4): {},
    (256, 2): {"causal": False, "segments": True},
    (256, 4): {"window": 300},
}


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def attention(dim, itemsize, found_tiles=None, **options):
    """Gradients of attention with these features, and shapes for its arguments."""
    segments, bias = options.pop("segments", False), options.pop("bias", False)
    dtype = {2: jnp.bfloat16, 4: jnp.float32}[itemsize]
    shapes = [shape(1, LENGTH, 4, dim, dtype=dtype)] + [shape(1, LENGTH, 2, dim, dtype=dtype)] * 2
    shapes += [shape(1, LENGTH, dtype=jnp.int32), shape(1, LENGTH)]

    def loss(q, k, v, ids, key_bias):
        out, lse = flash_attention(
            q, k, v, segment_ids=ids if segments else None, bias=key_bias if bias else None, return_lse=True,
            implementation="tpu", tiles=found_tiles, **options,
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    return jax.grad(loss, (0, 1, 2, 4)), shapes


@pytest.mark.parametrize("name", KERNEL_CHIPS)
@pytest.mark.parametrize("row", tiles.TPU_TILES)
def test_all_three_kernels_compile(name, row):
    program, shapes = attention(*row, **FEATURES[row])
    text = compile_for(mesh(name), program, *shapes).as_text()
    for kernel in ("forward_kernel", "dq_kernel", "dkv_kernel"):
        assert kernel in text


@pytest.mark.parametrize("name", KERNEL_CHIPS)
@pytest.mark.parametrize(("dim", "dtype"), [(64, jnp.bfloat16), (80, jnp.bfloat16), (256, jnp.float32)])
def test_decoding_compiles(name, dim, dtype):
    def decode(q, k, v, lengths):
        return flash_decode(q, k, v, lengths, window=300, return_lse=True, implementation="tpu")

    cache = shape(2, 4, 1000, dim, dtype=dtype)
    shapes = shape(2, 1, 8, dim, dtype=dtype), cache, cache, shape(2, dtype=jnp.int32)
    assert "decode_kernel" in compile_for(mesh(name), decode, *shapes).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_as_many_rows_as_decoding_takes_compile(dtype):
    queries = tiles.TPU_DECODE_ROWS // 2

    def decode(q, k, v, lengths):
        return flash_decode(q, k, v, lengths, q_offset=0, return_lse=True, implementation="tpu")

    cache = shape(2, 4, 1000, 256, dtype=jnp.float32)
    shapes = shape(2, queries, 8, 256, dtype=dtype), cache, cache, shape(2, dtype=jnp.int32)
    assert "decode_kernel" in compile_for(mesh("v5p"), decode, *shapes).as_text()


def test_auto_takes_the_kernel_for_an_absent_tpu():
    def attend(q):
        return flash_attention(q, q, q)

    assert "forward_kernel" in compile_for(mesh("v6e"), attend, shape(1, 256, 2, 64, dtype=jnp.bfloat16)).as_text()


@pytest.mark.parametrize("row", tiles.TPU_TILES)
def test_tables_stay_below_the_vector_memory(row):
    needed = tiles.tpu_vmem_bytes(tiles.tpu_tiles(8192, 8192, *row), *row)
    assert max(needed.values()) <= tiles.TPU_VMEM_BYTES, needed


@pytest.mark.slow
def test_tiles_that_need_more_are_refused_by_arithmetic_and_compiler():
    huge = tiles.Tiles(1024, 4096, 512, 512)
    assert tiles.tpu_vmem_bytes(huge, 128, 2)["forward"] > tiles.TPU_VMEM_BYTES
    shapes = [shape(1, 8192, 2, 128, dtype=jnp.bfloat16)] * 3

    def attend(q, k, v):
        return flash_attention(q, k, v, implementation="tpu", tiles=huge)

    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_for(mesh("v5e"), attend, *shapes)


def visited(steps, by_query):
    chosen = steps.flags & tiles.COMPUTE > 0
    pairs = (steps.major, steps.minor) if by_query else (steps.minor, steps.major)
    return {(int(i), int(j)): bool(f & tiles.MASK) for i, j, f in zip(*(x[chosen] for x in (*pairs, steps.flags)))}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 37, 200])
@pytest.mark.parametrize(("queries", "keys", "offset"), [(100, 100, 0), (70, 130, 60), (130, 70, -60), (64, 64, 9)])
def test_exactly_the_blocks_that_see_something_are_visited(causal, window, queries, keys, offset):
    structure, (bq, bk) = Structure(causal, window, offset), (16, 32)
    allowed = structure.allowed(np.arange(queries)[:, None], np.arange(keys)[None, :])
    allowed = np.ones((queries, keys), bool) if allowed is None else np.asarray(allowed)
    expected = {}
    for i, j in np.ndindex(-(-queries // bq), -(-keys // bk)):
        block = allowed[i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
        if block.any():
            expected[i, j] = not (block.all() and block.shape[1] == bk)
    by_query = tiles.pairs_by_query(structure, queries, keys, bq, bk)
    assert visited(by_query, True) == expected
    by_key = tiles.pairs_by_key(structure, queries, keys, bq, bk, group=1)
    assert visited(by_key, False) == expected
    for steps, blocks in ((by_query, -(-queries // bq)), (by_key, -(-keys // bk))):
        first, last = (steps.major[steps.flags & flag > 0].tolist() for flag in (tiles.FIRST, tiles.LAST))
        assert first == last == list(range(blocks))  # each block is begun and written once, in order


def test_blocks_of_other_segments_are_passed_over_and_not_fetched():
    steps = tiles.pairs_by_query(Structure(), 64, 64, 16, 16)
    ids = jnp.asarray(np.repeat([[1, 1, 2, 2], [1, 2, 3, 3]], 16, axis=1))
    flags, fetch = (np.asarray(x).reshape(2, -1) for x in tiles.by_segments(steps, ids, ids, 16, 16, True))
    for row, expected in enumerate(
        ({(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3)}, {(0, 0), (1, 1), (2, 2), (3, 2), (3, 3)})
    ):
        chosen = flags[row] & tiles.COMPUTE > 0
        assert set(zip(steps.major[chosen].tolist(), steps.minor[chosen].tolist())) == expected
        np.testing.assert_array_equal(fetch[row][chosen], steps.minor[chosen])
        moved = np.flatnonzero(np.diff(fetch[row])) + 1
        assert chosen[moved].all()  # a block is fetched only to be used
