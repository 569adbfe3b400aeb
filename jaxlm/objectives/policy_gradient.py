"""Group-relative policy optimization: advantages, importance ratios, clipping, KL estimators, ways to average.

Everything is a pure function of log-probabilities and a mask `[rows, length]` (1 on sampled tokens, EOS included), and
`GRPO` is the objective that joins them. A group is the samples of one prompt.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.objectives.base import Aux, Batch, StepContext
from jaxlm.objectives.preference import Reference, frozen_reference
from jaxlm.objectives.token_log_probs import check_batch, check_positive, model_log_probs

SCALES = ("group", "batch", "none")
AGGREGATIONS = ("grpo", "dapo", "dr_grpo")
LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def group_advantages(
    rewards: Float[Array, "groups members"],
    *,
    scale: str = "group",
    leave_one_out: bool = False,
    epsilon: float = 1e-4,
) -> Float[Array, "groups members"]:
    """Each reward minus its group's mean, divided by a standard deviation (with n - 1) plus `epsilon`.

    `scale`: `group` (GRPO, Shao et al. 2024, arXiv 2402.03300), `batch` (one deviation for all rewards), `none`
    (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783). `leave_one_out` takes the mean of the other members (RLOO, Ahmadian
    et al. 2024, arXiv 2402.14740). A NaN reward (nothing could be judged) is left out, and has advantage 0.
    """
    _one_of("scale", scale, SCALES)
    known = ~jnp.isnan(rewards)
    count = jnp.sum(known, axis=1, keepdims=True)
    filled = jnp.where(known, rewards, 0.0)
    centered = filled - jnp.sum(filled, axis=1, keepdims=True) / jnp.maximum(count, 1)
    centered = jnp.where(known, centered, 0.0)
    if scale == "group":
        deviation = jnp.sqrt(jnp.sum(centered**2, axis=1, keepdims=True) / jnp.maximum(count - 1, 1))
    elif scale == "batch":
        total = jnp.sum(known)
        spread = jnp.where(known, filled - jnp.sum(filled) / jnp.maximum(total, 1), 0.0)
        deviation = jnp.sqrt(jnp.sum(spread**2) / jnp.maximum(total - 1, 1))
    if leave_one_out:
        centered = centered * count / jnp.maximum(count - 1, 1)
    return centered if scale == "none" else centered / (deviation + epsilon)


def informative_groups(rewards: Float[Array, "groups members"]) -> Bool[Array, "groups"]:
    """Groups whose known rewards are not all equal: the others have no gradient, and DAPO's dynamic sampling (Yu et
    al. 2025, arXiv 2503.14476, section 3.2) draws new ones in their place."""
    known = ~jnp.isnan(rewards)
    low = jnp.min(jnp.where(known, rewards, jnp.inf), axis=1)
    high = jnp.max(jnp.where(known, rewards, -jnp.inf), axis=1)
    return high > low


def overlong_penalty(lengths: Int[Array, "rows"], max_length: int, buffer: int) -> Float[Array, "rows"]:
    """0 up to `max_length - buffer` tokens, then linear to -1 at `max_length`, -1 beyond (DAPO, equation 13)."""
    if not 0 < buffer <= max_length:
        raise ConfigError(f"buffer is {buffer}, expected 1 to max_length {max_length}")
    return jnp.clip((max_length - buffer - lengths) / buffer, -1.0, 0.0)


def importance_ratios(
    log_probs: Float[Array, "rows length"],
    old_log_probs: Float[Array, "rows length"],
    mask: Float[Array, "rows length"],
    level: str = "token",
) -> Float[Array, "rows length"]:
    """Policy over sampling policy: of each token, or with `sequence` the geometric mean over a row's tokens, the same
    in the whole row (GSPO, Zheng et al. 2025, arXiv 2507.18071)."""
    difference = jnp.where(mask > 0, log_probs - old_log_probs, 0.0)
    if level == "sequence":
        mean = jnp.sum(difference, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1.0)
        difference = jnp.broadcast_to(mean, difference.shape)
    return jnp.exp(difference)


def clipped_losses(
    ratios: Float[Array, "rows length"],
    advantages: Float[Array, "rows"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_limit: float | None = None,
) -> Float[Array, "rows length"]:
    """`-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)` of each token.

    `clip_high > clip_low` is DAPO's clip-higher; `ratio_limit` bounds the ratio from above first, also where the
    advantage is negative.
    """
    advantages = advantages[:, None]
    if ratio_limit is not None:
        ratios = jnp.minimum(ratios, ratio_limit)
    clipped = jnp.clip(ratios, 1 - clip_low, 1 + clip_high)
    return -jnp.minimum(ratios * advantages, clipped * advantages)


def kl_estimates(
    log_probs: Float[Array, "rows length"], reference: Float[Array, "rows length"], estimator: str = "k3"
) -> Float[Array, "rows length"]:
    """Estimates of KL(policy || reference) from one sample a token (Schulman 2020, "Approximating KL divergence").

    With d = log reference - log policy: `k1` is -d, `k2` is d^2 / 2, `k3` is exp(d) - d - 1.
    """
    _one_of("kl_estimator", estimator, KL_ESTIMATORS)
    d = reference - log_probs
    if estimator == "k1":
        return -d
    return jnp.square(d) / 2 if estimator == "k2" else jnp.exp(d) - d - 1


def sampler_weights(
    train_log_probs: Float[Array, "rows length"],
    sampler_log_probs: Float[Array, "rows length"],
    mask: Float[Array, "rows length"],
    mode: str = "sequence_mask",
    limit: float = 3.0,
) -> Float[Array, "rows length"]:
    """Weights that correct for a sampler whose probabilities differ from the training program's; no gradient.

    The ratio, of each token or of the whole row (a product), is cut to `limit`, or with `mask` rows or tokens above
    the limit get weight 0.
    """
    _one_of("correction", mode, CORRECTIONS)
    if mode == "none":
        return jnp.ones_like(train_log_probs)
    difference = jnp.where(mask > 0, train_log_probs - sampler_log_probs, 0.0)
    if mode.startswith("sequence"):
        difference = jnp.broadcast_to(jnp.sum(difference, axis=-1, keepdims=True), difference.shape)
    ratios = jax.lax.stop_gradient(jnp.exp(difference))
    return jnp.minimum(ratios, limit) if mode.endswith("truncate") else jnp.where(ratios <= limit, ratios, 0.0)


def aggregate(
    losses: Float[Array, "rows length"],
    mask: Float[Array, "rows length"],
    aggregation: str,
    totals: Mapping[str, Float[Array, ""]],
    max_length: int | None = None,
) -> Float[Array, ""]:
    """A piece's share of the loss of the whole batch, of which `totals` counts `rows` and `tokens`.

    `grpo`: each row's mean over tokens, then over rows; `dapo`: mean over all tokens of the batch; `dr_grpo`: sum over
    rows x `max_length`, so that no length is favored.
    """
    kept = jnp.where(mask > 0, mask * losses, 0.0)
    if aggregation == "grpo":
        means = jnp.sum(kept, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1.0)
        return jnp.sum(means) / jnp.maximum(totals["rows"], 1.0)
    if aggregation == "dapo":
        return jnp.sum(kept) / jnp.maximum(totals["tokens"], 1.0)
    return jnp.sum(kept) / jnp.maximum(totals["rows"] * max_length, 1.0)


@dataclasses.dataclass(frozen=True)
class GRPO:
    """The surrogate loss of group-relative policy gradients, without the rollouts.

    Batches hold `inputs, targets, loss_weights, segment_ids, positions` of shape `[batch, length]` or `[groups,
    members, length]`, `loss_weights` being the mask of sampled tokens, and `advantages` `[batch]` or `[groups,
    members]`. Optional, of the shape of `inputs`: `old_log_probs` (of the policy that sampled; without them each
    batch is on-policy and the ratio is 1), `reference_log_probs`, `sampler_log_probs`. Log-probabilities are those at
    `temperature`, which must be the sampling temperature.

    Defaults are TRL's: DAPO's token mean, no KL term, clipping at 0.2. The paper's GRPO: `aggregation="grpo",
    kl_weight=0.04`; DAPO: `clip_high=0.28`; Dr. GRPO: `aggregation="dr_grpo"` with `max_length`, and advantages with
    `scale="none"`; GSPO: `ratio_level="sequence", clip_low=3e-4, clip_high=4e-4, aggregation="grpo"`. With `cispo`
    (MiniMax 2025, arXiv 2506.13585) the ratio, cut to `clip_high`, is a weight without gradient on the log-probability.
    """

    model: Any
    aggregation: str = "dapo"
    ratio_level: str = "token"
    clip_low: float = 0.2
    clip_high: float | None = None
    ratio_limit: float | None = None
    cispo: bool = False
    kl_weight: float = 0.0
    kl_estimator: str = "k3"
    correction: str = "sequence_mask"
    correction_limit: float = 3.0
    temperature: float = 1.0
    max_length: int | None = None
    reference: Reference = frozen_reference
    chunk_length: int | None = None

    def __post_init__(self):
        _one_of("aggregation", self.aggregation, AGGREGATIONS)
        _one_of("ratio_level", self.ratio_level, LEVELS)
        _one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        _one_of("correction", self.correction, CORRECTIONS)
        check_positive(temperature=self.temperature, clip_low=self.clip_low, correction_limit=self.correction_limit)
        if self.aggregation == "dr_grpo" and not self.max_length:
            raise ConfigError("aggregation 'dr_grpo' needs max_length, the most tokens that a sample may have")
        if self.kl_weight < 0:
            raise ConfigError(f"kl_weight is {self.kl_weight}, expected >= 0")

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> dict[str, Array]:
        """`rows` and `tokens`: samples, and sampled tokens."""
        check_batch(batch, ("inputs", "targets", "loss_weights", "advantages"))
        mask = batch["loss_weights"]
        return {"rows": jnp.float32(math.prod(mask.shape[:-1])), "tokens": jnp.sum(mask)}

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Mapping[str, Array]) -> tuple[Array, Aux]:
        """This piece's share; metrics per token: `ratio`, `clipped` (share at a clip that acts), `kl`."""
        found = model_log_probs(
            self.model, params, batch, temperature=self.temperature, chunk_length=self.chunk_length
        )
        given = {name: batch[name] for name in ("old_log_probs", "sampler_log_probs") if name in batch}
        if self.kl_weight:
            given["reference_log_probs"] = self._reference(params, batch, ctx)
        return self.from_log_probs(
            found.reshape(-1, found.shape[-1]),
            batch["loss_weights"].reshape(-1, found.shape[-1]),
            batch["advantages"].reshape(-1),
            totals,
            **{name: x.reshape(-1, x.shape[-1]) for name, x in given.items()},
        )

    def from_log_probs(
        self,
        log_probs: Float[Array, "rows length"],
        mask: Float[Array, "rows length"],
        advantages: Float[Array, "rows"],
        totals: Mapping[str, Float[Array, ""]],
        *,
        old_log_probs: Float[Array, "rows length"] | None = None,
        reference_log_probs: Float[Array, "rows length"] | None = None,
        sampler_log_probs: Float[Array, "rows length"] | None = None,
    ) -> tuple[Float[Array, ""], Aux]:
        """The loss as a function of the policy's log-probabilities."""
        old = jax.lax.stop_gradient(log_probs if old_log_probs is None else old_log_probs)
        high = self.clip_low if self.clip_high is None else self.clip_high
        ratios = importance_ratios(log_probs, old, mask, self.ratio_level)
        if self.cispo:
            weight = jax.lax.stop_gradient(jnp.minimum(ratios, high))
            losses = -weight * advantages[:, None] * log_probs
            clipped = ratios > high
        else:
            losses = clipped_losses(
                ratios, advantages, clip_low=self.clip_low, clip_high=high, ratio_limit=self.ratio_limit
            )
            above = (ratios > 1 + high) & (advantages[:, None] > 0)
            clipped = above | ((ratios < 1 - self.clip_low) & (advantages[:, None] < 0))
        kl = jnp.zeros_like(log_probs)
        if self.kl_weight:
            reference = jnp.where(mask > 0, reference_log_probs, log_probs)
            kl = kl_estimates(log_probs, reference, self.kl_estimator)
            losses = losses + self.kl_weight * kl
        if sampler_log_probs is not None:
            losses = losses * sampler_weights(old, sampler_log_probs, mask, self.correction, self.correction_limit)
        share = aggregate(losses, mask, self.aggregation, totals, self.max_length)
        tokens = jnp.sum(mask)
        metrics = {
            # Weighed by tokens: pieces' shares add up to the loss of the whole.
            "loss": (share * jnp.maximum(totals["tokens"], 1.0), tokens),
            "ratio": (jnp.sum(mask * ratios), tokens),
            "clipped": (jnp.sum(mask * clipped), tokens),
        }
        if self.kl_weight:
            metrics["kl"] = (jnp.sum(mask * kl), tokens)
        return share, Aux(jax.lax.stop_gradient(metrics))

    def _reference(self, params: Any, batch: Batch, ctx: StepContext) -> Array:
        if "reference_log_probs" in batch:
            return batch["reference_log_probs"]
        reference = self.reference(params, ctx.frozen)
        if reference is None:
            raise ConfigError("kl_weight needs a reference policy: frozen parameters, or reference_log_probs")
        found = model_log_probs(
            self.model,
            jax.lax.stop_gradient(reference),
            batch,
            temperature=self.temperature,
            chunk_length=self.chunk_length,
        )
        return jax.lax.stop_gradient(found)


def _one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ConfigError(f"{name} '{value}': {nearest(value, options)}")
