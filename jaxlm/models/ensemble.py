"""Ensembles: models of one shape, their parameters stacked along a leading axis, their predictions combined.

    stacked = stack_members([outcome.params for outcome in outcomes])
    ensemble = EnsembleModel(Decoder(config))
    logits = ensemble.apply({"params": stacked}, tokens)
    loss = CausalLM(ensemble).sums(stacked, batch)["nll"]       # objectives and evaluations take it for a model

Members are mapped (`jax.vmap`): one program whatever their number. To combine logits is the geometric mean of the
members' distributions, normalized again (Kim, Kotha et al. 2025, "Pre-training under infinite compute", arXiv
2509.14786). Cross-entropy is convex in the logits, so that mean is never worse than the members are on average, on any
token. `jaxlm.decoding.StackedStepper` samples from an ensemble.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError, nearest
from jaxlm.layers.attend import Mask
from jaxlm.models.decoder import Decoder, TrunkOutput

Params = Any

COMBINE = ("logits", "probabilities")
"""What the mean is taken of."""


def stack_members(members: Sequence[Params]) -> Params:
    """Parameters with a leading axis of members.

    Raises `ConfigError` for no members, or one whose leaves are not those of the first.
    """
    if not members:
        raise ConfigError("an ensemble of no members")
    first = {path: (leaf.shape, leaf.dtype) for path, leaf in trees.named_leaves(members[0])}
    for i, params in enumerate(members[1:], start=1):
        other = {path: (leaf.shape, leaf.dtype) for path, leaf in trees.named_leaves(params)}
        for path in [*first, *other]:
            if first.get(path) != other.get(path):
                raise ConfigError(
                    f"member {i} of an ensemble has {path} {other.get(path, 'nowhere')}, member 0 "
                    f"{first.get(path, 'nowhere')}: members have one shape"
                )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def num_members(stacked: Params) -> int:
    """How many members are stacked. Raises `ConfigError` where the leaves' leading axes differ."""
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(stacked)}
    if len(sizes) != 1 or 0 in sizes:
        raise ConfigError(f"leading axes of sizes {sorted(sizes)}, expected one of members: see stack_members")
    return sizes.pop()


def member(stacked: Params, index: int) -> Params:
    """The parameters of one member. Raises `ConfigError` for one that there is not."""
    count = num_members(stacked)
    if not 0 <= index < count:
        raise ConfigError(f"member {index} of an ensemble of {count}")
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def ensemble_logits(logits: Float[Array, "members *batch vocab"], combine: str = "logits") -> Float[Array, "..."]:
    """The logits `[*batch, vocab]` of an ensemble: the mean over members, or the logarithm of their mean probability.

    Raises `ConfigError` for another `combine`.
    """
    check_combine(combine)
    if combine == "logits":
        return jnp.mean(logits, axis=0)
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return jax.nn.logsumexp(log_probs, axis=0) - jnp.log(jnp.float32(logits.shape[0]))


def add_member(
    combined: Float[Array, "*batch vocab"],
    logits: Float[Array, "*batch vocab"],
    count: Int[Array, ""] | int,
    combine: str = "logits",
) -> Float[Array, "*batch vocab"]:
    """`ensemble_logits` of `count + 1` members from that of the first `count` and one more's logits.

    With a `count` of 0 `combined` does not matter, but must be finite.
    """
    check_combine(combine)
    n = jnp.asarray(count, jnp.float32)
    if combine == "logits":
        return combined + (logits - combined) / (n + 1)
    before = jnp.where(n > 0, combined + jnp.log(jnp.maximum(n, 1)), -jnp.inf)
    return jnp.logaddexp(before, jax.nn.log_softmax(logits, axis=-1)) - jnp.log(n + 1)


def check_combine(combine: str) -> None:
    """Raises `ConfigError` for what cannot be combined."""
    if combine not in COMBINE:
        raise ConfigError(f"combine is '{combine}': {nearest(combine, COMBINE)}")


@dataclasses.dataclass(frozen=True)
class EnsembleModel:
    """The functions of an ensemble of decoders; parameters are those of `stack_members`.

    It has the parts of a `Decoder` that losses and evaluations use. Hidden states are the members', side by side:
    `[batch, length, members * embed]`.
    """

    model: Decoder
    combine: str = "logits"

    def __post_init__(self):
        check_combine(self.combine)

    @property
    def config(self) -> Any:
        """Of a member."""
        return self.model.config

    def apply(
        self,
        variables: Mapping[str, Params],
        inputs: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Float32 logits of the next token at every place."""
        params = variables["params"]
        hidden = self.embed(params, inputs, positions)
        return self.head(params, self.trunk(params, hidden, positions=positions, segment_ids=segment_ids).hidden)

    def embed(
        self, params: Params, inputs: Int[Array, "batch length"], positions: Int[Array, "batch length"] | None = None
    ) -> Float[Array, "batch length features"]:
        """Each member's embeddings."""
        return _beside(jax.vmap(lambda p: self.model.embed(p, inputs, positions))(params))

    def trunk(
        self,
        params: Params,
        h: Float[Array, "batch length features"],
        *,
        positions: Int[Array, "batch length"] | None = None,
        segment_ids: Int[Array, "batch length"] | None = None,
        mask: Mask | None = None,
    ) -> TrunkOutput:
        """Each member's blocks."""

        def one(p: Params, h: Array) -> Array:
            return self.model.trunk(p, h, positions=positions, segment_ids=segment_ids, mask=mask).hidden

        return TrunkOutput(_beside(jax.vmap(one)(params, _apart(params, h))), None, {}, {})

    def head(self, params: Params, hidden: Float[Array, "batch length features"]) -> Float[Array, "batch length vocab"]:
        """The combined logits, float32."""
        return ensemble_logits(jax.vmap(self.model.head)(params, _apart(params, hidden)), self.combine)

    def head_params(self, params: Params) -> Params:
        """The part of the parameters that `head` reads."""
        return self.model.head_params(params)

    def gather_head(self, head_params: Params) -> Params:
        """As `Decoder.gather_head`, of each member."""
        return jax.vmap(self.model.gather_head)(head_params)


def _beside(hidden: Float[Array, "members batch length embed"]) -> Float[Array, "batch length features"]:
    return jnp.moveaxis(hidden, 0, 2).reshape(*hidden.shape[1:3], -1)


def _apart(params: Params, hidden: Float[Array, "batch length features"]) -> Float[Array, "members batch length embed"]:
    return jnp.moveaxis(hidden.reshape(*hidden.shape[:2], num_members(params), -1), 2, 0)
