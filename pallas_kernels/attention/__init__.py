"""Softmax attention that never holds all logits: TPU and Hopper kernels, a blocked plain JAX twin, and the reference.

    from pallas_kernels.attention import flash_attention, flash_decode, combine

    out = flash_attention(q, k, v, window=512, segment_ids=segment_ids)

`PALLAS_KERNELS_DEBUG=1` in the environment logs, at each trace, which implementation was taken and why no kernel was.
"""

from pallas_kernels.attention.api import IMPLEMENTATIONS, combine, flash_attention, flash_decode
from pallas_kernels.attention.errors import AttentionError, UnsupportedError
from pallas_kernels.attention.gpu_tables import GpuTiles
from pallas_kernels.attention.sharded import flash_attention_ring, flash_attention_sharded, flash_decode_sharded
from pallas_kernels.attention.tiles import Tiles
from pallas_kernels.attention.vjp import CHECKPOINT_NAMES

__all__ = [
    "CHECKPOINT_NAMES",
    "IMPLEMENTATIONS",
    "AttentionError",
    "GpuTiles",
    "Tiles",
    "UnsupportedError",
    "combine",
    "flash_attention",
    "flash_attention_ring",
    "flash_attention_sharded",
    "flash_decode",
    "flash_decode_sharded",
]
