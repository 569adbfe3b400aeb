"""Attention in a ring, the length cut over four devices, against the reference on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from pallas_kernels.attention import AttentionError, flash_attention, flash_attention_ring
from pallas_kernels.attention.sharded import _steps

LENGTH = 32
CASES = {
    "causal": {},
    "window of one": {"window": 1},
    "window within a block": {"window": 5},
    "window over blocks": {"window": 18},
    "window beyond the row": {"window": 100},
    "segments": {"segments": True},
    "segments in a window, soft cap": {"segments": True, "window": 11, "softcap": 3.0},
    "bias": {"bias": True},
    "both ways": {"causal": False, "segments": True},
    "both ways in a window": {"causal": False, "window": 10},
}


def arrays(kv_heads=2):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, LENGTH, h, 8)).astype(np.float32) for h in (4, kv_heads, kv_heads))
    # One row of several documents, cut anywhere; one whole.
    segments = np.stack([np.searchsorted([3, 7, 19, 30], np.arange(LENGTH), side="right") + 1, np.ones(LENGTH)])
    bias = np.where(rng.random((2, LENGTH)) < 0.2, -np.inf, rng.normal(size=(2, LENGTH))).astype(np.float32)
    return q, k, v, segments.astype(np.int32), bias


def mesh(data, sequence, tensor):
    return Mesh(np.array(jax.devices()).reshape(data, sequence, tensor), ("data", "sequence", "tensor"))


def gradients(function, q, k, v, bias):
    def loss(q, k, v, bias):
        out = function(q, k, v, bias)
        return jnp.sum(jnp.sin(jnp.arange(out.size).reshape(out.shape)) * out), out

    wanted = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    (_, out), grads = jax.jit(jax.value_and_grad(loss, wanted, has_aux=True))(q, k, v, bias)
    return out, *grads


QUICK = ("segments in a window, soft cap", "bias", "both ways in a window")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_the_ring_equals_the_reference(name):
    case = dict(CASES[name])
    q, k, v, segments, bias = arrays()
    options = {"segment_ids": segments if case.pop("segments", False) else None, **case}
    bias = bias if options.pop("bias", False) else None
    whole = gradients(
        lambda q, k, v, b: flash_attention(q, k, v, bias=b, implementation="reference", **options), q, k, v, bias
    )
    axes = {"sequence_axis": "sequence", "batch_axes": "data", "head_axes": "tensor"}
    found = gradients(
        lambda q, k, v, b: flash_attention_ring(q, k, v, bias=b, mesh=mesh(1, 4, 2), **axes, **options), q, k, v, bias
    )
    for x, y in zip(found, whole, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * max(1, np.abs(y).max()))


def test_blocks_that_no_query_sees_are_not_sent():
    assert [_steps(4, 8, True, window) for window in (None, 1, 2, 9, 10, 18, 100)] == [4, 1, 2, 2, 3, 4, 4]
    assert _steps(4, 8, False, 3) == 4
    q, k, v, _, _ = arrays()
    run = jax.jit(lambda q: flash_attention_ring(q, k, v, sequence_axis="sequence", mesh=mesh(2, 4, 1), window=9))
    assert run.lower(q).compile().as_text().count(" collective-permute(") == 1  # keys and values together


def test_what_does_not_fit_is_refused():
    q, k, v, _, _ = arrays()
    with pytest.raises(AttentionError, match="30 .length. is not divisible by 4"):
        flash_attention_ring(q[:, :30], k[:, :30], v[:, :30], sequence_axis="sequence", mesh=mesh(2, 4, 1))
    with pytest.raises(AttentionError, match="32 queries and 16 keys"):
        flash_attention_ring(q, k[:, :16], v[:, :16], sequence_axis="sequence", mesh=mesh(2, 4, 1))
    with pytest.raises(AttentionError, match="no axis 'length'"):
        flash_attention_ring(q, k, v, sequence_axis="length", mesh=mesh(2, 4, 1))
