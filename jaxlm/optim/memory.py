"""How much memory an optimizer's state takes, by formula: nothing is allocated or traced."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jaxlm.core.errors import ConfigError, nearest
from jaxlm.core.trees import named_leaves
from jaxlm.optim import roles
from jaxlm.optim.eight_bit import EIGHT_BIT_ROLES
from jaxlm.optim.normalized import HEAD_ROLES, NORMALIZED_ROLES


def state_bytes(
    name: str,
    params: Any,
    axes: Any,
    *,
    rank: int = 128,
    history: int = 20,
    side: str = "smaller",
    momentum_roles: roles.Predicate | tuple[str, ...] = HEAD_ROLES,
    muon_roles: roles.Predicate | tuple[str, ...] = ("matrix",),
    block: int = 256,
    min_size: int = 4096,
) -> int:
    """Bytes of the state that an optimizer of `OptimizerConfig` keeps for these parameters.

    Left out are the scalars: counters, constants, and norms of matrices that are not stacked.

    Moments, bases and histories have the dtype of their parameter; norms and scales of blocks are float32.

    Args:
      name: of the optimizer.
      params: arrays or `ShapeDtypeStruct`s, possibly without frozen leaves.
      axes: the tree of their logical axis names.
      rank, history, side, momentum_roles, muon_roles, block, min_size: as in the optimizers that have them.

    Raises:
      ConfigError: an unknown name.
    """
    if name not in STATES:
        raise ConfigError(f"no optimizer '{name}': {nearest(name, STATES)}")
    options = {
        "rank": 1 if name == "apollo_mini" else rank,
        "history": history,
        "side": side,
        "momentum": roles.as_predicate(momentum_roles),
        "muon": roles.as_predicate(muon_roles),
        "block": block,
        "min_size": min_size,
    }
    of_path = dict(named_leaves(roles.label(params, axes)))
    own = dict(named_leaves(roles.own_ndim(params, axes)))
    total = 0
    for path, p in named_leaves(params):
        elements, more = STATES[name](path, of_path[path], p.shape, own[path], options)
        total += elements * jnp.dtype(p.dtype).itemsize + more
    return total


def model_bytes(name: str, params: Any, axes: Any, **options: Any) -> int:
    """Bytes of parameters and optimizer state together: the memory that the papers' tables state."""
    weights = sum(math.prod(p.shape) * jnp.dtype(p.dtype).itemsize for _, p in named_leaves(params))
    return weights + state_bytes(name, params, axes, **options)


# Each says, of one parameter: elements of state in its own dtype, and bytes of everything else.
Size = tuple[int, int]
Rule = Callable[[str, str, tuple[int, ...], int, dict], Size]


def _adam(path: str, role: str, shape: tuple[int, ...], own: int, options: dict) -> Size:
    return 2 * math.prod(shape), 0


def _muon(path: str, role: str, shape: tuple[int, ...], own: int, options: dict) -> Size:
    return (1 if options["muon"](path, role) else 2) * math.prod(shape), 0


def _scale(path: str, role: str, shape: tuple[int, ...], own: int, options: dict) -> Size:
    if role not in NORMALIZED_ROLES:
        return 2 * math.prod(shape), 0
    return math.prod(shape) if options["momentum"](path, role) else 0, 0


def _swan(path: str, role: str, shape: tuple[int, ...], own: int, options: dict) -> Size:
    return (0 if role == "matrix" else 2 * math.prod(shape)), 0


def _low_rank(bases: bool, history: bool, norms: bool) -> Rule:
    def rule(path: str, role: str, shape: tuple[int, ...], own: int, options: dict) -> Size:
        if role != "matrix":
            return 2 * math.prod(shape), 0
        *leading, rows, columns = shape
        count, rank = math.prod(leading), options["rank"]
        projected = {
            "smaller": [min(rows, columns)],
            "larger": [max(rows, columns)],
            "both": [rows, columns],
        }[options["side"]]
        image = rank * (rank if options["side"] == "both" else rows + columns - projected[0])
        each = 2 * image + (rank * sum(projected) if bases else 0) + (options["history"] * image if history else 0)
        return count * each, 4 * count if norms and leading else 0

    return rule


def _stable_spam(path: str, role: str, shape: tuple[int, ...], own: int, options: dict) -> Size:
    leading = shape[: len(shape) - own]
    return 2 * math.prod(shape), 3 * 4 * math.prod(leading) if leading else 0


def _eight_bit(path: str, role: str, shape: tuple[int, ...], own: int, options: dict) -> Size:
    if role not in EIGHT_BIT_ROLES or math.prod(shape[-2:]) < options["min_size"]:
        return 2 * math.prod(shape), 0
    blocks = math.prod(shape[:-1]) * -(-shape[-1] // options["block"])
    return 0, 2 * math.prod(shape) + 2 * 4 * blocks


def _cast(path: str, role: str, shape: tuple[int, ...], own: int, options: dict) -> Size:
    return 2 * math.prod(shape), math.prod(shape) if role == "matrix" else 0


STATES: dict[str, Rule] = {
    "adamw": _adam,
    "muon": _muon,
    "scale": _scale,
    "swan": _swan,
    "galore": _low_rank(bases=True, history=False, norms=False),
    "natural_galore": _low_rank(bases=True, history=True, norms=False),
    "fira": _low_rank(bases=True, history=False, norms=True),
    "apollo": _low_rank(bases=False, history=False, norms=True),
    "apollo_mini": _low_rank(bases=False, history=False, norms=True),
    "spam": _adam,
    "stable_spam": _stable_spam,
    "adamw_8bit": _eight_bit,
    "cast": _cast,
}
"""By name of the optimizer, the rule for one parameter."""
