"""Decoding against attention to each row's filled slots, and the combination of sources."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import AttentionError, combine, flash_attention, flash_decode, flash_decode_sharded

IMPLEMENTATIONS = {"reference": {}, "tpu": {"interpret": True, "block": 16}}
LENGTHS = np.array([37, 0, 5], np.int32)


def tensors(queries=2, capacity=40, heads=4, kv_heads=2, dim=32, dtype=np.float32):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(3, queries, heads, dim)).astype(dtype)
    return q, *(rng.normal(size=(3, kv_heads, capacity, dim)).astype(dtype) for _ in "kv")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"q_offset": 0, "softcap": 2.0}, {"starts": True}])
@pytest.mark.parametrize(("queries", "capacity"), [(1, 48), (3, 45)])
def test_decode_equals_attention_to_the_filled_slots(implementation, options, queries, capacity):
    q, k, v = tensors(queries, capacity)
    starts = np.array([9, 0, 4], np.int32) if options.get("starts") else np.zeros(3, np.int32)
    options = {**options, "starts": starts} if "starts" in options else options
    out, lse = flash_decode(
        q, k, v, LENGTHS, return_lse=True, implementation=implementation, **options, **IMPLEMENTATIONS[implementation]
    )
    for row, (start, length) in enumerate(zip(starts, LENGTHS)):
        if length == 0:
            assert not np.asarray(out[row]).any()
            assert np.isneginf(lse[row]).all()
            continue
        filled = (jnp.swapaxes(x[row : row + 1, :, start:length], 1, 2) for x in (k, v))
        offset = int(length - start) + options.get("q_offset", -queries)
        expected = flash_attention(
            q[row : row + 1], *filled, q_offset=offset, window=options.get("window"), softcap=options.get("softcap"),
            return_lse=True, implementation="reference",
        )  # fmt: skip
        np.testing.assert_allclose(out[row], expected[0][0], atol=2e-6)
        np.testing.assert_allclose(lse[row], expected[1][0], atol=2e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_cache_in_another_format_is_cast(name):
    q, k, v = tensors(capacity=45)
    narrow = q.astype(jnp.bfloat16)
    got = flash_decode(narrow, k, v, LENGTHS, implementation=name, **IMPLEMENTATIONS[name])
    cast = flash_decode(narrow, *(x.astype(jnp.bfloat16) for x in (k, v)), LENGTHS, implementation="reference")
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), cast.astype(np.float32), atol=2e-2)


def test_gradients_of_the_kernel_are_those_of_the_reference():
    q, k, v = tensors(capacity=45)

    def gradients(name):
        def loss(q, k, v):
            out, lse = flash_decode(
                q, k, v, LENGTHS, window=7, return_lse=True, implementation=name, **IMPLEMENTATIONS[name]
            )
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.maximum(lse, -5.0))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for x, y in zip(gradients("tpu"), gradients("reference"), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_sharded_equals_whole(name):
    q, k, v = (np.concatenate([x, x[:1]]) for x in tensors(capacity=45))
    lengths, starts = np.array([37, 0, 5, 40], np.int32), np.array([2, 0, 0, 9], np.int32)
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("data", "tensor"), axis_types=types)
    options = {"starts": starts, "window": 30, "return_lse": True, "implementation": name, **IMPLEMENTATIONS[name]}

    def cut(q, k, v):
        return flash_decode_sharded(q, k, v, lengths, batch_axes="data", head_axes="tensor", **options)

    with jax.set_mesh(mesh):
        got = jax.tree.map(np.asarray, jax.jit(cut)(q, k, v))
        with pytest.raises(AttentionError, match=r"3 \(batch\) is not divisible by 4"):
            flash_decode_sharded(q[:3], k[:3], v[:3], lengths[:3], batch_axes="data")
    whole = flash_decode(q, k, v, lengths, starts=starts, window=30, return_lse=True, implementation="reference")
    for x, y in zip(got, whole, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6)


def test_parts_of_the_keys_combine_to_the_whole():
    q, k, v = (jnp.swapaxes(x, 1, 2) if i else x for i, x in enumerate(tensors(40, 40)))
    hidden = np.zeros((3, 40), np.float32)
    hidden[2, :25] = -np.inf  # the first source shows row 2 nothing

    def joint(q, k, v):
        return flash_attention(q, k, v, bias=hidden, return_lse=True, implementation="reference")

    def parts(q, k, v):
        found = [
            flash_attention(
                q, k[:, a:b], v[:, a:b], bias=hidden[:, a:b], q_offset=-a, return_lse=True, implementation="blocked"
            )
            for a, b in ((0, 7), (7, 25), (25, 40))
        ]
        return combine(*zip(*found))

    def loss(f):
        return lambda *args: jnp.sum(jnp.sin(f(*args)[0])) + jnp.sum(jnp.maximum(f(*args)[1], -5.0))

    for x, y in zip(jax.jit(joint)(q, k, v), jax.jit(parts)(q, k, v)):
        np.testing.assert_allclose(x, y, atol=1e-6)
    for x, y in zip(*(jax.jit(jax.grad(loss(f), (0, 1, 2)))(q, k, v) for f in (joint, parts))):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_bad_input_is_named():
    q, k, v = tensors()
    with pytest.raises(AttentionError, match=r"lengths is int32\[2\], expected integers of shape \[3\]"):
        flash_decode(q, k, v, LENGTHS[:2])
    with pytest.raises(AttentionError, match="4 heads of q are not a multiple of the 3"):
        flash_decode(q, *(np.concatenate([x, x[:, :1]], 1) for x in (k, v)), LENGTHS)
    with pytest.raises(AttentionError, match="v is float16 and k is float32: cast them to one dtype"):
        flash_decode(q, k, v.astype(np.float16), LENGTHS)
    with pytest.raises(AttentionError, match="k is int8, expected a floating-point dtype"):
        flash_decode(q, k.astype(np.int8), v.astype(np.int8), LENGTHS)
    with pytest.raises(AttentionError, match="130 queries of 2 heads for each key head are more than 256 rows"):
        flash_decode(*tensors(130), LENGTHS, implementation="tpu", interpret=True)
    with pytest.raises(AttentionError, match="as many of both"):
        combine([q], [])
