"""Next-token prediction: weighted cross-entropy over chunks of the length, with an optional z-loss.

Logits of a whole batch never exist at once. Each chunk's gradient is computed together with its loss in the forward
pass (the loss is a sum, so the backward pass only scales it), which saves computing the logits a second time. On TPUs
a kernel can do it without any logits in memory (`pallas_kernels.cross_entropy`), and computes them three times.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError
from jaxlm.core.sharding import constrain
from jaxlm.objectives.base import Aux, Batch, StepContext
from pallas_kernels import cross_entropy as kernels

_CHUNK_BYTES = 64 << 20
# On meshes of accelerators each chunk ends with the reduction of the head's gradient over all devices.
_ACCELERATOR_CHUNK_BYTES = 256 << 20

IMPLEMENTATIONS = ("auto", "fused", "kernels", "reference")

# Kernels take ten operations for each logit and weight where chunks take six, which also move a logit some six times.
# By what chips compute while they move a byte that breaks even at a width of about 1000 (v5p), 1400 (v5e) and 3400
# (v6e); by arithmetic, not by measurement.
_KERNEL_WIDTH = 1024

Head = Callable[[Any, Float[Array, "batch length embed"]], Float[Array, "batch length vocab"]]


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """Mean negative log-likelihood of `targets`, weighted by `loss_weights`, over the whole batch.

    `model` is a `Decoder` (anything with `embed`, `trunk`, `head`, `head_params`, `gather_head`, and for kernels
    `head_projection`). `z_loss` times the squared log-partition is added for each token (PaLM, Chowdhery et al. 2022,
    section 5). `chunk_length` cuts each row for the vocabulary projection; by default so that a chunk's logits take at
    most about 64 MB a device (256 MB on accelerators).
    """

    model: Any
    z_loss: float = 0.0
    chunk_length: int | None = None
    implementation: str = "auto"
    """`fused`: gradients in the forward pass; `kernels`: logits in the chip's own memory alone (TPUs; the head's weight
    an array); `reference`: plain, for second derivatives and forward mode; `auto`: `kernels` for narrow models where
    they fit, else `fused`."""

    def __post_init__(self):
        if self.z_loss < 0:
            raise ConfigError(f"z_loss is {self.z_loss}, expected >= 0")
        if self.implementation not in IMPLEMENTATIONS:
            raise ConfigError(f"implementation '{self.implementation}' (valid: {', '.join(IMPLEMENTATIONS)})")

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> dict[str, Array]:
        """`{"tokens": sum(loss_weights)}`."""
        return {"tokens": jnp.sum(batch["loss_weights"])}

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Mapping[str, Array]) -> tuple[Array, Aux]:
        """This piece's share of the mean; metrics `loss` (without z-loss) and `accuracy` per weighted token."""
        sums = self.sums(params, batch)
        tokens = jnp.sum(batch["loss_weights"])
        # A batch without any weight has loss 0 and zero gradients.
        share = sums["loss"] / jnp.where(totals["tokens"] == 0, 1.0, totals["tokens"])
        metrics = {"loss": (sums["nll"], tokens), "accuracy": (sums["correct"], tokens)}
        if self.z_loss:
            metrics["z_loss"] = (sums["loss"] - sums["nll"], tokens)
        return share, Aux(metrics)

    def sums(self, params: Any, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Weighted sums over a batch: `loss` (with z-loss), `nll`, `correct`."""
        return token_loss_sums(
            self.model.head,
            self.model.head_params(params),
            hidden_states(self.model, params, batch),
            batch["targets"],
            batch["loss_weights"],
            vocab_size=self.model.config.vocab_size,
            z_loss=self.z_loss,
            chunk_length=self.chunk_length,
            implementation=self.implementation,
            gather=self.model.gather_head,
            projection=getattr(self.model, "head_projection", None),
        )


def hidden_states(model: Any, params: Any, batch: Batch) -> Float[Array, "batch length embed"]:
    """What the model's head is given for `inputs`, with `positions` and `segment_ids` where a batch has them."""
    positions = batch.get("positions")
    hidden = model.embed(params, batch["inputs"], positions)
    return model.trunk(params, hidden, positions=positions, segment_ids=batch.get("segment_ids")).hidden


def token_loss_sums(
    head: Head,
    head_params: Any,
    hidden: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    weights: Float[Array, "batch length"],
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    chunk_length: int | None = None,
    implementation: str = "auto",
    gather: Callable[[Any], Any] = lambda head_params: head_params,
    projection: Callable[[Any, Array], Any] | None = None,
) -> dict[str, Float[Array, ""]]:
    """Sums over tokens of `weights * (nll + z_loss * lse^2)`, `weights * nll` and `weights * correct`.

    `head(gather(head_params), chunk) -> float32 logits` is called on chunks `[batch, chunk_length, embed]`; `gather`
    changes the layout of sharded weights, once for all chunks. Only the first sum, `loss`, has a gradient. Kernels
    take `projection(gather(head_params), hidden)` instead: what `head` multiplies (`Decoder.head_projection`), or
    `None`. Raises `ConfigError` when they are asked for and cannot do it.
    """
    batch, length, _ = hidden.shape
    if implementation == "kernels" or implementation == "auto" and _worth_kernels(hidden):
        projected = None if projection is None else projection(gather(head_params), hidden)
        reason = _why_no_kernels(projected)
        if reason is None:
            return _kernel_sums(projected, targets, weights, z_loss)
        if implementation == "kernels":
            raise ConfigError(f"implementation 'kernels' of the loss: {reason}")
    chunk_length = chunk_length or default_chunk(batch, length, vocab_size)
    pad = -length % chunk_length
    if pad:
        hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
        targets, weights = (jnp.pad(x, ((0, 0), (0, pad))) for x in (targets, weights))
    # The length is cut inside each row: rows stay on their devices.
    cut = functools.partial(cut_chunks, chunk_length=chunk_length)
    piece = functools.partial(_chunk_sums, head, z_loss)
    if implementation == "reference":
        sums = _scan_chunks(piece, gather(head_params), cut(hidden), cut(targets), cut(weights))
    else:
        floats, rest = _split(head_params)
        sums = _fused(piece, gather, floats, rest, cut(hidden), cut(targets), cut(weights))
    return dict(zip(("loss", "nll", "correct"), sums, strict=True))


def default_chunk(batch: int, length: int, vocab_size: int) -> int:
    """As much of each row as keeps a chunk's float32 logits on a device below a fixed size."""
    rows = batch / (sharding.axis_size("data") * sharding.axis_size("fsdp"))
    columns = vocab_size / sharding.axis_size("tensor")
    parts = sharding.axis_size("sequence") if length % sharding.axis_size("sequence") == 0 else 1
    size = _CHUNK_BYTES if sharding.platform() == "cpu" else _ACCELERATOR_CHUNK_BYTES
    fitting = max(1, int(size / (4 * max(rows, 1) * columns)))
    chunks = -(-length // (parts * fitting))
    return parts * -(-length // (parts * chunks))


def cut_chunks(x: Array, chunk_length: int) -> Array:
    """`[batch, length, ...]` to `[length / chunk_length, batch, chunk_length, ...]`.

    Where the length is divided over devices, a chunk has an equal part of each device's tokens, not neighbors: so
    nothing moves, and all devices work on every chunk. `join_chunks` is the inverse.
    """
    batch, length, *rest = x.shape
    parts = _length_parts(chunk_length)
    x = x.reshape(batch, parts, length // chunk_length, chunk_length // parts, *rest)
    return jnp.moveaxis(x, 2, 0).reshape(length // chunk_length, batch, chunk_length, *rest)


def join_chunks(chunks: Array) -> Array:
    """`[chunks, batch, chunk_length, ...]` of `cut_chunks` to `[batch, length, ...]`."""
    count, batch, chunk_length, *rest = chunks.shape
    parts = _length_parts(chunk_length)
    chunks = chunks.reshape(count, batch, parts, chunk_length // parts, *rest)
    return jnp.moveaxis(chunks, 0, 2).reshape(batch, count * chunk_length, *rest)


def _length_parts(chunk_length: int) -> int:
    parts = sharding.axis_size("sequence")
    return parts if chunk_length % parts == 0 else 1


def _worth_kernels(hidden: Array) -> bool:
    return sharding.platform() == "tpu" and hidden.shape[-1] <= _KERNEL_WIDTH


def _why_no_kernels(projected: Any) -> str | None:
    if projected is None:
        return "the head is no product with one array"
    return kernels.why_not(
        projected.inputs,
        projected.kernel,
        transposed=projected.transposed,
        operand_dtype=projected.dtype,
        shards=_shards(),
    )


def _kernel_sums(projected: Any, targets: Array, weights: Array, z_loss: float) -> dict[str, Float[Array, ""]]:
    nll, lse, correct = kernels.cross_entropy(
        projected.inputs,
        projected.kernel,
        targets,
        softcap=projected.softcap,
        transposed=projected.transposed,
        operand_dtype=projected.dtype,
        return_correct=True,
        shards=_shards(),
        implementation="tpu",
    )
    loss = nll + z_loss * jnp.square(lse) if z_loss else nll
    sums = {"nll": jnp.sum(weights * nll), "correct": jnp.sum(weights * correct)}
    return {"loss": jnp.sum(weights * loss), **jax.lax.stop_gradient(sums)}


def _shards() -> kernels.Shards:
    *rows, columns = sharding.mesh_axes("batch", "length", "vocab")
    taken = {name for part in rows for name in part}
    return kernels.Shards(
        tuple(part or None for part in rows), tuple(name for name in columns if name not in taken) or None
    )


def _chunk_sums(head: Head, z_loss: float, head_params: Any, hidden: Array, targets: Array, weights: Array) -> tuple:
    logits = constrain(head(head_params, hidden), "batch", "length", "act_vocab")
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    lse = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1)) + top[..., 0]
    # A masked sum, not a gather: it stays local when the vocabulary is sharded.
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    picked = jnp.sum(jnp.where(columns == targets[..., None], logits, 0.0), axis=-1)
    nll = lse - picked
    correct = jax.lax.stop_gradient(picked) >= top[..., 0]
    loss = nll + z_loss * jnp.square(lse) if z_loss else nll
    return jnp.sum(weights * loss), jnp.sum(weights * nll), jnp.sum(weights * correct)


def _scan_chunks(piece: Callable, head_params: Any, *chunks: Array) -> tuple:
    if chunks[0].shape[0] == 1:
        return piece(head_params, *(c[0] for c in chunks))

    def body(sums: tuple, chunk: tuple) -> tuple:
        part = jax.checkpoint(piece, prevent_cse=False)(head_params, *chunk)
        return jax.tree.map(jnp.add, sums, part), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, (zero, zero, zero), chunks)[0]


def _split(tree: Any) -> tuple[list, Any]:
    """The leaves that can have a gradient, and a function-free remainder to join them with again."""
    leaves, treedef = jax.tree.flatten(tree)
    is_float = tuple(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves)
    floats = [leaf for leaf, f in zip(leaves, is_float, strict=True) if f]
    others = [leaf for leaf, f in zip(leaves, is_float, strict=True) if not f]
    return floats, _Rest(others, treedef, is_float)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rest:
    others: list
    treedef: Any = dataclasses.field(metadata={"static": True})
    is_float: tuple[bool, ...] = dataclasses.field(metadata={"static": True})

    def join(self, floats: list) -> Any:
        a, b = iter(floats), iter(self.others)
        return jax.tree.unflatten(self.treedef, [next(a) if f else next(b) for f in self.is_float])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(
    piece: Callable, gather: Callable, floats: list, rest: _Rest, hidden: Array, targets: Array, weights: Array
) -> tuple:
    return _scan_chunks(piece, gather(rest.join(floats)), hidden, targets, weights)


def _fused_forward(
    piece: Callable, gather: Callable, floats: list, rest: Any, hidden: Any, targets: Any, weights: Any
) -> tuple:
    # With symbolic zeros each leaf says whether anybody asked for its gradient: a frozen head costs none.
    wanted = [leaf.perturbed for leaf in floats]
    values = [leaf.value for leaf in floats]
    rest, hidden, targets, weights = (
        jax.tree.map(lambda leaf: leaf.value, x, is_leaf=lambda x: hasattr(x, "perturbed"))
        for x in (rest, hidden, targets, weights)
    )

    def mix(trained: list, others: list) -> list:
        trained, others = iter(trained), iter(others)
        return [next(trained) if w else next(others) for w in wanted]

    def whole(trained: list) -> tuple[list, tuple]:
        found, found_rest = _split(gather(rest.join(mix(trained, frozen))))
        return [x for x, w in zip(found, wanted, strict=True) if w], (_unwanted(found, wanted), found_rest)

    frozen = _unwanted(values, wanted)
    asked = [v for v, w in zip(values, wanted, strict=True) if w]
    trained, scatter, (frozen, rest) = jax.vjp(whole, asked, has_aux=True)

    def body(carry: tuple, chunk: tuple) -> tuple:
        sums, dtrained = carry
        chunk_hidden, chunk_targets, chunk_weights = chunk

        def loss(trained: list, h: Array) -> tuple:
            total, nll, correct = piece(rest.join(mix(trained, frozen)), h, chunk_targets, chunk_weights)
            return total, (nll, correct)

        (total, (nll, correct)), (more, dhidden) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            trained, chunk_hidden
        )
        sums = jax.tree.map(jnp.add, sums, (total, nll, correct))
        return (sums, [d + g.astype(d.dtype) for d, g in zip(dtrained, more, strict=True)]), dhidden

    zero = jnp.zeros((), jnp.float32)
    start = [jnp.zeros(v.shape, jnp.promote_types(v.dtype, jnp.float32)) for v in trained]
    chunks = (hidden, targets, weights)
    if hidden.shape[0] == 1:
        (sums, dtrained), dhidden = body(((zero, zero, zero), start), jax.tree.map(lambda x: x[0], chunks))
        dhidden = dhidden[None]
    else:
        (sums, dtrained), dhidden = jax.lax.scan(body, ((zero, zero, zero), start), chunks)
    (dtrained,) = scatter([d.astype(v.dtype) for d, v in zip(dtrained, trained, strict=True)])
    # The trunk's backward pass waits until the head's gradient is sharded; else it would be kept whole all the while.
    dtrained, dhidden = jax.lax.optimization_barrier((dtrained, dhidden))
    grads = iter(dtrained)
    dfloats = [next(grads) if w else None for w in wanted]
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values]
    return sums, (dfloats, _Shapes(tuple(shapes)), dhidden)


def _unwanted(leaves: list, wanted: list[bool]) -> list:
    return [x for x, w in zip(leaves, wanted, strict=True) if not w]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Shapes:
    shapes: tuple


def _fused_backward(piece: Callable, gather: Callable, residuals: tuple, grads: tuple) -> tuple:
    dfloats, shapes, dhidden = residuals
    scale = grads[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None, None
    dfloats = [
        jnp.zeros(s.shape, s.dtype) if d is None else (d * scale).astype(d.dtype)
        for d, s in zip(dfloats, shapes.shapes, strict=True)
    ]
    return dfloats, None, (dhidden * scale).astype(dhidden.dtype), None, None


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)
