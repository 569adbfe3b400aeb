"""Loss, perplexity and bits per byte of a language model on token batches."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import DataError
from jaxlm.data.pipeline import eval_batches
from jaxlm.data.resident import ResidentRows
from jaxlm.data.store import TokenStore
from jaxlm.data.tokenizers import Tokenizer, token_byte_lengths
from jaxlm.objectives.causal_lm import CausalLM


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """How well a model predicts a text.

    `loss`: nats per token. `bits_per_byte` compares models with different tokenizers.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    accuracy: float
    tokens: int
    bytes: int

    @property
    def loss_per_byte(self) -> float:
        """Nats a byte: `bits_per_byte` in the unit of `loss`."""
        return self.bits_per_byte * math.log(2)


SumFunction = Callable[[Any, Mapping[str, Array]], Mapping[str, Float[Array, ""]]]


def make_sums(objective: CausalLM, byte_lengths: Int[Array, "vocab"]) -> SumFunction:
    """`(params, batch) -> sums` of `nll`, `correct`, `tokens` and `bytes`, to be compiled once and added over batches.

    `byte_lengths`: bytes that each token id stands for (0 for control tokens), as
    `jaxlm.data.tokenizers.token_byte_lengths` gives.
    """
    table = np.asarray(byte_lengths, np.int32)

    def sums(params: Any, batch: Mapping[str, Array]) -> dict[str, Array]:
        found = objective.sums(params, batch)
        counted = batch["loss_weights"] > 0
        lengths = jnp.where(counted, jnp.asarray(table)[batch["targets"]], 0)
        return {
            "nll": found["nll"],
            "correct": found["correct"],
            "tokens": jnp.sum(batch["loss_weights"]),
            "bytes": jnp.sum(lengths),
        }

    return sums


def likelihood(
    sums: SumFunction,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    put: Callable[[Mapping[str, np.ndarray]], Mapping[str, Array]] = jax.device_put,
) -> Likelihood:
    """Adds `sums` (of `make_sums`, compiled) over batches and divides once.

    `bits_per_byte` is the summed negative log-likelihood, end-of-document tokens included, in bits over the bytes of
    the text. Raises `DataError` if there is nothing to predict.
    """
    total: dict[str, float] = {"nll": 0.0, "correct": 0.0, "tokens": 0.0, "bytes": 0.0}
    waiting: Mapping[str, Array] | None = None
    for batch in batches:
        part = sums(params, put(batch))
        if waiting is not None:  # read one batch late: the device always has work
            _add(total, waiting)
        waiting = part
    if waiting is not None:
        _add(total, waiting)
    if not total["tokens"]:
        raise DataError("there are no tokens to evaluate")
    loss = total["nll"] / total["tokens"]
    return Likelihood(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=total["nll"] / math.log(2) / total["bytes"] if total["bytes"] else math.nan,
        accuracy=total["correct"] / total["tokens"],
        tokens=int(total["tokens"]),
        bytes=int(total["bytes"]),
    )


def resident_loss(objective: CausalLM, rows: ResidentRows, batch_size: int) -> Callable[[Any], Float[Array, ""]]:
    """`params -> loss` in nats a token over all rows on the device, traceable: for evaluating inside a program."""
    batches = resident_batches(rows, batch_size)

    def loss(params: Any) -> Float[Array, ""]:
        def add(total: tuple, place: tuple) -> tuple[tuple, None]:
            batch = batches(place)
            nll, tokens = total
            return (nll + objective.sums(params, batch)["nll"], tokens + jnp.sum(batch["loss_weights"])), None

        start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
        nll, tokens = jax.lax.scan(add, start, batches.places)[0]
        return nll / tokens

    return loss


@dataclasses.dataclass(frozen=True)
class ResidentBatches:
    """All rows in batches of one size: `batches(place)` for each of `places`, to be scanned."""

    rows: ResidentRows
    places: tuple[Int[np.ndarray, "batches rows"], Float[np.ndarray, "batches rows"]]

    def __call__(self, place: tuple[Int[Array, "rows"], Float[Array, "rows"]]) -> dict[str, Array]:
        which, counted = place
        batch = self.rows.take(which)
        return {**batch, "loss_weights": batch["loss_weights"] * counted[:, None]}


def resident_batches(rows: ResidentRows, batch_size: int) -> ResidentBatches:
    """Batches for an evaluation: rows that fill the last one up are the first ones again, without weight."""
    batches = -(-rows.count // batch_size)
    order = np.arange(batches * batch_size, dtype=np.int32).reshape(batches, batch_size)
    return ResidentBatches(rows, (order % rows.count, (order < rows.count).astype(np.float32)))


def resident_matches(model: Any, rows: ResidentRows, batch_size: int) -> Callable[[Any], Float[Array, "rows"]]:
    """`params ->` for each row 1 if every counted target is the most likely token, else 0, traceable.

    Where a row is one example with its loss on the answer and the token that ends it, these are the examples that
    greedy decoding answers exactly: it goes wrong at the first target that is not the most likely one, and not before.
    NaN for a row without a counted target. The mean over a kind's rows is its exact match.
    """
    order, _ = resident_batches(rows, batch_size).places

    def matches(params: Any) -> Float[Array, "rows"]:
        def judge(chosen: Array) -> Array:
            batch = rows.take(chosen)
            given = (batch.get("positions"), batch.get("segment_ids"))
            found = model.apply({"params": params}, batch["inputs"], *given).argmax(-1)
            counted = batch["loss_weights"] > 0
            right = ((found == batch["targets"]) | ~counted).all(-1)
            return jnp.where(counted.any(-1), right.astype(jnp.float32), jnp.nan)

        return jax.lax.map(judge, jnp.asarray(order)).reshape(-1)[: rows.count]

    return matches


def source_likelihoods(
    model: Any,
    params: Any,
    tokenizer: Tokenizer,
    store: TokenStore,
    *,
    batch_size: int,
    length: int,
    max_batches: int | None = None,
) -> Iterator[tuple[str, Likelihood]]:
    """Yields each source of a store with its `Likelihood`, in rows of `length` tokens."""
    lengths = token_byte_lengths(tokenizer)
    # Models round their vocabulary up; what is beyond the tokenizer's stands for no bytes.
    lengths = np.pad(lengths, (0, model.config.vocab_size - len(lengths)))
    sums = jax.jit(make_sums(CausalLM(model), lengths))
    for source in store.source_names:
        batches = eval_batches(store, source, batch_size=batch_size, length=length, max_batches=max_batches)
        yield source, likelihood(sums, params, batches)


def _add(total: dict[str, float], part: Mapping[str, Array]) -> None:
    for name, value in jax.device_get(dict(part)).items():
        total[name] += float(value)
