"""Pallas kernels for TPUs and GPUs, each with a plain JAX reference and a dispatcher. Needs `jax` and `numpy` alone.

    from pallas_kernels import flash_attention, flash_decode
    from pallas_kernels.quantized_matmul import quantized_matmul
    from pallas_kernels.cross_entropy import cross_entropy
"""

import importlib
from typing import Any

# Imported when asked for: Pallas takes a second.
_HOMES = {
    "flash_attention": "attention",
    "flash_attention_ring": "attention",
    "flash_attention_sharded": "attention",
    "flash_decode": "attention",
    "flash_decode_sharded": "attention",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
