"""Pruning a model's kernels to N:M: masks from scores, forward passes through masks, folding CAST's factors in.

masks = magnitude_masks(params)                      # True where a weight stays, None where nothing is pruned
pruned = apply_masks(params, masks)                  # one-shot; or train on: `build` with frozen masks
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.core.sparsity import nm_mask
from jaxlm.weights import GroupScaled, Weight, add_group_scale

Chosen = Callable[[str], bool]


def in_blocks(path: str) -> bool:
    """Kernels of the blocks: what is pruned by default; embeddings, head and norms are not."""
    return path.startswith("blocks/") and path.endswith(("/kernel", "/kernel/base"))


def magnitude_masks(params: Any, n: int = 2, m: int = 4, chosen: Chosen = in_blocks) -> Any:
    """`nm_mask` of every chosen kernel's magnitudes, `None` elsewhere, in the structure of the parameters.

    The factors of `GroupScaled` kernels do not count: they are equal within a group. Raises `ConfigError` naming a
    kernel that groups do not divide, or when nothing is chosen.
    """
    return _masks(params, lambda path, w: jnp.abs(w), n, m, chosen)


def wanda_masks(params: Any, input_norms: Any, n: int = 2, m: int = 4, chosen: Chosen = in_blocks) -> Any:
    """Masks by `abs(w)` times the norm of each input's activations (Wanda, Sun et al. 2023, arXiv 2306.11695).

    `input_norms`: by the path of a kernel, `[..., in]` with the kernel's leading axes.
    """

    def score(path: str, w: Array) -> Array:
        if path not in input_norms:
            raise ConfigError(f"no input norms of {path}")
        if input_norms[path].shape != w.shape[:-1]:
            raise ConfigError(f"{path}: input norms have shape {input_norms[path].shape}, expected {w.shape[:-1]}")
        return jnp.abs(w) * input_norms[path][..., None]

    return _masks(params, score, n, m, chosen)


def apply_masks(params: Any, masks: Any) -> Any:
    """The parameters with zeros where a mask is false. Differentiable: what is masked has no gradient."""
    return _with_masks(params, masks, lambda w, mask: jnp.where(mask, w, 0))


def straight_through(params: Any, masks: Any) -> Any:
    """`apply_masks` in value, while every weight gets the gradient of its masked place (STE, Bengio et al. 2013)."""
    return _with_masks(params, masks, lambda w, mask: w + jax.lax.stop_gradient(jnp.where(mask, w, 0) - w))


def add_group_scales(params: Any, groups: int = 2, m: int = 4, chosen: Chosen = in_blocks) -> Any:
    """Every chosen kernel as a `GroupScaled` one, with factors 1.

    Raises `ConfigError` unless each of the `groups` holds whole groups of `m` inputs: else factors would decide masks.
    """
    done = 0

    def one(path: str, w: Any) -> Any:
        nonlocal done
        if not chosen(path):
            return w
        done += 1
        if w.shape[-2] % (groups * m):
            raise ConfigError(
                f"{path} has {w.shape[-2]} inputs: {groups} groups of multiples of {m} do not divide them"
            )
        return add_group_scale(w, groups)

    out = trees.map_named(one, params, is_leaf=_is_weight)
    return _unless_empty(out, done)


def fold_and_prune(params: Any, n: int = 2, m: int = 4, chosen: Chosen = in_blocks) -> Any:
    """Plain kernels: pruned by the magnitudes of their base, then times their factors. What CAST ends with."""
    masks = magnitude_masks(params, n, m, chosen)
    pruned = apply_masks(params, masks)
    return jax.tree.map(lambda w: w.dense() if isinstance(w, GroupScaled) else w, pruned, is_leaf=_is_weight)


def magnitudes(params: Any, masks: Any) -> dict[str, Float[Array, ""]]:
    """Mean magnitude of the `kept` and of the `masked` weights, over all kernels that have a mask."""
    sums = {name: [jnp.zeros(()), jnp.zeros(())] for name in ("kept", "masked")}
    named = dict(trees.named_leaves(masks))
    for path, w in trees.named_leaves(params):
        if path in named:
            for name, mask in (("kept", named[path]), ("masked", ~named[path])):
                sums[name][0] += jnp.sum(jnp.where(mask, jnp.abs(w), 0))
                sums[name][1] += jnp.sum(mask)
    return {name: total / jnp.maximum(count, 1) for name, (total, count) in sums.items()}


def _masks(params: Any, score: Callable[[str, Array], Array], n: int, m: int, chosen: Chosen) -> Any:
    done = 0

    def one(path: str, w: Any) -> Any:
        nonlocal done
        if not chosen(path):
            return None
        if isinstance(w, Weight):
            raise ConfigError(f"{path} is a {type(w).__name__}, expected a dense kernel: make it dense first")
        done += 1
        return nm_mask(score(path, w), n, m, path)

    found = trees.map_named(one, params, is_leaf=lambda x: isinstance(x, Weight) and not isinstance(x, GroupScaled))
    return _unless_empty(found, done)


def _with_masks(params: Any, masks: Any, fn: Callable[[Array, Array], Array]) -> Any:
    return jax.tree.map(lambda mask, w: w if mask is None else fn(w, mask), masks, params, is_leaf=lambda x: x is None)


def _unless_empty(tree: Any, done: int) -> Any:
    if not done:
        raise ConfigError("no kernel is chosen: paths of kernels begin with 'blocks/' and end in '/kernel'")
    return tree


def _is_weight(x: Any) -> bool:
    return isinstance(x, Weight)
