"""Operations that change a trained model's shape."""

from jaxlm.surgery.widen import widen_by_tiling

__all__ = ["widen_by_tiling"]
