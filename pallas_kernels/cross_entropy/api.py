"""`cross_entropy`: checks, the choice of an implementation, and the gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import target as targets_of
from pallas_kernels.cross_entropy import chunked, reference, tpu
from pallas_kernels.target import KernelError

Array = jax.Array

IMPLEMENTATIONS = ("auto", "reference", "chunked", "tpu", "tpu_interpret")


def cross_entropy(
    x: Array,
    head: Array,
    targets: Array,
    *,
    weights: Array | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    transposed: bool = False,
    operand_dtype: Any = None,
    chunk: int = 4096,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """`(loss, lse)`, float32 `[tokens]`: the log-partition `lse` of the logits `softcap(x @ head)`, and
    `weights * (lse - logit_of_target + z_loss * lse^2)`.

    `x` is `[tokens, embed]`, `head` `[embed, vocab]`, or `[vocab, embed]` if `transposed` (a tied embedding), `targets`
    `[tokens]` whole numbers below vocab. Both results have gradients to `x`, `head` and `weights`. Soft-capping is
    `softcap * tanh(logits / softcap)` (Gemma 2). Operands are multiplied in `operand_dtype` (by default that of `x`),
    sums are float32. Memory is independent of the vocabulary: beyond arguments and gradients a forward or backward pass
    takes `tokens * chunk` logits, or with kernels none; the backward pass computes logits again.

    `implementation`: `reference` (all logits at once), `chunked` (plain JAX, a loop over `chunk` columns), `tpu`
    (Mosaic kernels, forward and backward), `tpu_interpret` (these, interpreted: for tests), `auto`: `tpu` where it
    fits, else `chunked`. On a mesh of several devices `auto` is `chunked`, which XLA divides; inside `jax.shard_map`
    the kernels work on each device's tokens. With `PALLAS_KERNELS_DEBUG=1` each call says what was chosen and why.

    Raises `KernelError` (a `ValueError`) when arrays do not fit together or a forced implementation cannot do it.
    """
    vocab = head.shape[0 if transposed else 1] if head.ndim == 2 else 0
    _check(x, head, targets, weights, z_loss, softcap, transposed, vocab, chunk, implementation)
    dtype = jnp.dtype(operand_dtype or x.dtype).name
    chosen = _choose(x, head, implementation, dtype, vocab, transposed)
    options = Options(softcap, transposed, dtype, min(chunk, vocab), chosen)
    lse, picked = _lse_and_picked(x, head, targets.astype(jnp.int32), options)
    loss = lse - picked
    if z_loss:
        loss = loss + z_loss * jnp.square(lse)
    return loss if weights is None else weights * loss, lse


@dataclasses.dataclass(frozen=True)
class Options:
    softcap: float | None
    transposed: bool
    dtype: str
    chunk: int
    chosen: str


def _lse_and_picked(x: Array, head: Array, targets: Array, options: Options) -> tuple[Array, Array]:
    if options.chosen == "reference":
        return reference.lse_and_picked(x, head, targets, options)
    return _fused(x, head, targets, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(x: Array, head: Array, targets: Array, options: Options) -> tuple[Array, Array]:
    return _forward(x, head, targets, options)


def _forward(x: Array, head: Array, targets: Array, options: Options) -> tuple[Array, Array]:
    if options.chosen == "chunked":
        return chunked.lse_and_picked(x, head, targets, options)
    return tpu.lse_and_picked(x, head, targets, options)


def _fused_forward(x: Array, head: Array, targets: Array, options: Options) -> tuple:
    lse, picked = _forward(x, head, targets, options)
    return (lse, picked), (x, head, targets, lse)


def _fused_backward(options: Options, kept: tuple, cotangents: tuple) -> tuple:
    module = chunked if options.chosen == "chunked" else tpu
    dx, dhead = module.gradients(*kept, *cotangents, options)
    return dx, dhead, None


_fused.defvjp(_fused_forward, _fused_backward)


def _choose(x: Array, head: Array, implementation: str, dtype: str, vocab: int, transposed: bool) -> str:
    if implementation in ("reference", "chunked"):
        return implementation
    target = targets_of.current(x)
    what = f"cross_entropy of {tuple(x.shape)} over {vocab}"
    if target.platform != "tpu" and implementation != "tpu_interpret":
        reason = f"platform {target.platform}, for which there is no kernel"
    elif target.devices > 1:
        reason = f"a mesh of {target.devices} devices (call it inside jax.shard_map)"
    elif implementation != "tpu_interpret" and (target.chip is None or target.chip.vmem < tpu.VMEM_LIMIT):
        reason = f"{target.kind}, of which {tpu.VMEM_LIMIT} bytes of VMEM are not known"
    else:
        reason = tpu.unsupported(x, head, jnp.dtype(dtype), transposed)
    if reason is None:
        chosen = "tpu" if implementation == "auto" else implementation
        targets_of.explain(f"{what}: {chosen}")
        return chosen
    if implementation != "auto":
        raise KernelError(f"implementation='{implementation}' cannot do {what}: {reason}")
    targets_of.explain(f"{what}: chunked, because of {reason}")
    return "chunked"


def _check(
    x: Array,
    head: Array,
    targets: Array,
    weights: Array | None,
    z_loss: float,
    softcap: float | None,
    transposed: bool,
    vocab: int,
    chunk: int,
    implementation: str,
) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise KernelError(f"implementation '{implementation}' (valid: {', '.join(IMPLEMENTATIONS)})")
    if x.ndim != 2 or head.ndim != 2:
        raise KernelError(f"x has shape {tuple(x.shape)} and head {tuple(head.shape)}, expected two axes each")
    embed = head.shape[1 if transposed else 0]
    if x.shape[1] != embed or 0 in (*x.shape, *head.shape):
        name = "[vocab, embed]" if transposed else "[embed, vocab]"
        raise KernelError(f"x [tokens, embed] has shape {tuple(x.shape)}, but head {name} has {tuple(head.shape)}")
    for name, array in (("targets", targets), ("weights", weights)):
        if array is not None and array.shape != x.shape[:1]:
            raise KernelError(f"{name} have shape {tuple(array.shape)}, expected {tuple(x.shape[:1])}")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise KernelError(f"targets are {targets.dtype}, expected whole numbers")
    for name, array in (("x", x), ("head", head)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise KernelError(f"{name} is {array.dtype}, expected floating point")
    if z_loss < 0:
        raise KernelError(f"z_loss is {z_loss}, expected >= 0")
    if softcap is not None and softcap <= 0:
        raise KernelError(f"softcap is {softcap}, expected > 0, or None")
    if chunk < 1:
        raise KernelError(f"chunk is {chunk}, expected at least 1")
