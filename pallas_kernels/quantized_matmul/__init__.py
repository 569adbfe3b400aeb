"""Products with matrices that are stored in 4 to 8 bits a weight."""

from pallas_kernels.quantized_matmul.api import IMPLEMENTATIONS, quantized_matmul
from pallas_kernels.quantized_matmul.layout import BITS, Packed, dequantize, pack
from pallas_kernels.quantized_matmul.sharded import Shards
from pallas_kernels.target import KernelError

__all__ = ["BITS", "IMPLEMENTATIONS", "KernelError", "Packed", "Shards", "dequantize", "pack", "quantized_matmul"]
