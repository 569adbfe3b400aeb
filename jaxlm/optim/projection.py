"""Low-rank projections of gradients, shared by GaLore and its relatives.

A gradient `G` `(leading..., in, out)` is seen through thin matrices: `rows` `(leading..., in, rank)` on its input
side, `columns` `(leading..., out, rank)` on its output side, or both. Its image is `rows^T G` `(rank, out)`,
`G columns` `(in, rank)`, or `rows^T G columns`. Where both sides are equally long the input side is projected.

A basis is replaced when the caller's `step` is a multiple of the period, for all leaves under one `lax.cond`.
Before that it is the first `rank` unit vectors, so that a run that starts between two refreshes trains too. A
training step that is skipped, its gradient not being finite, leaves the basis as it was until the next refresh.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import keys
from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.linalg import leading_singular_vectors, random_orthonormal
from jaxlm.optim import wiring

Side = Literal["smaller", "larger", "both"]
SIDES = ("smaller", "larger", "both")
REFRESHES = ("svd", "gaussian", "orthogonal")


class Bases(NamedTuple):
    """Two trees in the structure of the parameters, with None where a side is not projected."""

    rows: Any
    columns: Any


@dataclasses.dataclass(frozen=True)
class Projection:
    """How gradients are projected.

    `refresh`: `svd`: leading singular vectors of the gradient; `orthogonal`: random orthonormal vectors; `gaussian`:
    independent entries of variance `1 / rank`, whose products are right in expectation only.

    Raises:
      ConfigError: rank or period below 1, unknown names; at `init`, a rank larger than a matrix.
    """

    rank: int
    period: int = 200
    side: Side = "smaller"
    refresh: Literal["svd", "gaussian", "orthogonal"] = "svd"
    seed: int = 0

    def __post_init__(self):
        wiring.check_count("rank", self.rank)
        wiring.check_count("period", self.period)
        for name, value, valid in (("side", self.side, SIDES), ("refresh", self.refresh, REFRESHES)):
            if value not in valid:
                raise ConfigError(f"{name} is '{value}': {nearest(str(value), valid)}")

    def init(self, params: Any) -> Bases:
        """The bases before the first refresh: unit vectors, in the dtype of each parameter."""

        def unit(p: Array, axis: int) -> Array:
            eye = jnp.eye(p.shape[axis], self.rank, dtype=p.dtype)
            return jnp.broadcast_to(eye, (*p.shape[:-2], *eye.shape))

        self.check(params)
        return self._map(
            params, lambda path, p, sides: tuple(unit(p, axis) if axis in sides else None for axis in _AXES)
        )

    def check(self, params: Any) -> None:
        """Raises `ConfigError` naming a parameter that is not a matrix or is smaller than the rank."""
        paths, leaves, _ = wiring.zip_leaves(params)
        for path, (p,) in zip(paths, leaves, strict=True):
            if p.ndim < 2:
                raise ConfigError(f"{path} of shape {p.shape} cannot be projected: it is not a matrix")
            if self.rank > min(p.shape[-2:]):
                raise ConfigError(
                    f"rank {self.rank} is larger than {path}, whose matrices are {p.shape[-2]} x {p.shape[-1]}"
                )

    def refreshed(self, bases: Bases, gradients: Any, step: Array) -> Bases:
        """New bases if `step` is a multiple of the period, else the same; one `lax.cond` for all leaves."""
        return jax.lax.cond(
            step % self.period == 0,
            lambda: jax.tree.map(lambda new, old: new.astype(old.dtype), self._fresh(gradients, step), bases),
            lambda: bases,
        )

    def draw(self, gradients: Any, step: Array) -> Bases:
        """The random bases of this step, made anew instead of kept; the same ones for a whole period."""

        def one(path: str, g: Array, sides: tuple) -> tuple:
            key = keys.fold(jax.random.key(self.seed), "projection", path, step // self.period)
            return tuple(
                self._random(keys.fold(key, axis + 2), (*g.shape[:-2], g.shape[axis], self.rank))
                if axis in sides
                else None
                for axis in _AXES
            )

        return self._map(gradients, one)

    def project(self, g: Array, rows: Array | None, columns: Array | None) -> Float[Array, "..."]:
        """The image of one gradient. Float32."""
        x = g.astype(jnp.float32)
        x = x if rows is None else rows.astype(jnp.float32).mT @ x
        return x if columns is None else x @ columns.astype(jnp.float32)

    def back(self, r: Array, rows: Array | None, columns: Array | None) -> Float[Array, "*batch in out"]:
        """The matrix in the original space that an image stands for. Float32."""
        x = r.astype(jnp.float32)
        x = x if rows is None else rows.astype(jnp.float32) @ x
        return x if columns is None else x @ columns.astype(jnp.float32).mT

    def image_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the image of a gradient of this shape."""
        sides = self.sides(shape)
        return (*shape[:-2], *(self.rank if axis in sides else shape[axis] for axis in _AXES))

    def zeros(self, params: Any) -> Any:
        """Images of zero, in the dtype of each parameter: what moments start from."""
        return jax.tree.map(lambda p: jnp.zeros(self.image_shape(p.shape), p.dtype), params)

    def sides(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The projected axes, -2 and -1, of a gradient of this shape."""
        if self.side == "both":
            return _AXES
        input_side = (shape[-2] <= shape[-1]) == (self.side == "smaller")
        return (-2,) if input_side else (-1,)

    def _fresh(self, gradients: Any, step: Array) -> Bases:
        if self.refresh != "svd":
            return self.draw(gradients, step)
        names = {(-2,): "rows", (-1,): "columns", _AXES: "both"}
        return self._map(gradients, lambda path, g, sides: leading_singular_vectors(g, self.rank, names[sides]))

    def _random(self, key: Array, shape: tuple[int, ...]) -> Array:
        if self.refresh == "gaussian":
            return jax.random.normal(key, shape, jnp.float32) * self.rank**-0.5
        return random_orthonormal(key, shape)

    def _map(self, tree: Any, make: Any) -> Bases:
        paths, leaves, treedef = wiring.zip_leaves(tree)
        pairs = [make(path, leaf, self.sides(leaf.shape)) for path, (leaf,) in zip(paths, leaves, strict=True)]
        return Bases(*(treedef.unflatten([pair[i] for pair in pairs]) for i in (0, 1)))


_AXES = (-2, -1)
