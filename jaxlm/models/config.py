"""The switches of the decoder: what tells Llama, Qwen, GPT-NeoX, GPT-2 and Gemma apart."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.precision import Precision
from jaxlm.layers.attend import IMPLEMENTATIONS
from jaxlm.layers.mlp import ACTIVATIONS
from jaxlm.layers.rotary import RopeScaling

REMAT = ("none", "dots", "projections", "full")
MOST_LAYERS = 1 << 12
"""Lists of layers are made of what a file says: it must not fill the memory."""


class LayerKind(NamedTuple):
    """What may differ between layers of one stack without changing their parameters."""

    window: int | None
    local_rope: bool


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and behavior of a decoder-only transformer. The defaults are those of Llama."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    num_kv_heads: int | None = None
    """Key/value heads; by default as many as query heads."""
    head_dim: int | None = None
    """By default `embed_dim / num_heads`."""
    max_length: int = 2048
    """Context length the model is meant for (the number of learned positions, where it has those)."""
    norm: str = "rms"
    """`rms` or `layer` (with bias)."""
    norm_eps: float = 1e-5
    norm_unit_offset: bool = False
    """Norm scales are `1 + w` (Gemma)."""
    norm_placement: str = "pre"
    """`pre`, or `sandwich`: also after each branch, before it is added (Gemma 2 and 3)."""
    parallel_residual: bool = False
    """`x + attention(norm1 x) + mlp(norm2 x)` (GPT-NeoX)."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    mlp_gated: bool = True
    activation: str = "silu"
    qk_norm: bool = False
    """RMS norm over each head of queries and keys, before rotation (Qwen 3, Gemma 3)."""
    position: str = "rotary"
    """`rotary`, `learned` (GPT-2) or `none`."""
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    """Share of each head's dimensions that is rotated, the first ones (GPT-NeoX 0.25)."""
    rope_scaling: RopeScaling | None = None
    rope_theta_local: float | None = None
    """Theta of the layers with a window, without scaling (Gemma 3); by default they rotate like the others."""
    causal: bool = True
    """Tokens see those before them alone; False: all of the row (an encoder, for `MaskedLM`; it cannot generate)."""
    window: int | None = None
    """Attention reaches this many tokens back, the query itself counted, in the layers that `window_pattern` marks."""
    window_pattern: tuple[bool, ...] = (True,)
    """Which layers of a repeating group have the window: `(True, False)` for Gemma 2."""
    attention_scale: float | None = None
    """Factor on attention logits; by default `head_dim ** -0.5`."""
    attention_scale_by_layer: bool = False
    """Also divide by the layer's number, from 1 (an option of GPT-2)."""
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float | None = None
    """Factor on embeddings (Gemma: `embed_dim ** 0.5`)."""
    residual_scale: float | None = None
    """Factor on the output of each branch before it is added to the residual stream (MiniCPM)."""
    logit_scale: float | None = None
    """Factor on the hidden states that the vocabulary projection reads (MiniCPM)."""
    tie_embeddings: bool = False
    init_std: float = 0.02
    init_out_std: float | None = None
    """Of the projections that write to the residual stream; by default `init_std / sqrt(2 num_layers)` (GPT-2)."""
    init_embedding_std: float | None = None
    """Of the embedding table, tied or not, and of an untied head; by default `init_std`."""
    precision: Precision = Precision()
    remat: str = "dots"
    """What the backward pass finds stored, the rest it computes again: `none` stores everything, `dots` the results of
    matrix products and of attention (on accelerators only those that it needs, and not attention's output projection),
    `projections` those of the query, key and value projections, `full` only the input of each layer."""
    attention: str = "auto"
    """Implementation of attention: `auto`, `reference`, `blocked`, or a kernel, `tpu`, `gpu`, `cudnn`."""

    def __post_init__(self):
        for name in ("vocab_size", "num_layers", "embed_dim", "num_heads", "mlp_dim", "max_length"):
            most = MOST_LAYERS if name == "num_layers" else 2**31 - 1
            if not 1 <= getattr(self, name) <= most:
                bound = f" and at most {most}" if getattr(self, name) > 1 else ""
                raise ConfigError(f"model.{name} is {getattr(self, name)}, expected at least 1{bound}")
        for name, options in (
            ("norm", ("rms", "layer")),
            ("norm_placement", ("pre", "sandwich")),
            ("position", ("rotary", "learned", "none")),
            ("activation", tuple(ACTIVATIONS)),
            ("remat", REMAT),
            ("attention", IMPLEMENTATIONS),
        ):
            value = getattr(self, name)
            if value not in options:
                raise ConfigError(f"model.{name} is '{value}': {nearest(str(value), options)}")
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ConfigError(
                f"model.embed_dim {self.embed_dim} is not divisible by model.num_heads {self.num_heads}: set head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ConfigError(
                f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads {self.num_kv_heads}"
            )
        if self.position == "rotary" and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ConfigError(
                f"model.head_dim {self.head_size} x rope_fraction {self.rope_fraction} rotates {self.rotary_dim} "
                "dimensions, expected an even number of at least 2"
            )
        yarn = self.rope_scaling is not None and self.rope_scaling.kind == "yarn"
        for name in ("rope_theta", "rope_theta_local"):
            theta = getattr(self, name)
            if theta is not None and not (1 if yarn else 0) < theta < math.inf:
                raise ConfigError(f"model.{name} is {theta}, expected a number greater than {1 if yarn else 0}")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"model.window is {self.window}, expected at least 1")
        if self.window is not None and not self.causal:
            raise ConfigError(f"model.window is {self.window}, but windows are of causal models")
        if not self.window_pattern:
            raise ConfigError("model.window_pattern is empty, expected at least one entry")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_size * self.rope_fraction)

    @property
    def embedding_std(self) -> float:
        return self.init_std if self.init_embedding_std is None else self.init_embedding_std

    @property
    def out_std(self) -> float:
        return self.init_std / (2 * self.num_layers) ** 0.5 if self.init_out_std is None else self.init_out_std

    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """One entry a layer; they repeat with the period of `window_pattern`."""
        if self.window is None:
            return (LayerKind(None, False),) * self.num_layers
        local = LayerKind(self.window, self.rope_theta_local is not None)
        pattern = [local if windowed else LayerKind(None, False) for windowed in self.window_pattern]
        return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))

    def sharding_rules(self, mesh: Mesh) -> Mapping[str, str | None]:
        """What this model changes in the sharding rules: key/value heads too few to divide are replicated.

        Raises `ConfigError` when the query heads cannot be divided over the mesh's tensor axis.
        """
        tensor = mesh.shape["tensor"]
        if self.num_heads % tensor:
            raise ConfigError(f"model.num_heads {self.num_heads} is not divisible by mesh.tensor {tensor}")
        return {} if self.kv_heads % tensor == 0 else {"kv_heads": None, "act_kv_heads": None}
