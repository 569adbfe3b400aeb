"""Widths and depths that share their hyperparameters: MiniCPM's rules in the manner of Tensor Programs.

    rules = ScalingRules()
    config = rules.apply(DecoderConfig(vocab_size, num_layers=12, embed_dim=768, ..., tie_embeddings=True))
    tx = adamw(0.01, axes=Decoder(config).axes(), rate_factor=rules.rate_factor(config))

With `r = embed_dim / base_dim` the rate tuned on a narrow model is the rate of a wide one. Sources: MiniCPM (Hu et al.
2024, arXiv 2404.06395, section 3.1 and appendix A; its released configuration for `base_dim`), Tensor Programs V (Yang
et al. 2022, arXiv 2203.03466) and VI (arXiv 2310.02244) for the depth.
"""

import dataclasses
from collections.abc import Callable

from jaxlm.core.errors import ConfigError
from jaxlm.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class ScalingRules:
    """The defaults are those found for MiniCPM by search on 9M parameters; its learning rate is 0.01.

    | | |
    |---|---|
    | embeddings | times `scale_emb`; std `init_std` |
    | each branch | times `scale_depth / sqrt(num_layers)` before it is added |
    | kernels of the blocks | std `init_std / sqrt(r)`, learning rate over `r` |
    | logits | of hidden states over `r` |

    Everything else keeps the rate: norm scales (which begin at 1), the embedding table, and an untied head, whose
    input is already divided. (The paper's table could be read to scale all matrices; its released code initializes the
    table with `init_std`.) Attention logits stay divided by `sqrt(head_dim)`: heads get more, not wider.
    """

    base_dim: int = 256
    scale_emb: float = 12.0
    scale_depth: float = 1.4
    init_std: float = 0.1

    def __post_init__(self):
        for name in ("base_dim", "scale_emb", "scale_depth", "init_std"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"scaling_rules.{name} is {getattr(self, name)}, expected > 0")

    def width(self, config: DecoderConfig) -> float:
        """`r`: how much wider than the base the model is."""
        return config.embed_dim / self.base_dim

    def apply(self, config: DecoderConfig) -> DecoderConfig:
        """The configuration with the multipliers and initial deviations of its width and depth."""
        r = self.width(config)
        return dataclasses.replace(
            config,
            embedding_scale=self.scale_emb,
            residual_scale=self.scale_depth / config.num_layers**0.5,
            logit_scale=1 / r,
            init_std=self.init_std / r**0.5,
            init_out_std=self.init_std / r**0.5,
            init_embedding_std=self.init_std,
        )

    def rate_factor(self, config: DecoderConfig) -> Callable[[str, str], float]:
        """Each parameter's share of the learning rate, by `(path, role)`: `1 / r` for the blocks' kernels, else 1."""
        r = self.width(config)
        return lambda path, role: 1 / r if role in ("matrix", "router", "conv") else 1.0
