"""The reference against a loop over queries in numpy, and against finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import flash_attention


def by_hand(q, k, v, sees, softcap=None, bias=None):
    """One query at a time; `sees(row, query, key)` is the mask. Results and log-sum-exps."""
    batch, queries, heads, dim = q.shape
    group = heads // k.shape[2]
    out, lse = np.zeros(q.shape), np.full((batch, heads, queries), -np.inf)
    for b, t, h in np.ndindex(batch, queries, heads):
        logits = k[b, :, h // group] @ q[b, t, h] / np.sqrt(dim)
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        if bias is not None:
            logits = logits + bias[b]
        seen = np.array([sees(b, t, s) for s in range(k.shape[1])])
        if seen.any():
            weights = np.exp(logits[seen] - logits[seen].max())
            out[b, t, h] = weights @ v[b, seen, h // group] / weights.sum()
            lse[b, h, t] = logits[seen].max() + np.log(weights.sum())
    return out, lse


def tensors(queries=5, keys=7, heads=4, kv_heads=2, dim=6):
    rng = np.random.default_rng(0)
    shapes = (2, queries, heads, dim), (2, keys, kv_heads, dim), (2, keys, kv_heads, dim), (2, keys)
    return [rng.normal(size=shape) for shape in shapes]


IDS = np.array([[1, 1, 1, 2, 2, 0, 0], [3, 1, 1, 1, 3, 3, 1]])


@pytest.mark.parametrize(
    ("options", "sees"),
    [
        ({"causal": False}, lambda b, t, s: True),
        ({}, lambda b, t, s: s <= t + 2),  # the ends are aligned
        ({"q_offset": -1}, lambda b, t, s: s <= t - 1),
        ({"q_offset": 0, "window": 2}, lambda b, t, s: t - 2 < s <= t),
        ({"causal": False, "window": 3}, lambda b, t, s: s > t + 2 - 3),
        ({"segment_ids": (IDS[:, :5], IDS)}, lambda b, t, s: s <= t + 2 and IDS[b, t] == IDS[b, s]),
    ],
)
def test_reference_equals_a_loop(options, sees):
    q, k, v, bias = tensors()
    with jax.enable_x64(True):
        got = flash_attention(
            q, k, v, softcap=2.0, bias=bias, return_lse=True, implementation="reference", **options
        )
        for x, y in zip(got, by_hand(q, k, v, sees, 2.0, bias)):
            np.testing.assert_allclose(x, y, atol=1e-12)


def test_gradients_by_finite_differences():
    q, k, v, bias = tensors(queries=7)
    weights = np.random.default_rng(1).normal(size=q.shape)

    @jax.jit
    def loss(*args):
        out, lse = flash_attention(
            *args[:3], bias=args[3], window=3, softcap=2.0, return_lse=True, implementation="reference"
        )
        return jnp.sum(out * weights) + jnp.sum(jnp.sin(lse))

    with jax.enable_x64(True):
        args = [jnp.asarray(x) for x in (q, k, v, bias)]
        grads = jax.grad(loss, argnums=(0, 1, 2, 3))(*args)
        for i, grad in enumerate(grads):
            direction = np.random.default_rng(i).normal(size=grad.shape)

            def along(step, i=i, direction=direction):
                return loss(*(x + step * direction if j == i else x for j, x in enumerate(args)))

            slope = (along(1e-5) - along(-1e-5)) / 2e-5
            np.testing.assert_allclose(jnp.sum(grad * direction), slope, rtol=1e-7)
