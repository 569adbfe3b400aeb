"""The derivative of attention, for every implementation that has its own forward and backward pass.

The backward pass computes the probabilities again from the log-sum-exps (Dao et al. 2022, arXiv 2205.14135, algorithm
4). With p the probabilities, dp = do v^T and delta = rowsum(do * o), the logits' gradient is p * (dp - delta); a
gradient of the log-sum-exp adds p times itself, so it is subtracted from delta.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention.problem import Operands, Structure

CHECKPOINT_NAMES = ("attention_inputs", "attention_result", "attention_norm")
"""Names (`jax.ad_checkpoint.checkpoint_name`) of what the backward pass needs: queries, keys and values in the
kernels' layout, the results, and the log-sum-exps. A remat policy that saves them spares the forward pass a rerun."""


class Passes(NamedTuple):
    """An implementation.

    `forward(structure, operands) -> (out, lse)`, shapes as in `reference.attention`.
    `backward(structure, operands, out_grad, lse, delta) -> (dq, dk, dv, dbias)`: `lse` is +inf where a query sees
    nothing (the probabilities come out as 0), `dbias` is `None` without a bias.
    """

    forward: Callable
    backward: Callable


def attention(passes: Passes, structure: Structure, operands: Operands, with_lse: bool):
    """The result `[b, k, g, t, d]`, with `with_lse` also the log-sum-exps `[b, k, g, t]`."""
    # Saved as they are, the backward pass neither rotates nor transposes them again.
    q, k, v = (checkpoint_name(x, CHECKPOINT_NAMES[0]) for x in operands[:3])
    found = _attention(passes, structure, with_lse, q, k, v, *operands[3:])
    return found if with_lse else found[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(passes, structure, with_lse, *arrays):
    return passes.forward(structure, Operands(*arrays))[: 2 if with_lse else 1]


def _forward(passes, structure, with_lse, *arrays):
    out, lse = passes.forward(structure, Operands(*arrays))
    out = checkpoint_name(out, CHECKPOINT_NAMES[1])
    lse = checkpoint_name(lse, CHECKPOINT_NAMES[2])
    return (out, lse) if with_lse else (out,), (arrays, out, lse)


def _backward(passes, structure, with_lse, residuals, grads):
    arrays, out, lse = residuals
    out_grad = grads[0]
    delta = jnp.sum(out_grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    empty = jnp.isneginf(lse) if structure.empty_rows else None
    if with_lse:
        delta = delta - (grads[1] if empty is None else jnp.where(empty, 0.0, grads[1]))
    if empty is not None:
        lse = jnp.where(empty, jnp.inf, lse)
    grads = passes.backward(structure, Operands(*arrays), out_grad.astype(arrays[2].dtype), lse, delta)
    return *grads, None, None


_attention.defvjp(_forward, _backward)
