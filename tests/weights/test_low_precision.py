"""Which kernels a policy is put on, and what rides along with them. Products are `test_quantized_dot.py`'s."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import weights
from jaxlm.core.errors import ConfigError
from jaxlm.core.policies import PrecisionPolicy, precision_policy
from jaxlm.weights import LowPrecision, add_low_rank, factored_kernel, quantized_matmul, under_policy

KEY = jax.random.key(0)


def kernels():
    return {"up": jax.random.normal(KEY, (3, 8, 16)), "down": jax.random.normal(KEY, (3, 16, 8)), "norm": jnp.ones(8)}


def test_chosen_kernels_alone_follow_the_policy_each_layer_with_a_key_of_its_own():
    params = under_policy(kernels(), ["up"], precision_policy("mxfp4_stochastic"), key=KEY)
    assert isinstance(params["up"], LowPrecision)
    assert not isinstance(params["down"], LowPrecision)
    assert params["up"].shape == (3, 8, 16)
    assert params["up"].key.shape == (3,)
    assert len({tuple(np.asarray(jax.random.key_data(key))) for key in params["up"].key}) == 3
    axes = weights.child_axes(params["up"], ("layers", "embed", "mlp"))
    assert (axes.base, axes.key, axes.scales) == (("layers", "embed", "mlp"), ("layers",), None)


def test_products_are_the_policys_and_transposed_ones_too():
    policy = precision_policy("fp8_current")
    w = under_policy(kernels(), ["up"], policy)["up"]
    first = jax.tree.map(lambda a: a[0], w)
    x, y = jax.random.normal(KEY, (5, 8)), jax.random.normal(KEY, (5, 16))
    np.testing.assert_array_equal(weights.matmul(x, first), quantized_matmul(x, first.base, policy))
    np.testing.assert_array_equal(weights.matmul_transposed(y, first), quantized_matmul(y, first.base.T, policy))
    np.testing.assert_array_equal(weights.dense(first), first.base)


def test_the_base_of_an_adapter_follows_the_policy():
    low = add_low_rank(KEY, kernels()["up"], 2)
    found = under_policy({"up": low}, ["up"], precision_policy("int8_vector"))["up"]
    assert isinstance(found.base, LowPrecision)
    assert found.a is low.a


def test_weights_that_products_find_in_a_narrow_format_keep_their_gradient():
    policy = PrecisionPolicy("narrow", precision_policy("bfloat16").forward, weights="q3.13")
    w = under_policy({"w": jnp.full((4, 4), 1 / 3)}, ["w"], policy)["w"]
    gradient = jax.grad(lambda w: jnp.sum(weights.matmul(jnp.ones((2, 4)), w)))(w)
    np.testing.assert_array_equal(gradient.base, 2 * jnp.ones((4, 4)))
    alone = under_policy({"w": w.base}, ["w"], PrecisionPolicy("narrow", weights="q3.13"))["w"]
    np.testing.assert_array_equal(weights.matmul(jnp.ones((2, 4)), alone), jnp.full((2, 4), 4 * 2731 / 8192))


def test_what_cannot_follow_is_refused_by_name():
    policy = precision_policy("int8_vector")
    with pytest.raises(ConfigError, match="no kernel 'upp': did you mean 'up'"):
        under_policy(kernels(), ["upp"], policy)
    with pytest.raises(ConfigError, match="up is Factored: precision policy 'int8_vector' takes dense kernels"):
        under_policy({"up": factored_kernel(KEY, (8, 8), 2)}, ["up"], policy)
    w = under_policy(kernels(), ["up"], policy)["up"]
    with pytest.raises(ConfigError, match="'int8_vector' has no grouped products"):
        weights.grouped_matmul(jnp.ones((4, 8)), w, jnp.array([1, 2, 1]))
