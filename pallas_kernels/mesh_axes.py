"""On which axes of a mesh the axes of arrays lie: kernels must be told, since XLA cannot divide one."""

import math
from collections.abc import Sequence
from typing import Any

import jax

Axes = str | tuple[str, ...] | None
"""One mesh axis, several, or none."""


def names(axes: str | Sequence[str] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def parts(axes: str | Sequence[str] | None, mesh: Any = None) -> int:
    """Into how many parts the mesh (by default the ambient one) cuts an axis that lies on these."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(mesh.shape[name] for name in names(axes))


def why_not(shards: Any, *axes: Axes) -> str | None:
    """Why arrays cannot lie on these axes of the ambient mesh together (a phrase for an error), or `None`."""
    mesh = jax.sharding.get_abstract_mesh()
    used = [name for part in axes for name in names(part)]
    if len(set(used)) < len(used) or set(used) - set(mesh.shape):
        return f"{shards}: axes that repeat or are not of the mesh {dict(mesh.shape)}"
    return None


def dividing(rows: tuple[Axes, ...], shape: Sequence[int]) -> tuple[Axes, ...]:
    """One entry for each axis of `shape`: that of `rows`, or `None` where there is none or it does not divide."""
    given = (*rows, *(None,) * len(shape))[: len(shape)]
    return tuple(None if size % parts(part) else part for part, size in zip(given, shape, strict=True))
