"""Trees of arrays: names of leaves, splitting into trained and frozen parts, counting.

A path is a string such as `"blocks/0/attention/query/kernel"`. A partition is two trees of the structure of the
whole with `None` where the other tree holds the leaf, so Optax and `jax.grad` see only what is trained.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jaxlm.core.errors import ConfigError

PyTree = Any


def path_name(path: tuple) -> str:
    """The name of a key path from `jax.tree_util`, its parts joined by `/`."""
    return "/".join(_key_name(key) for key in path)


def _key_name(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case GetAttrKey(name=name):
            return name
    return str(key)


def named_leaves(tree: PyTree, is_leaf: Callable | None = None) -> Iterator[tuple[str, Any]]:
    """`(path, leaf)` of every leaf, in the tree's order."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]:
        yield path_name(path), leaf


def map_named(fn: Callable, tree: PyTree, *rest: PyTree, is_leaf: Callable | None = None) -> PyTree:
    """`jax.tree.map` whose function gets the path first: `fn(path, leaf, *rest_leaves)`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: fn(path_name(path), *leaves), tree, *rest, is_leaf=is_leaf
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenRows:
    """The frozen layers of a stacked leaf of which other layers are trained.

    `rows`: `[frozen, ...]`, the layers where `trained` (one bool a layer) is false, in order.
    """

    rows: jax.Array
    trained: tuple[bool, ...] = dataclasses.field(metadata={"static": True})


def partition(tree: PyTree, predicate: Callable[[str, str], Any], roles: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree of arrays into `(trainable, frozen)`; `merge` is the inverse.

    `predicate(path, role)` returns a bool, or one bool a layer for a leaf with a leading layer axis: then the
    trained layers alone go into `trainable`, so what is frozen has neither gradient, optimizer state nor decay.
    `roles` is a tree of the same structure whose leaves are role names (`jaxlm.optim.roles`).
    """

    def choose(path: str, leaf: Any, role: str) -> tuple:
        wanted = predicate(path, role)
        if isinstance(wanted, (bool, np.bool_)):
            return (leaf, None) if wanted else (None, leaf)
        wanted = tuple(bool(w) for w in wanted)
        if len(wanted) != leaf.shape[0]:
            raise ConfigError(f"{path}: {len(wanted)} layers were chosen from, but it has {leaf.shape[0]}")
        if all(wanted):
            return leaf, None
        if not any(wanted):
            return None, leaf
        mask = np.array(wanted)
        return leaf[np.flatnonzero(mask)], FrozenRows(leaf[np.flatnonzero(~mask)], wanted)

    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    pairs = [choose(path_name(p), x, r) for (p, x), r in zip(leaves, treedef.flatten_up_to(roles), strict=True)]
    return treedef.unflatten([t for t, _ in pairs]), treedef.unflatten([f for _, f in pairs])


def merge(trainable: PyTree, frozen: PyTree, step: Any = None) -> PyTree:
    """The whole tree of a partition; `frozen=None` means that all of it is trained.

    This is the default `build` of a training step (others may change with `step`).
    """
    del step
    if frozen is None:
        return trainable

    def join(a: Any, b: Any) -> Any:
        if isinstance(b, FrozenRows):
            mask = np.array(b.trained)
            whole = jnp.zeros((len(mask), *a.shape[1:]), a.dtype)
            return whole.at[np.flatnonzero(mask)].set(a).at[np.flatnonzero(~mask)].set(b.rows)
        return b if a is None else a

    return jax.tree.map(join, trainable, frozen, is_leaf=lambda x: x is None or isinstance(x, FrozenRows))


def pick(tree: PyTree, chosen: Callable[[str], bool] | None = None) -> tuple[dict[str, Any], Callable[[dict], PyTree]]:
    """The leaves whose path is chosen (all by default), by path, and a function that puts such leaves back.

    `put_back(leaves)` is the tree with these in place of those picked: what a probe differentiates by is its argument.

    Raises `ConfigError` if nothing is chosen.
    """
    picked = {path: leaf for path, leaf in named_leaves(tree) if chosen is None or chosen(path)}
    if not picked:
        raise ConfigError(f"no parameter is chosen of {', '.join(path for path, _ in named_leaves(tree))}")
    return picked, lambda leaves: map_named(lambda path, leaf: leaves.get(path, leaf), tree)


def count(tree: PyTree) -> int:
    """The number of array elements in a tree (of arrays or `ShapeDtypeStruct`s)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: PyTree) -> int:
    """The bytes that the arrays of a tree take; sub-byte types count their packed size."""

    def leaf_bytes(leaf: Any) -> int:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return math.prod(leaf.shape) * np.dtype(np.uint32).itemsize * 2
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            bits = jnp.iinfo(leaf.dtype).bits
        elif jnp.issubdtype(leaf.dtype, jnp.floating):
            bits = jnp.finfo(leaf.dtype).bits
        else:
            bits = leaf.dtype.itemsize * 8
        return math.ceil(math.prod(leaf.shape) * bits / 8)

    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def fingerprint(tree: PyTree) -> str:
    """A hash of the paths, shapes, formats and bytes of a tree's arrays.

    Of arrays that other processes hold parts of, the bytes are left out.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in named_leaves(tree):
        digest.update(f"{path} {leaf.shape} {leaf.dtype}".encode())
        if getattr(leaf, "is_fully_addressable", True):
            digest.update(np.ascontiguousarray(jax.device_get(leaf)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
