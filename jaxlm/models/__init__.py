"""Models: configurations, published sizes, and the functions that run them."""

from jaxlm.models.blocks import gather_layers, layer, num_layers, recut
from jaxlm.models.config import DecoderConfig, LayerKind
from jaxlm.models.decoder import Decoder, TrunkOutput

__all__ = [
    "Decoder",
    "DecoderConfig",
    "LayerKind",
    "TrunkOutput",
    "gather_layers",
    "layer",
    "num_layers",
    "recut",
]
