"""A wider model that computes the same function: every hidden unit in several copies.

As in Liu et al. (2023, arXiv 2210.14199, appendix on embedding a small network in a large one), to compare models of
different widths, such as by the trace of the Hessian, in one space of parameters.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.core.sharding import is_axes
from jaxlm.models import Decoder, DecoderConfig
from jaxlm.optim.roles import role
from jaxlm.weights import Weight


def widen_by_tiling(config: DecoderConfig, params: Any, factor: int) -> tuple[DecoderConfig, Any]:
    """Configuration and parameters of a model `factor` times as wide with the same outputs.

    Heads (of the same size), feed-forward units and the residual stream are repeated `factor` times; a kernel that
    reads repeated features is divided by `factor`, so that its sums stay. Embeddings are repeated whole, since norms
    do not undo a change of scale between them and what blocks add (the paper's models have a norm right after the
    embedding, and divide); a tied table, which is also the head, is divided and its embeddings scaled back.

    Raises `ConfigError` for a factor below 1, parameters of another model and kernels that are no dense arrays.
    """
    if factor < 1:
        raise ConfigError(f"factor is {factor}, expected at least 1")
    scale = config.embedding_scale
    if config.tie_embeddings:
        scale = factor * (1.0 if scale is None else scale)
    wide = dataclasses.replace(
        config,
        embed_dim=factor * config.embed_dim,
        num_heads=factor * config.num_heads,
        num_kv_heads=factor * config.kv_heads,
        head_dim=config.head_size,
        mlp_dim=factor * config.mlp_dim,
        embedding_scale=scale,
        init_out_std=config.out_std,
    )
    model, target = Decoder(config), Decoder(wide)
    axes = dict(trees.named_leaves(model.axes(), is_leaf=is_axes))
    before, after = (dict(trees.named_leaves(m.abstract_params())) for m in (model, target))

    def tile(path: str, leaf: Any) -> Array:
        if isinstance(leaf, Weight):
            raise ConfigError(f"{path} is no dense array: widen before kernels are packed")
        if path not in before or leaf.shape != before[path].shape:
            raise ConfigError(f"{path} has shape {leaf.shape}, expected {before.get(path, 'no such parameter')}")
        tiled = jnp.tile(leaf, [new // old for new, old in zip(after[path].shape, leaf.shape)])
        return tiled / factor if role(axes[path], path) in ("matrix", "head", "tied") else tiled

    return wide, trees.map_named(tile, params, is_leaf=lambda x: isinstance(x, Weight))
