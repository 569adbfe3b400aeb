import chex
import jax
import jax.numpy as jnp
import pytest

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.core.keys import fold
from jaxlm.core.precision import Precision

TREE = {"blocks": [{"w": jnp.arange(24.0).reshape(4, 3, 2), "b": jnp.ones((4, 2))}], "head": jnp.ones((2, 5))}
ROLES = {"blocks": [{"w": "matrix", "b": "vector"}], "head": "head"}


def test_paths_name_every_leaf():
    assert [path for path, _ in trees.named_leaves(TREE)] == ["blocks/0/b", "blocks/0/w", "head"]


@pytest.mark.parametrize(
    "predicate",
    [
        lambda path, role: True,
        lambda path, role: False,
        lambda path, role: role == "head",
        lambda path, role: [True, False, True, False] if path.startswith("blocks") else False,
        lambda path, role: [True] * 4 if role == "matrix" else [False] * 4 if role == "vector" else True,
    ],
)
def test_merge_inverts_partition(predicate):
    trainable, frozen = trees.partition(TREE, predicate, ROLES)
    chex.assert_trees_all_equal(trees.merge(trainable, frozen), TREE)
    assert trees.count(trainable) + trees.count(frozen) == trees.count(TREE)


def test_partition_by_layer_trains_those_layers_only():
    trainable, _ = trees.partition(
        TREE, lambda path, role: [False, True, True, False] if role == "matrix" else False, ROLES
    )
    chex.assert_trees_all_equal(trainable["blocks"][0]["w"], TREE["blocks"][0]["w"][1:3])
    assert trainable["head"] is None


def test_a_choice_of_too_few_layers_is_refused():
    with pytest.raises(ConfigError, match="blocks/0/b: 2 layers were chosen from, but it has 4"):
        trees.partition(TREE, lambda path, role: [True, False], ROLES)


def test_bytes_count_small_types_packed():
    tree = {"a": jax.ShapeDtypeStruct((3, 5), jnp.int4), "b": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}
    assert trees.num_bytes(tree) == 8 + 4
    narrow = {"a": jax.ShapeDtypeStruct((3, 5), jnp.float4_e2m1fn), "b": jax.ShapeDtypeStruct((3,), jnp.bool_)}
    assert trees.num_bytes(narrow) == 8 + 3


def test_named_keys_do_not_depend_on_the_order_of_calls():
    key = jax.random.key(0)
    assert (fold(key, "dropout", 3) == fold(fold(key, "dropout"), 3)).all()
    data = {tuple(jax.random.key_data(fold(key, name, i)).tolist()) for name in ("a", "b") for i in range(3)}
    assert len(data) == 6


def test_precision_refuses_unknown_formats():
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        Precision(activations="bf16")
    assert Precision(activations="bfloat16").matmul_dtype == jnp.bfloat16


def test_picked_leaves_are_put_back():
    picked, put_back = trees.pick(TREE, lambda path: path.endswith("w"))
    assert list(picked) == ["blocks/0/w"]
    chex.assert_trees_all_equal(put_back(picked), TREE)
    changed = put_back({"blocks/0/w": 2 * TREE["blocks"][0]["w"]})
    chex.assert_trees_all_equal(changed["blocks"][0]["w"], 2 * TREE["blocks"][0]["w"])
    chex.assert_trees_all_equal(changed["head"], TREE["head"])
    assert len(trees.pick(TREE)[0]) == 3
    with pytest.raises(ConfigError, match="no parameter is chosen of blocks/0/b"):
        trees.pick(TREE, lambda path: False)
