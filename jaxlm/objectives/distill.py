"""Knowledge distillation from a frozen teacher's logits, mixed with cross-entropy."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.core.errors import ConfigError
from jaxlm.core.sharding import constrain
from jaxlm.objectives.base import Aux, Batch, StepContext
from jaxlm.objectives.causal_lm import cut_chunks, default_chunk, hidden_states
from jaxlm.objectives.preference import Reference, frozen_reference
from jaxlm.objectives.token_log_probs import check_positive


@dataclasses.dataclass(frozen=True)
class Distillation:
    """`weight * T^2 * KL(teacher || student) + (1 - weight) * cross-entropy`, mean over weighted tokens.

    Both distributions of the divergence are at temperature `T` (Hinton et al. 2015, arXiv 1503.02531; the factor keeps
    the gradient's size). Logits exist for chunks of the length alone, and are computed again in the backward pass.

    `teacher(params, frozen)` gives the teacher's parameters, by default all of the step's `frozen`; `teacher_model` is
    its model if it is another one, with the same vocabulary.
    """

    model: Any
    weight: float = 0.5
    temperature: float = 1.0
    teacher: Reference = frozen_reference
    teacher_model: Any = None
    chunk_length: int | None = None

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"weight is {self.weight}, expected 0 (no teacher) to 1 (only the teacher)")
        check_positive(temperature=self.temperature)
        if self.teacher_model is not None:
            mine, theirs = self.model.config.vocab_size, self.teacher_model.config.vocab_size
            if mine != theirs:
                raise ConfigError(f"the teacher's vocabulary has {theirs} entries, the student's {mine}")

    def totals(self, params: Any, batch: Batch, ctx: StepContext) -> dict[str, Array]:
        """`{"tokens": sum(loss_weights)}`."""
        return {"tokens": jnp.sum(batch["loss_weights"])}

    def loss(self, params: Any, batch: Batch, ctx: StepContext, totals: Mapping[str, Array]) -> tuple[Array, Aux]:
        """This piece's share of the mean; metrics `loss` (what is minimized), `nll` and `kl` per weighted token."""
        teacher_params = self.teacher(params, ctx.frozen)
        if teacher_params is None:
            raise ConfigError("distillation needs a teacher: its parameters in the step's frozen argument")
        teacher_params = jax.lax.stop_gradient(teacher_params)
        teacher = self.teacher_model or self.model
        hidden = hidden_states(self.model, params, batch)
        teacher_hidden = hidden_states(teacher, teacher_params, batch)
        nll, kl = self._sums(params, hidden, teacher, teacher_params, jax.lax.stop_gradient(teacher_hidden), batch)
        mixed = self.weight * self.temperature**2 * kl + (1 - self.weight) * nll
        tokens = jnp.sum(batch["loss_weights"])
        metrics = {"loss": (mixed, tokens), "nll": (nll, tokens), "kl": (kl, tokens)}
        share = mixed / jnp.where(totals["tokens"] == 0, 1.0, totals["tokens"])
        return share, Aux(jax.lax.stop_gradient(metrics))

    def _sums(self, params, hidden, teacher, teacher_params, teacher_hidden, batch) -> tuple[Array, Array]:
        rows, length, _ = hidden.shape
        size = self.chunk_length or default_chunk(2 * rows, length, self.model.config.vocab_size)
        columns = (hidden, teacher_hidden, batch["targets"], batch["loss_weights"])
        pad = -length % size
        if pad:
            columns = tuple(jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) for x in columns)
        heads = (
            self.model.gather_head(self.model.head_params(params)),
            teacher.gather_head(teacher.head_params(teacher_params)),
        )
        piece = functools.partial(_chunk, self.model.head, teacher.head, self.temperature)

        def body(sums: tuple, chunk: tuple) -> tuple:
            return jax.tree.map(jnp.add, sums, jax.checkpoint(piece, prevent_cse=False)(heads, *chunk)), None

        zero = jnp.zeros((), jnp.float32)
        return jax.lax.scan(body, (zero, zero), tuple(cut_chunks(x, size) for x in columns))[0]


def _chunk(head, teacher_head, temperature, heads, hidden, teacher_hidden, targets, weights) -> tuple[Array, Array]:
    logits = constrain(head(heads[0], hidden), "batch", "length", "act_vocab")
    theirs = constrain(teacher_head(heads[1], teacher_hidden), "batch", "length", "act_vocab")
    # A masked sum, not a gather: it stays local when the vocabulary is sharded.
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    picked = jnp.sum(jnp.where(columns == targets[..., None], logits, 0.0), axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    student, teacher = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (logits, theirs))
    kl = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return jnp.sum(weights * nll), jnp.sum(weights * kl)
