"""Taps, edits and extra keys, under scan, remat, cache and jit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.layers import Context, Edit, ExtraKeys, Mask, Tap
from jaxlm.models import layer
from jaxlm.testing import tiny_decoder

LAYERS, BATCH, LENGTH = 7, 2, 9


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def setup(request):
    model, params = tiny_decoder(request.param, num_layers=LAYERS)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (BATCH, LENGTH)), jnp.int32)
    return model, params, ids


def gram(x):
    rows = x.reshape(-1, x.shape[-1])
    return rows.T @ rows


def layer_inputs(model, params, ids):
    """The residual stream at every layer's start, by running layer ranges one at a time."""
    h, inputs = model.embed(params, ids), []
    for i in range(LAYERS):
        inputs.append(h)
        h = model.trunk(params, h, layers=(i, i + 1)).hidden
    return inputs


def test_taps_equal_an_unrolled_loop(setup):
    model, params, ids = setup
    sites = {"resid": Tap(gram), "mlp/down.input": Tap(gram), "attn_weights": Tap(lambda w: w)}
    run = jax.jit(lambda p: model.trunk(p, model.embed(p, ids), context=Context(taps=sites)))
    out = run(params)
    for i, h in enumerate(layer_inputs(model, params, ids)):
        chex.assert_trees_all_close(out.taps["resid"][i], gram(h), atol=1e-4, rtol=1e-4)
        # X^T X at the down projection, recomputed from the published formula of the block.
        one = model.trunk(params, h, layers=(i, i + 1), context=Context(taps={"mlp_in": Tap(lambda x: x)}))
        mlp = layer(params, i)["mlp"]
        x = one.taps["mlp_in"][0]
        act = jax.nn.silu if model.config.activation == "silu" else lambda v: jax.nn.gelu(v, approximate=True)
        hidden = act(x @ mlp["gate"]["kernel"]) * (x @ mlp["up"]["kernel"])
        chex.assert_trees_all_close(out.taps["mlp/down.input"][i], gram(hidden), atol=1e-4, rtol=1e-3)
    weights = out.taps["attn_weights"]
    assert weights.shape == (LAYERS, BATCH, 4, LENGTH, LENGTH)
    chex.assert_trees_all_close(weights.sum(-1), jnp.ones(weights.shape[:-1]), atol=1e-5)
    window = model.config.window
    for i, kind in enumerate(model.config.layer_kinds()):
        reach = LENGTH if kind.window is None else window
        seen = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH))
        assert bool((np.asarray(weights[i])[..., (seen < 0) | (seen >= reach)] == 0).all())


def test_attention_weight_taps_do_not_change_the_output(setup):
    model, params, ids = setup
    h = model.embed(params, ids)
    tapped = model.trunk(params, h, context=Context(taps={"attn_weights": Tap(jnp.sum)}))
    chex.assert_trees_all_close(tapped.hidden, model.trunk(params, h).hidden, atol=1e-5)


def test_taps_of_chosen_layers_keep_only_those(setup):
    model, params, ids = setup
    h = model.embed(params, ids)
    every = model.trunk(params, h, context=Context(taps={"attn_out": Tap(lambda x: x)})).taps["attn_out"]
    run = jax.jit(lambda p, h: model.trunk(p, h, context=Context(taps={"attn_out": Tap(lambda x: x, (5, 1))})))
    chex.assert_trees_all_close(run(params, h).taps["attn_out"], every[jnp.array([5, 1])], atol=1e-6)


def test_gradient_reaches_an_edit_and_matches_finite_differences(setup):
    model, params, ids = setup
    h = model.embed(params, ids)
    shape = (LAYERS, 1, 1, model.config.embed_dim)

    @jax.jit
    def loss(scale, shift):
        context = Context(edits={"mlp_out": Edit(scale, shift)})
        return jnp.mean(jnp.square(model.trunk(params, h, context=context).hidden))

    ones, zeros = jnp.ones(shape), jnp.zeros(shape)
    unchanged = jnp.mean(jnp.square(model.trunk(params, h).hidden))
    chex.assert_trees_all_close(loss(ones, zeros), unchanged, rtol=1e-5)
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(ones, zeros)
    for i in (0, LAYERS - 1):
        bump = zeros.at[i, 0, 0, 3].set(1e-2)
        numeric = (loss(ones, bump) - loss(ones, -bump)) / 2e-2
        np.testing.assert_allclose(grads[1][i, 0, 0, 3], numeric, rtol=0.05, atol=1e-5)
        numeric = (loss(ones + bump, zeros) - loss(ones - bump, zeros)) / 2e-2
        np.testing.assert_allclose(grads[0][i, 0, 0, 3], numeric, rtol=0.05, atol=1e-5)


