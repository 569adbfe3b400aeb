"""Models from elsewhere, in and out."""

from jaxlm.interop.pretrained import Pretrained

__all__ = ["Pretrained"]
