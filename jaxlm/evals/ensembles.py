"""How an ensemble's loss falls as members join: all of its sizes from one pass of each member."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.data.resident import ResidentRows
from jaxlm.evals.likelihood import resident_batches
from jaxlm.models.ensemble import add_member, check_combine, num_members


def growing_ensemble_loss(
    model: Any, rows: ResidentRows, batch_size: int, combine: str = "logits"
) -> Callable[[Any], Float[Array, "members"]]:
    """`stacked -> losses`: entry `k - 1` is the loss, in nats a token over all rows, of the first `k` members together.

    Traceable. The mean is carried from member to member (`add_member`), so a program holds the logits of a batch twice,
    however many members there are; they are whole, so `batch_size` must be small for a large vocabulary
    (`CausalLM(EnsembleModel(model))` cuts them into chunks, for an ensemble of one size).

    Raises `ConfigError` for an unknown `combine`.
    """
    check_combine(combine)
    batches = resident_batches(rows, batch_size)

    def losses(stacked: Any) -> Float[Array, "members"]:
        def batch_sums(batch: dict[str, Array]) -> Float[Array, "members"]:
            targets, weights = batch["targets"], batch["loss_weights"]

            def add(carry: tuple, params: Any) -> tuple[tuple, Array]:
                combined, count = carry
                more = (batch.get("positions"), batch.get("segment_ids"))
                logits = model.apply({"params": params}, batch["inputs"], *more)
                combined = add_member(combined, logits, count, combine)
                picked = jnp.take_along_axis(combined, targets[..., None], axis=-1)[..., 0]
                nll = jax.nn.logsumexp(combined, axis=-1) - picked
                return (combined, count + 1), jnp.sum(weights * nll)

            start = jnp.zeros((*targets.shape, model.config.vocab_size), jnp.float32)
            return jax.lax.scan(add, (start, jnp.zeros((), jnp.int32)), stacked)[1]

        def add_batch(total: tuple, batch: dict[str, Array]) -> tuple[tuple, None]:
            nll, tokens = total
            return (nll + batch_sums(batch), tokens + jnp.sum(batch["loss_weights"])), None

        start = (jnp.zeros((num_members(stacked),), jnp.float32), jnp.zeros((), jnp.float32))
        nll, tokens = jax.lax.scan(lambda total, place: add_batch(total, batches(place)), start, batches.places)[0]
        return nll / tokens

    return losses
