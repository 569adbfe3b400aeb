"""Pruning a whole model: what is masked, gradients through masks, folding factors in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.compression import (
    add_group_scales,
    apply_masks,
    fold_and_prune,
    magnitude_masks,
    straight_through,
    wanda_masks,
)
from jaxlm.compression.sparsity import magnitudes
from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.core.sparsity import satisfies_nm
from jaxlm.models import Decoder
from jaxlm.models.config import DecoderConfig
from jaxlm.optim import roles
from jaxlm.peft.lora import adapted_axes

MODEL = Decoder(DecoderConfig(vocab_size=16, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, max_length=8))
TOKENS = jnp.arange(8)[None] % 16


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0))["params"]


def logits(params):
    return MODEL.apply({"params": params}, TOKENS)


def kernels(params):
    return {path: w for path, w in trees.named_leaves(params) if path.startswith("blocks/") and "kernel" in path}


def test_kernels_of_the_blocks_are_masked_and_nothing_else(params):
    masks = magnitude_masks(params)
    assert set(dict(trees.named_leaves(masks))) == set(kernels(params))
    assert len(kernels(params)) == 7
    pruned = apply_masks(params, masks)
    assert all(satisfies_nm(w) for w in kernels(pruned).values())
    jax.tree.map(np.testing.assert_array_equal, pruned["embedding"], params["embedding"])
    found = magnitudes(params, masks)
    assert found["masked"] < found["kept"]
    assert magnitudes(pruned, masks)["masked"] == 0


def test_gradients_through_masks(params):
    masks = magnitude_masks(params)
    path = "blocks/0/mlp/up/kernel"

    def grad(through):
        g = jax.grad(lambda p: jnp.sum(logits(through(p, masks)) ** 2))(params)
        return dict(trees.named_leaves(g))[path]

    mask = dict(trees.named_leaves(masks))[path]
    hard, soft = grad(apply_masks), grad(straight_through)
    assert np.all(np.asarray(hard)[~np.asarray(mask)] == 0)
    assert np.all(np.asarray(soft)[~np.asarray(mask)] != 0)
    np.testing.assert_allclose(np.asarray(soft)[np.asarray(mask)], np.asarray(hard)[np.asarray(mask)], rtol=1e-5)
    np.testing.assert_allclose(logits(straight_through(params, masks)), logits(apply_masks(params, masks)), atol=1e-5)


def test_factors_leave_the_model_as_it_was_and_fold_away_without_a_trace(params):
    scaled = add_group_scales(params, groups=2)
    np.testing.assert_allclose(logits(scaled), logits(params), rtol=1e-6)

    def shake(path, x):
        return x + 0.1 * jax.random.normal(jax.random.key(1), x.shape) if path.endswith("kernel/scale") else x

    shaken = trees.map_named(shake, scaled)
    masks = magnitude_masks(shaken)
    folded = fold_and_prune(shaken)
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    np.testing.assert_allclose(logits(folded), logits(apply_masks(shaken, masks)), rtol=1e-5, atol=1e-6)
    assert all(satisfies_nm(w) for w in kernels(folded).values())
    assert np.abs(logits(folded) - logits(fold_and_prune(params))).max() > 1e-3


def test_factors_are_vectors_to_optimizers(params):
    scaled = add_group_scales(params)
    labels = dict(trees.named_leaves(roles.label(scaled, adapted_axes(scaled, MODEL.axes()))))
    assert labels["blocks/0/mlp/up/kernel/base"] == "matrix"
    assert labels["blocks/0/mlp/up/kernel/scale"] == "vector"


def test_wanda_weighs_inputs(params):
    norms = {path: jnp.ones(w.shape[:-1]) for path, w in kernels(params).items()}
    same = wanda_masks(params, norms)
    jax.tree.map(np.testing.assert_array_equal, same, magnitude_masks(params))
    path = "blocks/0/mlp/up/kernel"
    norms[path] = norms[path].at[:, 0].set(1e6)
    assert dict(trees.named_leaves(wanda_masks(params, norms)))[path][:, 0].all()
    with pytest.raises(ConfigError, match="no input norms of blocks/0"):
        wanda_masks(params, {})


def test_what_cannot_be_pruned_is_refused_by_name(params):
    with pytest.raises(ConfigError, match="blocks/0/.*/kernel of shape .* has 16 inputs, which groups of 5"):
        magnitude_masks(params, 1, 5)
    with pytest.raises(ConfigError, match="3 groups of multiples of 4 do not divide"):
        add_group_scales(params, groups=3)
    with pytest.raises(ConfigError, match="no kernel is chosen"):
        magnitude_masks({"embedding": {"table": jnp.ones((4, 4))}})
