"""Roles from axis names: the whole table of the convention, errors by path, masks over partial trees."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.optim import roles

TABLE = {
    ("vocab", "embed"): "embed",
    ("tied_vocab", "embed"): "tied",
    ("embed", "vocab"): "head",
    ("layers", "embed", "vocab"): "head",
    ("positions", "embed"): "embed",
    ("layers", "embed", "mlp"): "matrix",
    ("layers", "experts", "embed", "mlp"): "matrix",
    ("embed", "mlp"): "matrix",
    ("layers", None, "mlp"): "matrix",
    ("layers", "embed"): "vector",
    ("layers", "experts", "mlp"): "vector",
    ("embed",): "vector",
    ("layers",): "vector",
    (): "vector",
    ("layers", "embed", "router"): "router",
    ("layers", "router"): "router",
    ("layers", "conv_width", "embed"): "conv",
    ("conv_width", "conv_width", "embed", "mlp"): "conv",
    ("layers", "filter", "embed"): "filter",
    ("codebook", "entries", "embed"): "codebook",
}


@pytest.mark.parametrize(("axes", "expected"), TABLE.items(), ids=str)
def test_role_of_axes(axes, expected):
    assert roles.role(axes) == expected


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (("layers", "embed", "heads", "head_dim"), "at most two"),
        (("embed", "layers", "mlp"), "stacking axis"),
        (("layers", "embed", "experts"), "stacking axis"),
        (("vocab", "vocab"), "two vocabulary axes"),
        (("embed", "tied_vocab"), "tied table"),
    ],
)
def test_axes_without_a_role_are_an_error_that_names_the_path(axes, words):
    with pytest.raises(ConfigError, match=f"blocks/attention/query.*{words}"):
        roles.roles({"blocks": {"attention": {"query": axes}}, "norm": ("embed",)})


def test_roles_keep_the_structure_of_the_tree():
    axes = {
        "a": ("vocab", "embed"),
        "runs": [{"w": ("layers", "embed", "mlp")}, {"scale": ("layers", "embed")}],
    }
    assert roles.roles(axes) == {"a": "embed", "runs": [{"w": "matrix"}, {"scale": "vector"}]}


def test_labels_follow_trees_from_which_frozen_leaves_are_missing():
    axes = {"embed": ("vocab", "embed"), "w": ("layers", "embed", "mlp"), "scale": ("embed",)}
    params = {"embed": None, "w": jnp.ones((2, 3, 4)), "scale": optax.MaskedNode()}
    labels = roles.label(params, axes)
    assert labels == {"embed": None, "w": "matrix", "scale": optax.MaskedNode()}
    assert jax.tree.structure(labels) == jax.tree.structure(params)


def test_mask_by_roles_and_by_a_predicate_on_path_and_role():
    axes = {"embed": ("vocab", "embed"), "mlp": {"up": ("embed", "mlp")}, "attn": {"q": ("embed", "heads")}}
    params = jax.tree.map(lambda a: jnp.zeros([2] * len(a)), axes, is_leaf=roles.is_axes)
    assert roles.mask(params, axes, ("matrix",)) == {"embed": False, "mlp": {"up": True}, "attn": {"q": True}}
    chosen = roles.mask(params, axes, lambda path, role: role == "matrix" and path.startswith("mlp/"))
    assert chosen == {"embed": False, "mlp": {"up": True}, "attn": {"q": False}}


def test_unknown_role_and_missing_axes_are_named():
    params = {"w": jnp.zeros((2, 2))}
    with pytest.raises(ConfigError, match="no role 'matrx': did you mean 'matrix'"):
        roles.mask(params, {"w": ("embed", "mlp")}, ("matrx",))
    with pytest.raises(ConfigError, match="no logical axes for parameter 'w'"):
        roles.mask(params, {"v": ("embed", "mlp")}, ("matrix",))
