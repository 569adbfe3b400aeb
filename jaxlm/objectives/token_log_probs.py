"""Log-probabilities of each target, over chunks of the length: for losses that are not sums over tokens.

Preference and policy-gradient losses are functions of whole sequences' log-probabilities, so their gradient by a
token's log-probability is known only after the forward pass. The logits of a chunk are therefore computed again in
the backward pass, and those of a whole batch never exist at once.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import ConfigError, DataError
from jaxlm.core.sharding import constrain
from jaxlm.objectives.base import Batch
from jaxlm.objectives.causal_lm import Head, cut_chunks, default_chunk, hidden_states, join_chunks


def token_log_probs(
    head: Head,
    head_params: Any,
    hidden: Float[Array, "batch length embed"],
    targets: Int[Array, "batch length"],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_length: int | None = None,
) -> Float[Array, "batch length"]:
    """`log_softmax(logits / temperature)[target]` of every position, in float32, differentiable.

    `head(head_params, chunk) -> float32 logits` is called on chunks `[batch, chunk_length, embed]`, by default so long
    that a chunk's logits take about 64 MB a device.
    """
    batch, length, _ = hidden.shape
    chunk_length = chunk_length or default_chunk(batch, length, vocab_size)
    pad = -length % chunk_length
    if pad:
        hidden, targets = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))), jnp.pad(targets, ((0, 0), (0, pad)))
    piece = jax.checkpoint(functools.partial(_chunk_log_probs, head, temperature), prevent_cse=False)
    chunks = (cut_chunks(hidden, chunk_length), cut_chunks(targets, chunk_length))
    _, found = jax.lax.scan(lambda carry, chunk: (carry, piece(head_params, *chunk)), None, chunks)
    return join_chunks(found)[:, :length]


def model_log_probs(
    model: Any, params: Any, batch: Batch, *, temperature: float = 1.0, chunk_length: int | None = None
) -> Float[Array, "*rows length"]:
    """Each target's log-probability under a model, for batches whose arrays are `[*rows, length]`.

    All rows (pairs, groups) go through the model together. `model` is a `Decoder` (anything with `embed`, `trunk`,
    `head`, `head_params`, `gather_head` and `config.vocab_size`). Values at padding mean nothing. Run it once over a
    data set with the reference's parameters to store `reference_log_probs` beside the batches' other arrays.
    """
    rows = batch["inputs"].shape[:-1]
    names = [name for name in ("inputs", "targets", "positions", "segment_ids") if name in batch]
    flat = {name: batch[name].reshape(-1, batch[name].shape[-1]) for name in names}
    found = token_log_probs(
        model.head,
        model.gather_head(model.head_params(params)),
        hidden_states(model, params, flat),
        flat["targets"],
        vocab_size=model.config.vocab_size,
        temperature=temperature,
        chunk_length=chunk_length,
    )
    return found.reshape(*rows, -1)


def check_batch(batch: Mapping[str, Array], names: tuple[str, ...], ndim: int | None = None) -> None:
    """Raises `DataError` for a batch without one of the arrays, or with `inputs` of another number of axes."""
    if missing := [name for name in names if name not in batch]:
        raise DataError(f"the batch has no array {', '.join(missing)} (it has {', '.join(sorted(batch))})")
    if ndim is not None and batch["inputs"].ndim != ndim:
        raise DataError(f"inputs have shape {batch['inputs'].shape}, expected {ndim} axes")
    if ndim == 3 and batch["inputs"].shape[1] != 2:
        raise DataError(f"inputs have shape {batch['inputs'].shape}, expected [batch, 2, length]")


def check_positive(**values: float) -> None:
    """Raises `ConfigError` for the first value that is not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{name} is {value}, expected > 0")


def _chunk_log_probs(head: Head, temperature: float, head_params: Any, hidden: Array, targets: Array) -> Array:
    logits = constrain(head(head_params, hidden), "batch", "length", "act_vocab") / temperature
    # A masked sum, not a gather: it stays local when the vocabulary is sharded.
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    picked = jnp.sum(jnp.where(columns == targets[..., None], logits, 0.0), axis=-1)
    return picked - jax.nn.logsumexp(logits, axis=-1)
