"""Preference objectives: the DPO family, CPO and SimPO, ORPO, KTO.

Batches of pairs hold arrays `[batch, 2, length]`, chosen first; `loss_weights` are 1 on the completion's targets, its
end-of-turn token included, and 0 elsewhere. A pair without a weighted target on either side (padding) does not count.

The reference policy is `reference(params, ctx.frozen)`, by default what is frozen itself; with adapters, a function
that takes them off. Where a batch holds `reference_log_probs` (of each target, `[batch, 2, length]`; see
`model_log_probs`), these are used and no reference is run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.objectives.base import Aux, Batch, StepContext
from jaxlm.objectives.token_log_probs import check_batch, check_positive, model_log_probs

Reference = Callable[[Any, Any], Any]
DPO_LOSSES = ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm")
_PAIR_ARRAYS = ("inputs", "targets", "loss_weights")


def frozen_reference(params: Any, frozen: Any) -> Any:
    """The reference's parameters where the step's `frozen` is exactly these: a copy from before training."""
    return frozen


@dataclasses.dataclass(frozen=True)
class DPO:
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) and its relatives, mean over pairs.

    `loss`: `sigmoid`; `hinge` (SLiC, Zhao et al. 2023, arXiv 2305.10425); `ipo` (Azar et al. 2023, arXiv 2310.12036,
    with log-probabilities averaged over tokens, as TRL has it); `robust` (Chowdhury et al. 2024, arXiv 2403.00409),
    which needs `label_smoothing`, the share of swapped labels; `sigmoid_norm`, averages in the sigmoid. With `sigmoid`,
    `label_smoothing` gives conservative DPO. `length_alpha` below 1 weighs tokens beyond the shorter completion
    (length desensitization, Liu et al. 2024, arXiv 2409.06411). `sft_weight` adds the chosen completions' mean
    negative log-likelihood per token (Pang et al. 2024, arXiv 2404.19733).
    """

    model: Any
    loss_kind: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    length_alpha: float = 1.0
    sft_weight: float = 0.0
    reference: Reference = frozen_reference
    chunk_length: int | None = None

    def __post_init__(self):
        if self.loss_kind not in DPO_LOSSES:
            raise ConfigError(f"loss_kind '{self.loss_kind}': {nearest(self.loss_kind, DPO_LOSSES)}")
        check_positive(beta=self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}, expected 0 <= value < 0.5")
        if self.label_smoothing and self.loss_kind not in ("sigmoid", "robust"):
            raise ConfigError(f"label_smoothing is for the losses sigmoid and robust, not '{self.loss_kind}'")
        if not 0 <= self.length_alpha <= 1:
            raise ConfigError(f"length_alpha is {self.length_alpha}, expected 0 to 1")
        if self.length_alpha < 1 and self._averages:
            raise ConfigError(f"length_alpha is for sums over tokens; the loss '{self.loss_kind}' takes averages")

    @property
    def _averages(self) -> bool:
        return self.loss_kind in ("ipo", "sigmoid_norm")

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> dict[str, Array]:
        """`pairs`, and `tokens`: weighted targets of chosen completions."""
        check_batch(batch, _PAIR_ARRAYS, 3)
        return _pair_totals(batch)

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Mapping[str, Array]) -> tuple[Array, Aux]:
        """This piece's share; metrics of the implicit rewards `beta * (log_prob - reference's)` per pair."""
        log_probs = model_log_probs(self.model, params, batch, chunk_length=self.chunk_length)
        ratios = log_probs - _reference(self, params, batch, ctx)
        weights = batch["loss_weights"]
        if self.length_alpha < 1:
            weights = _desensitized(weights, self.length_alpha)
        scores = _over_tokens(ratios, weights, average=self._averages)
        losses = dpo_losses(scores[:, 0] - scores[:, 1], self.loss_kind, self.beta, self.label_smoothing)
        return _pair_result(losses, self.beta * scores, log_probs, batch, totals, self.sft_weight)