def test_private_keys_equal_a_dense_mask_over_all_of_them():
    """Keys private to a query are the same as keys that a dense mask hides from every other query."""
    from jaxlm.layers import KeyValues, attend

    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 5, 4, 8)), jnp.float32)
    own = [jnp.asarray(rng.normal(size=(2, 5, 2, 8)), jnp.float32) for _ in range(2)]
    private = [jnp.asarray(rng.normal(size=(2, 5, 3, 2, 8)), jnp.float32) for _ in range(2)]
    causal = jnp.tril(jnp.ones((5, 5), bool))[None]
    out = attend(q, (KeyValues(*private), KeyValues(*own, causal)), scale=0.3, softcap=5.0)
    flat = [x.reshape(2, 15, 2, 8) for x in private]
    belongs = jnp.asarray(np.arange(15)[None, None, :] // 3 == np.arange(5)[None, :, None])
    dense = attend(q, (KeyValues(*flat, belongs), KeyValues(*own, causal)), scale=0.3, softcap=5.0)
    chex.assert_trees_all_close(out, dense, atol=1e-6)
    joined = [jnp.concatenate(pair, axis=1) for pair in zip(flat, own, strict=True)]
    one = attend(q, (KeyValues(*joined, jnp.concatenate([belongs, causal], axis=-1)),), scale=0.3, softcap=5.0)
    chex.assert_trees_all_close(out, one, atol=1e-6)


def test_a_per_layer_prefix_equals_real_tokens_before():
    """Extra keys taken from a real run's cache act like the tokens they came from."""
    model, params = tiny_decoder("llama", num_layers=LAYERS)
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, 11)), jnp.int32)
    cache = model.trunk(params, model.embed(params, ids[:, :4]), cache=model.init_cache(2, 4)).cache
    keys, values = jnp.swapaxes(cache.k, 2, 3), jnp.swapaxes(cache.v, 2, 3)
    positions = jnp.broadcast_to(jnp.arange(4, 11, dtype=jnp.int32)[None], (2, 7))

    @jax.jit
    def run(k, v):
        context = Context(extra=(ExtraKeys(k, v),))
        return model.trunk(params, model.embed(params, ids[:, 4:]), positions=positions, context=context).hidden

    full = model.trunk(params, model.embed(params, ids)).hidden[:, 4:]
    chex.assert_trees_all_close(run(keys, values), full, atol=1e-5)
    grads = jax.grad(lambda k: jnp.sum(run(k, values) ** 2))(keys)
    assert float(jnp.abs(grads).min(axis=(1, 2, 3, 4)).max()) >= 0.0
    assert bool((jnp.abs(grads).sum(axis=(1, 2, 3, 4)) > 0).all())


def test_key_bias_of_minus_infinity_hides_keys():
    model, params = tiny_decoder("llama")
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 64, (2, 8)), jnp.int32)
    h = model.embed(params, ids)
    bias = jnp.zeros((2, 8)).at[0, 2].set(-jnp.inf)
    allowed = jnp.ones((2, 8, 8), bool).at[0, :, 2].set(False)
    biased = model.trunk(params, h, context=Context(key_bias=bias)).hidden
    masked = model.trunk(params, h, mask=Mask(allowed=allowed)).hidden
    chex.assert_trees_all_close(biased, masked, atol=1e-6)


def test_unused_context_leaves_the_compiled_program_unchanged(setup):
    model, params, ids = setup

    def program(context):
        run = jax.jit(lambda p: model.trunk(p, model.embed(p, ids), context=context).hidden)
        return run.lower(params).as_text()

    assert program(None) == program(Context())


def test_taps_and_edits_work_with_cache_and_gradients(setup):
    model, params, ids = setup
    h = model.embed(params, ids)
    context = Context(taps={"attn_in": Tap(gram)}, edits={"resid": Edit(shift=jnp.ones((1, 1, 1, 1)))})
    first = model.trunk(params, h[:, :5], cache=model.init_cache(2, 16), context=context)
    second = model.trunk(params, h[:, 5:], cache=first.cache, context=context)
    whole = model.trunk(params, h, context=context)
    sums = jax.tree.map(jnp.add, first.taps, second.taps)
    chex.assert_trees_all_close(sums, whole.taps, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(second.hidden, whole.hidden[:, 5:], atol=1e-5)


def test_unknown_sites_are_named(setup):
    model, params, ids = setup
    with pytest.raises(ConfigError, match="no site 'attn_weight'.*did you mean 'attn_weights'"):
        model.trunk(params, model.embed(params, ids), context=Context(taps={"attn_weight": Tap(jnp.sum)}))
    with pytest.raises(ConfigError, match="can be tapped but not edited"):
        model.trunk(params, model.embed(params, ids), context=Context(edits={"attn_weights": Edit()}))
