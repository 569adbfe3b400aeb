"""Attention against a loop over queries in numpy, and the blocked implementation against the reference."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError
from jaxlm.layers import KeyValues, Mask, Visible, attend
from tests.pallas_kernels.absent_tpu import devices


def arrays(batch=2, queries=7, keys=7, heads=4, kv_heads=2, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, queries, heads, dim)).astype(np.float32)
    k, v = (rng.normal(size=(batch, keys, kv_heads, dim)).astype(np.float32) for _ in range(2))
    return q, k, v


def by_hand(q, k, v, allowed, scale, softcap=None, bias=None):
    """One query at a time, in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(*q.shape[:3]):
        logits = k[b, :, h // group] @ q[b, t, h] * scale
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[b]
        seen = allowed[b, t]
        if seen.any():
            weights = np.exp(logits[seen] - logits[seen].max())
            out[b, t, h] = weights @ v[b, seen, h // group] / weights.sum()
    return out


def visible(length, window=None, segments=None, batch=2):
    order = np.arange(length)
    allowed = np.broadcast_to(order[None, :] <= order[:, None], (batch, length, length)).copy()
    if window is not None:
        allowed &= order[None, :] > order[:, None] - window
    if segments is not None:
        allowed &= segments[:, :, None] == segments[:, None, :]
    return allowed


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_equals_a_loop_over_queries(window, softcap, segmented, implementation):
    q, k, v = arrays()
    segments = np.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 0, 0]], np.int32) if segmented else None
    source = KeyValues(k, v, Visible(Mask(), segments, window))
    got = jax.jit(lambda q, s: attend(q, (s,), scale=0.4, softcap=softcap, implementation=implementation))(q, source)
    np.testing.assert_allclose(got, by_hand(q, k, v, visible(7, window, segments), 0.4, softcap), atol=1e-5)


@pytest.mark.parametrize("length", [130, 384, 1030])
@pytest.mark.parametrize("window", [None, 50, 200])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_blocked_equals_reference_with_gradients(length, window, softcap):
    q, k, v = arrays(1, length, length, seed=length)
    segments = (np.arange(length)[None] // 77).astype(np.int32)

    def run(implementation):
        def loss(q, k, v):
            source = KeyValues(k, v, Visible(Mask(), segments, window))
            out = attend(q, (source,), scale=0.4, softcap=softcap, implementation=implementation)
            return jnp.sum(jnp.sin(out * 3)), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    chex.assert_trees_all_close(run("blocked"), run("reference"), atol=2e-5)


def test_several_sources_share_one_softmax():
    q, k, v = arrays(keys=12)
    allowed = np.random.default_rng(1).random((2, 7, 12)) > 0.4
    bias = np.random.default_rng(2).normal(size=(2, 12)).astype(np.float32)
    parts = [
        KeyValues(k[:, a:b], v[:, a:b], jnp.asarray(allowed[:, :, a:b]), jnp.asarray(bias[:, a:b]))
        for a, b in [(0, 5), (5, 6), (6, 12)]
    ]
    got = attend(q, tuple(parts), scale=0.4, softcap=3.0)
    np.testing.assert_allclose(got, by_hand(q, k, v, allowed, 0.4, 3.0, bias), atol=1e-5)


def test_a_query_that_sees_nothing_gives_zero_and_no_nan():
    q, k, v = arrays()
    allowed = np.ones((2, 7, 7), bool)
    allowed[1, 3] = False

    def loss(q):
        return jnp.sum(attend(q, (KeyValues(k, v, jnp.asarray(allowed)),), scale=0.4) ** 2)

    out = attend(q, (KeyValues(k, v, jnp.asarray(allowed)),), scale=0.4)
    assert float(jnp.abs(out[1, 3]).max()) == 0.0
    np.testing.assert_allclose(out, by_hand(q, k, v, allowed, 0.4), atol=1e-5)
    assert bool(jnp.isfinite(jax.grad(loss)(q)).all())


def test_bfloat16_operands_stay_close():
    q, k, v = arrays(1, 200, 200)
    source = KeyValues(k, v, Visible())
    exact = attend(q, (source,), scale=0.4)
    rounded = attend(q, (source,), scale=0.4, dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    assert 0 < float(jnp.abs(exact - rounded).max()) < 0.05


def test_a_forced_implementation_that_cannot_is_an_error():
    q, k, v = arrays()
    with pytest.raises(ConfigError, match="blocked attention takes one source"):
        attend(q, (KeyValues(k, v, None),), scale=1.0, implementation="blocked")
    with pytest.raises(ConfigError, match="did you mean 'blocked'"):
        attend(q, (KeyValues(k, v, None),), scale=1.0, implementation="block")


def test_on_a_mesh_of_tpus_each_chip_runs_the_kernels_on_its_part():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=2), devices("v5e"))

    def loss(q, k, v, segments):
        source = KeyValues(k, v, Visible(segment_ids=segments))
        return jnp.sum(attend(q, (source,), scale=0.125, dtype=jnp.bfloat16))

    def shape(*sizes, dtype=jnp.float32):
        spec = PartitionSpec(("data", "fsdp"), None, *(["tensor", None] if len(sizes) == 4 else []))
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    shapes = shape(4, 256, 4, 64), shape(4, 256, 2, 64), shape(4, 256, 2, 64), shape(4, 256, dtype=jnp.int32)
    with sharding.use_mesh(mesh):
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile().as_text()
    for kernel in ("forward_kernel", "dq_kernel", "dkv_kernel"):
        assert kernel in text
    assert "all-gather" not in text