@dataclasses.dataclass(frozen=True)
class CPO:
    """Contrastive preference optimization (Xu et al. 2024, arXiv 2401.08417): DPO's sigmoid loss without reference,
    plus `sft_weight` times the chosen completions' mean negative log-likelihood per token."""

    model: Any
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 1.0
    chunk_length: int | None = None

    def __post_init__(self):
        check_positive(beta=self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"label_smoothing is {self.label_smoothing}, expected 0 <= value < 0.5")

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> dict[str, Array]:
        """`pairs`, and `tokens`: weighted targets of chosen completions."""
        check_batch(batch, _PAIR_ARRAYS, 3)
        return _pair_totals(batch)

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Mapping[str, Array]) -> tuple[Array, Aux]:
        """This piece's share; rewards are `beta * log_prob`."""
        log_probs = model_log_probs(self.model, params, batch, chunk_length=self.chunk_length)
        scores = _over_tokens(log_probs, batch["loss_weights"], average=False)
        losses = dpo_losses(scores[:, 0] - scores[:, 1], "sigmoid", self.beta, self.label_smoothing)
        return _pair_result(losses, self.beta * scores, log_probs, batch, totals, self.sft_weight)


@dataclasses.dataclass(frozen=True)
class SimPO:
    """SimPO (Meng et al. 2024, arXiv 2405.14734, equation 6): `-log sigmoid(beta * (mean log-probability of chosen -
    of rejected) - margin)`; no reference. The released code states `margin / beta`."""

    model: Any
    beta: float = 2.0
    margin: float = 1.0
    sft_weight: float = 0.0
    chunk_length: int | None = None

    def __post_init__(self):
        check_positive(beta=self.beta)
        if self.margin < 0:
            raise ConfigError(f"margin is {self.margin}, expected >= 0")

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> dict[str, Array]:
        """`pairs`, and `tokens`: weighted targets of chosen completions."""
        check_batch(batch, _PAIR_ARRAYS, 3)
        return _pair_totals(batch)

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Mapping[str, Array]) -> tuple[Array, Aux]:
        """This piece's share; rewards are `beta` times the mean log-probability."""
        log_probs = model_log_probs(self.model, params, batch, chunk_length=self.chunk_length)
        scores = _over_tokens(log_probs, batch["loss_weights"], average=True)
        losses = -jax.nn.log_sigmoid(self.beta * (scores[:, 0] - scores[:, 1]) - self.margin)
        return _pair_result(losses, self.beta * scores, log_probs, batch, totals, self.sft_weight)


@dataclasses.dataclass(frozen=True)
class ORPO:
    """Odds-ratio preference optimization (Hong et al. 2024, arXiv 2403.07691): the chosen sequences' mean negative
    log-likelihood per token, prompts included (as in the released code), plus `beta` times minus the log sigmoid of
    the log odds ratio. No reference. Tokens are told from padding by `segment_ids`."""

    model: Any
    beta: float = 0.1
    chunk_length: int | None = None

    def __post_init__(self):
        check_positive(beta=self.beta)

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> dict[str, Array]:
        """`pairs`, and `tokens`: all targets of chosen sequences."""
        check_batch(batch, (*_PAIR_ARRAYS, "segment_ids"), 3)
        return {"pairs": jnp.sum(_valid(batch)), "tokens": jnp.sum(_chosen_tokens(batch))}

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Mapping[str, Array]) -> tuple[Array, Aux]:
        """This piece's share; rewards are `beta` times the mean log-probability."""
        log_probs = model_log_probs(self.model, params, batch, chunk_length=self.chunk_length)
        means = _over_tokens(log_probs, batch["loss_weights"], average=True)
        terms = self.beta * odds_ratio_losses(means[:, 0], means[:, 1])
        tokens = _chosen_tokens(batch)
        return _pair_result(terms, self.beta * means, log_probs, batch, totals, 1.0, nll_weights=tokens)


