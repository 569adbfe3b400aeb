"""Cross-entropy of labels under any model that gives logits: classifiers, probes, recurrent networks on trials."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError
from jaxlm.objectives.base import Aux, Batch, StepContext

Logits = Callable[[Any, Batch], Float[Array, "*n classes"]]


@dataclasses.dataclass(frozen=True)
class Classification:
    """Mean of `-log softmax(logits)[target]` over `targets`, weighted by `loss_weights` where the batch has them.

    `logits(params, batch)` has the shape of `batch["targets"]` and one more axis, the classes.
    """

    logits: Logits

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> dict[str, Array]:
        """`{"targets": sum of weights}`."""
        return {"targets": jnp.sum(_weights(batch))}

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Mapping[str, Array]) -> tuple[Array, Aux]:
        """This piece's share of the mean; metrics `loss` and `accuracy`."""
        logits, targets, weights = self.logits(params, batch), batch["targets"], _weights(batch)
        if logits.shape[:-1] != targets.shape:
            raise ConfigError(f"logits have shape {logits.shape} for targets of shape {targets.shape}")
        logp = jax.nn.log_softmax(logits.astype(jnp.float32))
        nll = -jnp.sum(weights * jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0])
        correct = jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets))
        count = jnp.sum(weights)
        share = nll / jnp.where(totals["targets"] == 0, 1.0, totals["targets"])
        return share, Aux({"loss": (nll, count), "accuracy": (correct, count)})


def _weights(batch: Batch) -> Float[Array, "*n"]:
    weights = batch.get("loss_weights")
    return jnp.ones(batch["targets"].shape, jnp.float32) if weights is None else weights
