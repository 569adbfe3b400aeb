"""Models: configurations, published sizes, and the functions that run them."""

from jaxlm.models.blocks import gather_layers, layer, num_layers, recut
from jaxlm.models.config import DecoderConfig, LayerKind
from jaxlm.models.decoder import Decoder, TrunkOutput
from jaxlm.models.ensemble import EnsembleModel, ensemble_logits, stack_members
from jaxlm.models.extension import extend_context, untie_head
from jaxlm.models.scaling_rules import ScalingRules

__all__ = [
    "Decoder",
    "DecoderConfig",
    "EnsembleModel",
    "LayerKind",
    "ScalingRules",
    "TrunkOutput",
    "ensemble_logits",
    "extend_context",
    "gather_layers",
    "layer",
    "num_layers",
    "recut",
    "stack_members",
    "untie_head",
]