@dataclasses.dataclass(frozen=True)
class KTO:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306): single completions labeled good or bad.

    Batches hold `inputs, targets, loss_weights, segment_ids, positions` of shape `[batch, length]`, `labels` `[batch]`
    (1 desirable, 0 not), and the same arrays with the prefix `kl_` for prompts with another row's completion: their
    mean log-ratio over the whole batch, at least 0, is the reference point. `reference_log_probs` and
    `kl_reference_log_probs` stand in for running the reference.
    """

    model: Any
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: Reference = frozen_reference
    chunk_length: int | None = None

    def __post_init__(self):
        check_positive(
            beta=self.beta, desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight
        )

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> dict[str, Array]:
        """`rows`; `kl` and `kl_rows`: the sum of mismatched rows' log-ratios and their number."""
        check_batch(batch, (*_PAIR_ARRAYS, "labels", "kl_inputs", "kl_targets", "kl_loss_weights"), 2)
        mismatched = {name.removeprefix("kl_"): x for name, x in batch.items() if name.startswith("kl_")}
        log_probs = model_log_probs(self.model, params, mismatched, chunk_length=self.chunk_length)
        ratios = _over_tokens(
            log_probs - _reference(self, params, mismatched, ctx), mismatched["loss_weights"], average=False
        )
        return {
            "rows": jnp.sum(_weighted(batch)),
            "kl": jnp.sum(ratios * _weighted(mismatched)),
            "kl_rows": jnp.sum(_weighted(mismatched)),
        }

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Mapping[str, Array]) -> tuple[Array, Aux]:
        """This piece's share of the mean over rows; metrics of implicit rewards by label, and `kl`."""
        log_probs = model_log_probs(self.model, params, batch, chunk_length=self.chunk_length)
        ratios = _over_tokens(
            log_probs - _reference(self, params, batch, ctx), batch["loss_weights"], average=False
        )
        labels, rows = batch["labels"].astype(jnp.float32), _weighted(batch)
        kl = jnp.maximum(totals["kl"] / _nonzero(totals["kl_rows"]), 0.0)
        losses = kto_losses(ratios, labels, kl, self.beta, self.desirable_weight, self.undesirable_weight)
        rewards = jax.lax.stop_gradient(self.beta * ratios)
        count, good, bad = jnp.sum(rows), rows * labels, rows * (1 - labels)
        metrics = {
            "tokens": (jnp.sum(batch["loss_weights"]), count / _nonzero(totals["rows"])),
            "loss": (jnp.sum(rows * losses), count),
            "reward_desirable": (jnp.sum(good * rewards), jnp.sum(good)),
            "reward_undesirable": (jnp.sum(bad * rewards), jnp.sum(bad)),
            "kl": (kl * count, count),
        }
        return jnp.sum(rows * losses) / _nonzero(totals["rows"]), Aux(metrics)


def dpo_losses(
    difference: Float[Array, "pairs"], kind: str, beta: float, label_smoothing: float = 0.0
) -> Float[Array, "pairs"]:
    """The loss of each pair from the difference of its log-ratios, chosen minus rejected (see `DPO`).

    Ratios are sums over tokens, but averages for `ipo` and `sigmoid_norm`.
    """
    right, wrong = -jax.nn.log_sigmoid(beta * difference), -jax.nn.log_sigmoid(-beta * difference)
    if kind == "hinge":
        return jax.nn.relu(1 - beta * difference)
    if kind == "ipo":
        return jnp.square(difference - 1 / (2 * beta))
    if kind == "robust":
        return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    return (1 - label_smoothing) * right + label_smoothing * wrong


def odds_ratio_losses(chosen: Float[Array, "pairs"], rejected: Float[Array, "pairs"]) -> Float[Array, "pairs"]:
    """Minus the log sigmoid of the log odds ratio of each pair's mean log-probabilities (ORPO, equation 7)."""
    return -jax.nn.log_sigmoid((chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected)))


def kto_losses(
    log_ratios: Float[Array, "rows"],
    labels: Float[Array, "rows"],
    reference_point: Float[Array, ""] | float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "rows"]:
    """The loss of each row from its summed log-ratio (KTO, equations 7 and 8); no gradient by `reference_point`."""
    gain = beta * (log_ratios - jax.lax.stop_gradient(reference_point))
    good = desirable_weight * (1 - jax.nn.sigmoid(gain))
    bad = undesirable_weight * (1 - jax.nn.sigmoid(-gain))
    return labels * good + (1 - labels) * bad


