"""What each parameter is for: roles read from logical axis names, and masks and labels chosen by role.

Parameters come with a second tree of logical axis names, one tuple a leaf, such as `("layers", "embed",
"mlp")`. A role says which part a leaf plays; optimizers, weight decay and adapters select by role, never by
the number
of dimensions: a stack of kernels `(layers, in, out)` has three axes, a stack of norm scales `(layers, embed)`
has two, like an embedding `(vocab, embed)`.

| axes, after the leading `layers` and `experts` | role |
|---|---|
| any with `codebook`, `filter`, `conv_width` | `codebook`, `filter`, `conv` |
| last is `router` | `router` |
| `("tied_vocab", x)`: one table for input and output | `tied` |
| `("vocab", x)`, `("positions", x)` | `embed` |
| `(x, "vocab")` | `head` |
| none or one; any with `scale_groups` | `vector` |
| any other two | `matrix` |

Anything else is a `ConfigError`.
"""

from collections.abc import Callable, Collection
from typing import Any

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.sharding import is_axes
from jaxlm.core.trees import map_named, named_leaves

ROLES = ("embed", "head", "tied", "matrix", "vector", "router", "conv", "filter", "codebook")

LEADING_AXES = ("layers", "experts")
"""Axes over which one parameter is a stack of independent ones; every method maps over them."""

Axes = tuple[str | None, ...]
Predicate = Callable[[str, str], bool]
"""Chooses leaves by `(path, role)`, as in `lambda path, role: role == "matrix" and "mlp" in path`."""


def role(axes: Axes, path: str = "parameter") -> str:
    """The role of one leaf from its logical axis names. `path` names the leaf in the error."""
    for kind, name in (("codebook", "codebook"), ("filter", "filter"), ("conv", "conv_width")):
        if name in axes:
            return kind
    if "scale_groups" in axes:
        return "vector"
    if axes and axes[-1] == "router":
        return "router"
    own = axes
    while own and own[0] in LEADING_AXES:
        own = own[1:]
    if any(name in LEADING_AXES for name in own):
        raise ConfigError(f"{path}: axes {axes} have a stacking axis {LEADING_AXES} after another axis")
    if len(own) > 2:
        raise ConfigError(
            f"{path}: no role for axes {axes}: expected at most two after {LEADING_AXES}, "
            "or one of 'conv_width', 'filter', 'codebook', or 'router' last"
        )
    if len(own) < 2:
        return "vector"
    first, last = own
    if last in ("vocab", "tied_vocab"):
        if first in ("vocab", "tied_vocab"):
            raise ConfigError(f"{path}: no role for axes {axes}: two vocabulary axes")
        if last == "tied_vocab":
            raise ConfigError(f"{path}: no role for axes {axes}: a tied table is ('tied_vocab', features)")
        return "head"
    return {"tied_vocab": "tied", "vocab": "embed", "positions": "embed"}.get(first, "matrix")


def roles(axes: Any) -> Any:
    """A tree of role names from a tree of logical axis names.

    Args:
      axes: a tree whose leaves are tuples of `str | None`.

    Raises:
      ConfigError: a leaf has no role; the message names its path.
    """
    return map_named(lambda path, leaf: role(leaf, path), axes, is_leaf=is_axes)


def label(params: Any, axes: Any) -> Any:
    """The role of every array in `params`, in the structure of `params`.

    `params` may hold fewer leaves than `axes`: what is frozen is `None` or `optax.MaskedNode()` there, and
    has no label. With `optax.partition`: `partition({"matrix": ..., ...}, lambda params: label(params,
    axes))`.

    Raises:
      ConfigError: an array in `params` has no axes at the same path.
    """
    return select(params, axes, lambda path, role: role)


def mask(params: Any, axes: Any, chosen: Predicate | Collection[str]) -> Any:
    """True for every array in `params` that is chosen, in the structure of `params`.

    Args:
      params: parameters, gradients or updates, possibly without their frozen leaves.
      axes: the tree of logical axis names.
      chosen: a predicate on `(path, role)`, or the roles to choose.

    Raises:
      ConfigError: an unknown role is named, or an array has no axes at the same path.
    """
    return select(params, axes, as_predicate(chosen))


def own_ndim(params: Any, axes: Any) -> Any:
    """How many of each array's axes are its own, without the leading `layers` and `experts`, as `params`."""

    def own(names: Axes) -> int:
        return next((len(names) - i for i, name in enumerate(names) if name not in LEADING_AXES), 0)

    known = {path: own(names) for path, names in named_leaves(axes, is_leaf=is_axes)}
    return select(params, axes, lambda path, role: known[path])


def as_predicate(chosen: Predicate | Collection[str]) -> Predicate:
    """A predicate on `(path, role)` from one, or from a collection of roles (each checked)."""
    if callable(chosen):
        return chosen
    if isinstance(chosen, str):
        chosen = (chosen,)
    for name in chosen:
        if name not in ROLES:
            raise ConfigError(f"no role '{name}': {nearest(name, ROLES)}")
    return lambda path, role: role in chosen


def select(params: Any, axes: Any, choose: Callable[[str, str], Any]) -> Any:
    """`choose(path, role)` of every array in `params`, in the structure of `params`."""
    known = dict(named_leaves(axes, is_leaf=is_axes))

    def one(path, leaf):
        if path not in known:
            raise ConfigError(f"no logical axes for parameter '{path}': {nearest(path, known)}")
        return choose(path, role(known[path], path))

    return map_named(one, params)
