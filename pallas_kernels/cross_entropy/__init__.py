"""Cross-entropy over a vocabulary whose logits never exist at once."""

from pallas_kernels.cross_entropy.api import IMPLEMENTATIONS, cross_entropy, why_not
from pallas_kernels.cross_entropy.sharded import Shards
from pallas_kernels.target import KernelError

__all__ = ["IMPLEMENTATIONS", "KernelError", "Shards", "cross_entropy", "why_not"]