def _reference(objective: Any, params: Any, batch: Batch, ctx: StepContext) -> Array:
    if "reference_log_probs" in batch:
        return batch["reference_log_probs"]
    reference = objective.reference(params, ctx.frozen)
    if reference is None:
        raise ConfigError(
            "no reference policy: pass its parameters as the step's `frozen`, a `reference(params, frozen)`, or "
            "batches with reference_log_probs"
        )
    found = model_log_probs(
        objective.model, jax.lax.stop_gradient(reference), batch, chunk_length=objective.chunk_length
    )
    return jax.lax.stop_gradient(found)


def _over_tokens(values: Array, weights: Array, *, average: bool) -> Array:
    # Padding may hold anything, infinities from stored arrays included.
    total = jnp.sum(jnp.where(weights > 0, weights * values, 0.0), axis=-1)
    return total / _nonzero(jnp.sum(weights, axis=-1)) if average else total


def _desensitized(weights: Array, alpha: float) -> Array:
    """Weights times alpha for a pair's targets beyond the number that its shorter completion has."""
    counted = (weights > 0).astype(jnp.int32)
    shorter = jnp.min(jnp.sum(counted, axis=-1), axis=-1)
    return jnp.where(jnp.cumsum(counted, axis=-1) > shorter[:, None, None], alpha * weights, weights)


def _log_complement(x: Array) -> Array:
    """`log(1 - exp(x))` for x < 0, accurate near 0 and far from it."""
    x = jnp.minimum(x, -1e-7)
    near = x > -0.6931472
    # Both branches get arguments that are safe for gradients.
    return jnp.where(
        near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x)))
    )


def _nonzero(x: Array) -> Array:
    return jnp.where(x == 0, 1.0, x)


def _weighted(batch: Batch) -> Array:
    return jnp.any(batch["loss_weights"] > 0, axis=-1).astype(jnp.float32)


def _valid(batch: Batch) -> Array:
    return jnp.prod(_weighted(batch), axis=-1)


def _chosen_tokens(batch: Batch) -> Array:
    return (batch["segment_ids"][:, 0] > 0) * _valid(batch)[:, None]


def _pair_totals(batch: Batch) -> dict[str, Array]:
    valid = _valid(batch)
    return {"pairs": jnp.sum(valid), "tokens": jnp.sum(valid[:, None] * batch["loss_weights"][:, 0])}


def _pair_result(
    losses: Array,
    rewards: Array,
    log_probs: Array,
    batch: Batch,
    totals: Mapping[str, Array],
    sft_weight: float,
    nll_weights: Array | None = None,
) -> tuple[Array, Aux]:
    valid, rewards = _valid(batch), jax.lax.stop_gradient(rewards)
    if nll_weights is None:
        nll_weights = batch["loss_weights"][:, 0] * valid[:, None]
    nll = -jnp.sum(jnp.where(nll_weights > 0, nll_weights * log_probs[:, 0], 0.0))
    pairs, tokens = jnp.sum(valid), jnp.sum(nll_weights)
    share = jnp.sum(valid * losses) / _nonzero(totals["pairs"])
    summed = jnp.sum(valid * losses)
    if sft_weight:
        more = sft_weight * nll / _nonzero(totals["tokens"])
        share = share + more
        # Pieces' shares add up to the whole loss; weighing them by pairs gives the same as a metric.
        summed = summed + more * totals["pairs"]
    margin = rewards[:, 0] - rewards[:, 1]
    metrics = {
        "tokens": (jnp.sum(batch["loss_weights"]), pairs / _nonzero(totals["pairs"])),
        "loss": (summed, pairs),
        "nll": (nll, tokens),
        "accuracy": (jnp.sum(valid * (margin > 0)), pairs),
        "margin": (jnp.sum(valid * margin), pairs),
        "reward_chosen": (jnp.sum(valid * rewards[:, 0]), pairs),
        "reward_rejected": (jnp.sum(valid * rewards[:, 1]), pairs),
    }
    return share, Aux(metrics)
