"""`cross_entropy`: checks, the choice of an implementation, several devices, and the gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import target as targets_of
from pallas_kernels.cross_entropy import chunked, reference, sharded, tpu
from pallas_kernels.cross_entropy.sharded import Shards
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
    return_correct: bool = False,
    shards: Shards | None = None,
    implementation: str = "auto",
) -> tuple[Array, ...]:
    """`(loss, lse)`, float32 `[tokens]`: the log-partition `lse` of the logits `softcap(x @ head)`, and
    `weights * (lse - logit_of_target + z_loss * lse^2)`. `return_correct` adds whether no logit is larger than the
    target's (bool).

    `x` is `[tokens, embed]`, `head` `[embed, vocab]`, or `[vocab, embed]` if `transposed` (a tied embedding), `targets`
    `[tokens]` whole numbers below vocab; tokens may have several axes. Both results have gradients to `x`, `head` and
    `weights`. Soft-capping is `softcap * tanh(logits / softcap)` (Gemma 2). Operands are multiplied in `operand_dtype`
    (by default that of `x`), sums are float32. Memory is independent of the vocabulary: beyond arguments and gradients
    a forward or backward pass takes `tokens * chunk` logits, or with kernels none; the backward pass computes logits
    again.

    `implementation`: `reference` (all logits at once), `chunked` (plain JAX, a loop over `chunk` columns), `tpu`
    (Mosaic kernels, forward and backward), `tpu_interpret` (these, interpreted: for tests), `auto`: `tpu` where it
    fits, else `chunked`. On a mesh of several devices kernels need `shards`, and each device takes its tokens and its
    columns of the head; plain JAX leaves the division to XLA. Inside `jax.shard_map` neither is needed. With
    `PALLAS_KERNELS_DEBUG=1` each call says what was chosen and why.

    Raises `KernelError` (a `ValueError`) when arrays do not fit together or a forced implementation cannot do it.
    """
    vocab = head.shape[0 if transposed else 1] if head.ndim == 2 else 0
    _check(x, head, targets, weights, z_loss, softcap, transposed, vocab, chunk, implementation)
    dtype = jnp.dtype(operand_dtype or x.dtype).name
    chosen = _choose(x, head, implementation, dtype, transposed, shards)
    if targets_of.current(x).devices == 1 or chosen in ("reference", "chunked"):
        shards = None
    options = Options(softcap, transposed, dtype, min(chunk, vocab), chosen, shards)
    lse, picked, top = _statistics(x, head, targets.astype(jnp.int32), options)
    loss = lse - picked
    if z_loss:
        loss = loss + z_loss * jnp.square(lse)
    loss = loss if weights is None else weights * loss
    return (loss, lse, picked >= top) if return_correct else (loss, lse)


def why_not(
    x: Array, head: Array, *, transposed: bool = False, operand_dtype: Any = None, shards: Shards | None = None
) -> str | None:
    """Why `implementation="tpu"` cannot do it (a phrase for an error), or `None` if it can."""
    return _cannot(x, head, "tpu", jnp.dtype(operand_dtype or x.dtype).name, transposed, shards)


@dataclasses.dataclass(frozen=True)
class Options:
    softcap: float | None
    transposed: bool
    dtype: str
    chunk: int
    chosen: str
    shards: Shards | None


def _statistics(x: Array, head: Array, targets: Array, options: Options) -> tuple[Array, Array, Array]:
    if options.chosen == "reference":
        return _by_token(reference.statistics, options)(x, head, targets)
    return _fused(x, head, targets, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(x: Array, head: Array, targets: Array, options: Options) -> tuple[Array, Array, Array]:
    module = chunked if options.chosen == "chunked" else tpu
    run = _by_token(module.statistics, options)
    if options.shards is None:
        return run(x, head, targets)
    return sharded.statistics(run, x, head, targets, options.shards, options.transposed)


def _fused_forward(x: Array, head: Array, targets: Array, options: Options) -> tuple:
    found = _fused(x, head, targets, options)
    return found, (x, head, targets, found[0])


def _fused_backward(options: Options, kept: tuple, cotangents: tuple) -> tuple:
    # The largest logit is there to be compared with: it has no gradient.
    x, head, targets, lse = kept
    numbers = lse, *cotangents[:2]
    module = chunked if options.chosen == "chunked" else tpu
    run = _by_token(module.gradients, options)
    if options.shards is None:
        return *run(x, head, targets, *numbers), None
    return *sharded.gradients(run, x, head, targets, numbers, options.shards, options.transposed), None


_fused.defvjp(_fused_forward, _fused_backward)


def _by_token(run: Any, options: Options) -> Any:
    """`run` with one axis of tokens, for arrays with any number of them; its results of that size have them all."""

    def flat(x: Array, head: Array, targets: Array, *numbers: Array) -> tuple:
        found = run(x.reshape(-1, x.shape[-1]), head, *(a.reshape(-1) for a in (targets, *numbers)), options)
        if not numbers:
            return tuple(a.reshape(targets.shape) for a in found)
        dx, dhead = found
        return dx.reshape(x.shape), dhead

    return flat


def _choose(x: Array, head: Array, implementation: str, dtype: str, transposed: bool, shards: Shards | None) -> str:
    if implementation in ("reference", "chunked"):
        return implementation
    what = f"cross_entropy of {tuple(x.shape)} over {head.shape[0 if transposed else 1]}"
    reason = _cannot(x, head, implementation, dtype, transposed, shards)
    if reason is None:
        chosen = "tpu" if implementation == "auto" else implementation
        targets_of.explain(f"{what}: {chosen}")
        return chosen
    if implementation != "auto":
        raise KernelError(f"implementation='{implementation}' cannot do {what}: {reason}")
    targets_of.explain(f"{what}: chunked, because of {reason}")
    return "chunked"


def _cannot(
    x: Array, head: Array, implementation: str, dtype: str, transposed: bool, shards: Shards | None
) -> str | None:
    """Why the kernels cannot do it."""
    target = targets_of.current(x)
    if implementation != "tpu_interpret":
        if target.platform != "tpu":
            return f"platform {target.platform}, for which there is no kernel"
        if target.chip is None or target.chip.vmem < tpu.VMEM_LIMIT:
            return f"{target.kind}, of which {tpu.VMEM_LIMIT} bytes of VMEM are not known"
    if target.devices > 1:
        if shards is None:
            return f"a mesh of {target.devices} devices without shards"
        reason = sharded.cannot(shards, head.shape[0 if transposed else 1])
        if reason is not None:
            return reason
        x, head = sharded.local_shapes(x, head, shards, transposed)
    else:
        x = jax.ShapeDtypeStruct((x.size // x.shape[-1], x.shape[-1]), x.dtype)
    return tpu.unsupported(x, head, jnp.dtype(dtype), transposed)


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
    if x.ndim < 2 or head.ndim != 2:
        raise KernelError(f"x has shape {tuple(x.shape)} and head {tuple(head.shape)}, expected two axes (x: or more)")
    embed = head.shape[1 if transposed else 0]
    if x.shape[-1] != embed or 0 in (*x.shape, *head.shape):
        name = "[vocab, embed]" if transposed else "[embed, vocab]"
        raise KernelError(f"x [tokens, embed] has shape {tuple(x.shape)}, but head {name} has {tuple(head.shape)}")
    for name, array in (("targets", targets), ("weights", weights)):
        if array is not None and array.shape != x.shape[:-1]:
            raise KernelError(f"{name} have shape {tuple(array.shape)}, expected {tuple(x.shape[:-1])}")
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
