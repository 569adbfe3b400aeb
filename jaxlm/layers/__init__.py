"""Layers of models: Flax linen modules and the functions they are made of."""

from jaxlm.layers.attend import Filled, KeyValues, Mask, Visible, attend, attend_with_weights
from jaxlm.layers.attention import Attention, AttentionInputs
from jaxlm.layers.context import Context, Edit, ExtraKeys, Probe, Tap
from jaxlm.layers.embedding import Embedding, Head
from jaxlm.layers.kv_cache import KVCache, init_cache
from jaxlm.layers.linear import Linear
from jaxlm.layers.mlp import ACTIVATIONS, MLP
from jaxlm.layers.norms import LayerNorm, RMSNorm
from jaxlm.layers.params import vector, weight
from jaxlm.layers.rotary import RopeScaling

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Attention",
    "AttentionInputs",
    "Context",
    "Edit",
    "Embedding",
    "ExtraKeys",
    "Filled",
    "Head",
    "KVCache",
    "KeyValues",
    "LayerNorm",
    "Linear",
    "Mask",
    "Probe",
    "RMSNorm",
    "RopeScaling",
    "Tap",
    "Visible",
    "attend",
    "attend_with_weights",
    "init_cache",
    "vector",
    "weight",
]
