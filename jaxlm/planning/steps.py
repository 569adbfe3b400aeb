"""The steps of a model that a machine is planned for: training, policy gradient, adapters, one token of generation.

Each is lowered from shapes alone, with the code that runs it: `make_plan` compiles what comes out.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxlm.compression import QuantizeConfig, abstract_quantize
from jaxlm.core import sharding, trees
from jaxlm.core.errors import ConfigError
from jaxlm.decoding import DecoderStepper
from jaxlm.models import Decoder
from jaxlm.models.flops import (
    decode_flops_per_token,
    executed_flops_per_token,
    forward_flops_per_token,
    train_flops_per_token,
)
from jaxlm.objectives import GRPO, CausalLM
from jaxlm.optim.config import OptimizerConfig
from jaxlm.optim.roles import label
from jaxlm.peft.lora import LoraConfig, adapted_axes, add_lora, is_lora
from jaxlm.training import Program

DEFAULT_LORA = LoraConfig()
_COLUMNS = {"inputs": "int32", "targets": "int32", "segment_ids": "int32", "positions": "int32"}
_COLUMNS |= {"loss_weights": "float32"}


@dataclasses.dataclass(frozen=True)
class LoweredStep:
    """A step to compile: the program, the trees of its arguments by kind, and its operations on all chips."""

    lowered: Any
    arguments: Mapping[str, Any]
    model_flops: float
    executed_flops: float


def abstract_batch(mesh: Mesh, *shape: int, more: Mapping[str, tuple[str, int]] | None = None) -> dict[str, Any]:
    """The shapes of a global batch of tokens `[batch, ..., length]` on `mesh`.

    `more`: further columns, their dtype and how many of the axes of `shape` they have.
    """
    columns = {name: (dtype, len(shape)) for name, dtype in _COLUMNS.items()} | dict(more or {})
    return {
        name: jax.ShapeDtypeStruct(shape[:axes], dtype, sharding=sharding.batch_sharding(mesh, axes))
        for name, (dtype, axes) in columns.items()
    }


def train_step(program: Program, batch: Mapping[str, Any], frozen: Any = None) -> LoweredStep:
    """A pretraining step of a program with a `Decoder`; `frozen`: what it does not train, as shapes on the mesh."""
    config = program.model.config
    tokens, length = _tokens(batch)
    return LoweredStep(
        program.step.lower(program.abstract_state, frozen, batch),
        _state_arguments(program.abstract_state, batch) | ({} if frozen is None else {"frozen": frozen}),
        tokens * train_flops_per_token(config, length),
        tokens * executed_flops_per_token(config, length),
    )


def policy_step(
    model: Decoder,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    length: int,
    members: int = 8,
    micro_batches: int = 1,
    steps: int = 1000,
) -> LoweredStep:
    """A GRPO step on `batch_size` samples, `members` of each prompt, with a KL term to a frozen reference policy.

    The reference lies on the mesh in the format of the activations. Raises `ConfigError` if `members` does not divide
    `batch_size`.
    """
    if batch_size % members:
        raise ConfigError(f"batch of {batch_size} samples is not divisible by {members} samples a prompt")
    objective = GRPO(model, aggregation="grpo", kl_weight=0.04)
    program = Program(model, objective, optimizer.make(steps, model.axes()), mesh, micro_batches)
    groups = batch_size // members
    program.check_batch(groups)
    batch = abstract_batch(
        mesh, groups, members, length, more={"advantages": ("float32", 2), "old_log_probs": ("float32", 3)}
    )
    reference = _parameters(program, model.config.precision.activation_dtype)
    state, tokens = program.abstract_state, batch_size * length
    forward = forward_flops_per_token(model.config, length)
    return LoweredStep(
        program.step.lower(state, reference, batch),
        {**_state_arguments(state, batch), "reference": reference},
        tokens * (train_flops_per_token(model.config, length) + forward),
        tokens * (executed_flops_per_token(model.config, length) + forward),
    )


def adapter_step(
    model: Decoder,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    *,
    batch_size: int,
    length: int,
    lora: LoraConfig = DEFAULT_LORA,
    quantize: QuantizeConfig | None = None,
    micro_batches: int = 1,
    steps: int = 1000,
) -> LoweredStep:
    """A fine-tuning step of adapters over a frozen base, in the format of the activations or quantized (QLoRA)."""
    dtype = model.config.precision.activation_dtype
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model.abstract_params())
    if quantize is not None:
        base = abstract_quantize(base, quantize, model.axes())
    params = jax.eval_shape(lambda key, base: add_lora(key, base, lora), jax.random.key(0), base)
    axes = adapted_axes(params, model.axes())
    places = sharding.shardings(mesh, axes, params, model.config.sharding_rules(mesh))
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, places)
    start, frozen = trees.partition(params, is_lora, label(params, axes))

    program = Program(model, CausalLM(model), optimizer.make(steps, axes), mesh, micro_batches, start=start)
    program.check_batch(batch_size)
    batch = abstract_batch(mesh, batch_size, length)
    state, tokens = program.abstract_state, batch_size * length
    # Forward, and backward to the activations alone: the base has no gradient.
    again = executed_flops_per_token(model.config, length) - train_flops_per_token(model.config, length)
    flops = 2 * forward_flops_per_token(model.config, length)
    return LoweredStep(
        program.step.lower(state, frozen, batch),
        {**_state_arguments(state, batch), "frozen": frozen},
        tokens * flops,
        tokens * (flops + again),
    )


def decode_step(program: Program, *, batch_size: int, length: int) -> LoweredStep:
    """One token for each of `batch_size` rows whose cache of `length` tokens is full to the end.

    Parameters are in the format of the activations.
    """
    model, mesh = program.model, program.mesh
    stepper = DecoderStepper(model)
    params = _parameters(program, model.config.precision.activation_dtype)
    rules = {**sharding.RULES, **program.rules}

    def place(x: Any) -> Any:
        names = (None, "batch", "act_kv_heads", None, None) if x.ndim == 5 else ("batch",) * x.ndim
        where = NamedSharding(mesh, sharding.partition_spec(names, rules))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    cache = jax.eval_shape(lambda: stepper.init(None, batch_size, length))
    cache = dataclasses.replace(jax.tree.map(place, cache), empty=False)
    tokens = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32, sharding=sharding.batch_sharding(mesh, 2))
    out = (None, jax.tree.map(lambda x: x.sharding, cache))
    step = program.jit(functools.partial(stepper.step, last_only=True), donate_argnums=1, out_shardings=out)
    flops = batch_size * decode_flops_per_token(model.config, length)
    arguments = {"parameters": params, "cache": cache, "tokens": tokens}
    return LoweredStep(step.lower(params, cache, tokens), arguments, flops, flops)


def _state_arguments(state: Any, batch: Any) -> dict[str, Any]:
    return {
        "parameters": state.trainable,
        "optimizer state": state.opt_state,
        "batch": batch,
        "other state": (state.step, state.key, state.extra, state.hparams),
    }


def _parameters(program: Program, dtype: Any) -> Any:
    """The model's parameters in `dtype`, laid out as for training."""
    shapes = program.model.abstract_params()
    places = sharding.shardings(program.mesh, program.model.axes(), shapes, program.rules)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), shapes, places)


def _tokens(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens of a global batch, and of a row."""
    return batch["inputs"].size, batch["inputs"].shape[-1]
