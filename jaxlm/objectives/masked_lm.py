"""Masked language modeling: hide some tokens of a row, predict them from the others (Devlin et al., 2019, BERT)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core.errors import ConfigError
from jaxlm.core.keys import fold
from jaxlm.objectives.base import Aux, Batch, StepContext
from jaxlm.objectives.causal_lm import hidden_states, token_loss_sums


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """Mean negative log-likelihood of hidden tokens. Batches need `inputs`, and `segment_ids` where rows are padded.

    Every token below `num_words` of a segment above 0 is chosen with probability `rate`; a chosen one becomes `mask_id`
    (share `masked`), any of the `num_words` (share `random`) or stays, and is predicted in each case. The defaults
    are BERT's. With `masked=1` the best predictions are the data's own conditional probabilities.

    `model` is a decoder with `causal=False`. Raises `ConfigError` for one that is causal and shares out of range.
    """

    model: Any
    mask_id: int
    num_words: int
    rate: float = 0.15
    masked: float = 0.8
    random: float = 0.1

    def __post_init__(self):
        if self.model.config.causal:
            raise ConfigError("model.causal is True, expected False: a masked token is predicted from both sides")
        if not self.num_words <= self.mask_id < self.model.config.vocab_size:
            raise ConfigError(
                f"mask_id is {self.mask_id}, expected from num_words {self.num_words} to below model.vocab_size "
                f"{self.model.config.vocab_size}"
            )
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rate is {self.rate}, expected above 0 and at most 1")
        if min(self.masked, self.random) < 0 or self.masked + self.random > 1:
            raise ConfigError(f"masked {self.masked} and random {self.random}: expected shares of at most 1 in all")

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> dict[str, Array]:
        """`{"tokens": number of hidden tokens}`."""
        return {"tokens": jnp.sum(self.hide(ctx.key, batch)[1])}

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Mapping[str, Array]) -> tuple[Array, Aux]:
        """This piece's share of the mean; metrics `loss` and `accuracy` per hidden token."""
        inputs, weights = self.hide(ctx.key, batch)
        sums = token_loss_sums(
            self.model.head,
            self.model.head_params(params),
            hidden_states(self.model, params, {**batch, "inputs": inputs}),
            batch["inputs"],
            weights,
            vocab_size=self.model.config.vocab_size,
            gather=self.model.gather_head,
        )
        tokens = jnp.sum(weights)
        share = sums["loss"] / jnp.where(totals["tokens"] == 0, 1.0, totals["tokens"])
        return share, Aux({"loss": (sums["nll"], tokens), "accuracy": (sums["correct"], tokens)})

    def hide(self, key: jax.Array, batch: Batch) -> tuple[Int[Array, "batch length"], Float[Array, "batch length"]]:
        """The tokens as the model gets them, and 1 where one is to be predicted."""
        tokens, shape = batch["inputs"], batch["inputs"].shape
        chosen = (jax.random.uniform(fold(key, "chosen"), shape) < self.rate) & self._ordinary(batch)
        how = jax.random.uniform(fold(key, "how"), shape)
        others = jax.random.randint(fold(key, "others"), shape, 0, self.num_words)
        changed = jnp.where(how < self.masked, self.mask_id, jnp.where(how < self.masked + self.random, others, tokens))
        return jnp.where(chosen, changed, tokens).astype(tokens.dtype), chosen.astype(jnp.float32)

    def conditionals(self, params: Any, batch: Batch) -> Float[Array, "batch length vocab"]:
        """Log-probabilities of each token given all others: one forward pass a place, with that place masked.

        Their sum at the tokens themselves is a row's pseudo-log-likelihood (Salazar et al., 2020).
        """
        length = batch["inputs"].shape[1]

        def place(i: Array) -> Float[Array, "batch vocab"]:
            inputs = jnp.where((jnp.arange(length) == i)[None, :], self.mask_id, batch["inputs"])
            hidden = jnp.take(hidden_states(self.model, params, {**batch, "inputs": inputs}), i[None], axis=1)
            return jax.nn.log_softmax(self.model.head(params, hidden)[:, 0])

        return jnp.swapaxes(jax.lax.map(place, jnp.arange(length)), 0, 1)

    def _ordinary(self, batch: Batch) -> Array:
        ordinary = batch["inputs"] < self.num_words
        segments = batch.get("segment_ids")
        return ordinary if segments is None else ordinary & (segments > 0)
