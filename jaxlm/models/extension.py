"""A trained decoder changed for longer contexts: its rotation, and a head of its own.

As MiniCPM-128K was made (Hu et al. 2024, arXiv 2404.06395, section 6.3) from a checkpoint of the stable stage: untie
the head, raise the base of the rotation for the first stretch, NTK-aware scaling for the rest, and train on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxlm.core.errors import ConfigError
from jaxlm.layers.rotary import ntk_theta
from jaxlm.models.config import DecoderConfig
from jaxlm.weights import dense


def extend_context(config: DecoderConfig, max_length: int, theta: float | None = None) -> DecoderConfig:
    """The configuration for contexts of `max_length`; parameters stay as they are.

    `theta` is the new base of the rotation (the adjusted base frequency); by default that of NTK-aware scaling by
    `max_length / config.max_length`.

    Raises `ConfigError` for a model without rotation or with another rescaling, or a length below its own.
    """
    if config.position != "rotary" or config.rope_scaling is not None:
        what = f"position '{config.position}'" if config.position != "rotary" else "a rope_scaling"
        raise ConfigError(f"the context of a model with {what} is not extended by its theta")
    if max_length < config.max_length:
        raise ConfigError(f"max_length is {max_length}, the model already reaches {config.max_length}")
    if theta is None:
        theta = ntk_theta(config.rope_theta, config.rotary_dim, max_length / config.max_length)
    elif theta < config.rope_theta:
        raise ConfigError(f"theta is {theta}, expected at least the model's own, {config.rope_theta}")
    return dataclasses.replace(config, max_length=max_length, rope_theta=float(theta))


def untie_head(config: DecoderConfig, params: Mapping[str, Any]) -> tuple[DecoderConfig, dict[str, Any]]:
    """Configuration and parameters with a head of its own that begins as the embedding table: the same function.

    Raises `ConfigError` for a model whose head is not tied.
    """
    if not config.tie_embeddings:
        raise ConfigError("the head is not tied")
    kernel = jnp.swapaxes(dense(params["embedding"]["table"]), 0, 1)
    return dataclasses.replace(config, tie_embeddings=False), {**params, "head": {"kernel": kernel}}
