"""Models from elsewhere, in and out."""

from jaxlm.interop.load import load
from jaxlm.interop.pretrained import Pretrained

__all__ = ["Pretrained", "load"]
