"""The decoder against itself: layer ranges, scan against an unrolled loop, cache, segments, masks, positions."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.layers import Mask, kv_cache
from jaxlm.models import Decoder, gather_layers, layer, recut
from jaxlm.testing import FAMILIES, tiny_config, tiny_decoder


def tokens(batch=2, length=12, vocab=64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocab, (batch, length)), jnp.int32)


def unrolled_logits(model, params, ids):
    """Every layer as a one-layer model of its own kind, without scan, remat, or blocked attention."""
    h = model.embed(params, ids)
    kinds = model.config.layer_kinds()
    for i, kind in enumerate(kinds):
        config = dataclasses.replace(
            model.config,
            num_layers=1,
            window=kind.window,
            window_pattern=(True,),
            rope_theta=model.config.rope_theta_local if kind.local_rope else model.config.rope_theta,
            rope_scaling=None if kind.local_rope else model.config.rope_scaling,
            rope_theta_local=None,
            remat="none",
            attention="reference",
        )
        block = jax.tree.map(lambda x: x[None], layer(params, i))
        h = Decoder(config).trunk({"blocks": [block]}, h).hidden
    return model.head(params, h)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scan_equals_an_unrolled_loop(family):
    model, params = tiny_decoder(family, num_layers=8)
    ids = tokens()
    chex.assert_trees_all_close(
        jax.jit(model.apply)({"params": params}, ids), unrolled_logits(model, params, ids), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("cut", [0, 1, 5, 8])
def test_a_trunk_in_two_parts_equals_the_whole(family, cut):
    model, params = tiny_decoder(family, num_layers=8)
    ids = tokens()
    whole = model.trunk(params, model.embed(params, ids)).hidden
    part = model.trunk(params, model.embed(params, ids), layers=(0, cut)).hidden
    both = model.trunk(params, part, layers=(cut, None)).hidden
    chex.assert_trees_all_close(both, whole, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_cached_decoding_equals_the_full_forward_pass(family):
    model, params = tiny_decoder(family, num_layers=7)
    ids = tokens(length=14)
    full = jax.jit(model.apply)({"params": params}, ids)

    @jax.jit
    def extend(cache, ids):
        positions = kv_cache.positions(cache, ids.shape[1])
        out = model.trunk(params, model.embed(params, ids, positions), positions=positions, cache=cache)
        return model.head(params, out.hidden), out.cache

    cache, pieces = model.init_cache(2, 16), []
    for start, end in [(0, 6), (6, 9), *((i, i + 1) for i in range(9, 14))]:
        logits, cache = extend(cache, ids[:, start:end])
        pieces.append(logits)
    chex.assert_trees_all_close(jnp.concatenate(pieces, axis=1), full, atol=2e-5)
    assert cache.index.tolist() == [14, 14]


def test_a_cache_filled_in_two_layer_ranges_equals_one():
    model, params = tiny_decoder("gemma3", num_layers=8)
    ids = tokens(length=9)
    cache = model.init_cache(2, 12)
    one = model.trunk(params, model.embed(params, ids), cache=cache)
    first = model.trunk(params, model.embed(params, ids), cache=cache, layers=(0, 3))
    two = model.trunk(params, first.hidden, cache=first.cache, layers=(3, None))
    chex.assert_trees_all_close(two.cache, one.cache, atol=1e-5)
    chex.assert_trees_all_close(two.hidden, one.hidden, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_left_padded_shared_cache_equals_rows_alone(family):
    model, params = tiny_decoder(family)
    ids = tokens(length=10)
    pads = [0, 3]
    cache = dataclasses.replace(model.init_cache(2, 12, shared=True), start=jnp.array(pads, jnp.int32))
    padded = jnp.stack([ids[0], jnp.concatenate([jnp.zeros(3, jnp.int32), ids[1, :7]])])
    rows = []
    for start, end in [(0, 8), (8, 9), (9, 10)]:
        positions = kv_cache.positions(cache, end - start)
        h = model.embed(params, padded[:, start:end], positions)
        out = model.trunk(params, h, positions=positions, cache=cache)
        cache = out.cache
        rows.append(model.head(params, out.hidden))
    logits = jnp.concatenate(rows, axis=1)
    for row, (pad, count) in enumerate([(0, 10), (3, 7)]):
        alone = model.apply({"params": params}, ids[row : row + 1, :count])
        chex.assert_trees_all_close(logits[row, pad:], alone[0], atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("attention", ["blocked", "reference"])
def test_packed_documents_do_not_see_each_other(family, attention):
    model, params = tiny_decoder(family, num_layers=7, attention=attention)
    a, b = tokens(1, 6, seed=1), tokens(1, 9, seed=2)
    packed = jnp.concatenate([a, b, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 6 + [2] * 9 + [0] * 3], jnp.int32)
    positions = jnp.array([[*range(6), *range(9), *range(3)]], jnp.int32)
    logits = model.apply({"params": params}, packed, positions, segments)
    chex.assert_trees_all_close(logits[:, :6], model.apply({"params": params}, a), atol=2e-5)
    chex.assert_trees_all_close(logits[:, 6:15], model.apply({"params": params}, b), atol=2e-5)
    assert bool(jnp.isfinite(logits).all())


def test_prefix_and_dense_masks():
    model, params = tiny_decoder("llama")
    ids = tokens(2, 10)
    h = model.embed(params, ids)
    prefix = jnp.array([4, 0], jnp.int32)
    order = np.arange(10)
    dense = np.broadcast_to(order[None, :] <= order[:, None], (2, 10, 10)) | (order < np.array(prefix)[:, None, None])
    by_prefix = model.trunk(params, h, mask=Mask(prefix_lengths=prefix)).hidden
    by_array = model.trunk(params, h, mask=Mask(causal=False, allowed=jnp.asarray(dense))).hidden
    chex.assert_trees_all_close(by_prefix, by_array, atol=1e-6)
    causal = model.trunk(params, h).hidden
    assert float(jnp.abs(by_prefix[0] - causal[0]).max()) > 1e-3
    chex.assert_trees_all_close(by_prefix[1], causal[1], atol=1e-6)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gemma2", {}), ("llama", {"logit_scale": 0.25}), ("gemma2", {"logit_scale": 3.0})],
)
def test_the_heads_projection_gives_its_logits(family, changes):
    model, params = tiny_decoder(family, num_layers=1, **changes)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)
    found = model.head_projection(params, hidden)
    logits = found.inputs @ (found.kernel.T if found.transposed else found.kernel)
    logits = logits if found.softcap is None else found.softcap * jnp.tanh(logits / found.softcap)
    chex.assert_trees_all_close(logits, model.head(params, hidden), atol=1e-5, rtol=1e-5)


def test_rotation_depends_on_relative_positions_only():
    model, params = tiny_decoder("llama")
    ids = tokens(1, 8)
    positions = jnp.arange(8, dtype=jnp.int32)[None, :]
    near = model.apply({"params": params}, ids, positions)
    far = model.apply({"params": params}, ids, positions + 50)
    chex.assert_trees_all_close(near, far, atol=1e-4)


def test_parallel_and_serial_residuals_differ_unless_the_mlp_is_zero():
    serial, params = tiny_decoder("llama")
    parallel = Decoder(dataclasses.replace(serial.config, parallel_residual=True))
    ids = tokens()
    variables = {"params": params}
    assert float(jnp.abs(serial.apply(variables, ids) - parallel.apply(variables, ids)).max()) > 1e-3
    down = params["blocks"][0]["mlp"]["down"]
    down["kernel"] = jnp.zeros_like(down["kernel"])
    chex.assert_trees_all_close(serial.apply(variables, ids), parallel.apply(variables, ids), atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "projections", "full"])
def test_remat_policies_give_the_same_gradients(remat):
    base, params = tiny_decoder("gemma2", remat="none")
    model = Decoder(dataclasses.replace(base.config, remat=remat))
    ids = tokens()

    def loss(model):
        return jax.jit(jax.grad(lambda p: jnp.var(model.apply({"params": p}, ids))))(params)

    chex.assert_trees_all_close(loss(model), loss(base), atol=1e-5, rtol=1e-4)


def test_gather_layers_of_a_local_global_model():
    model, params = tiny_decoder("gemma3", num_layers=26)
    picked = gather_layers(params, [0, 5, 5, 25])
    for i, source in enumerate([0, 5, 5, 25]):
        chex.assert_trees_all_equal(layer(picked, i), layer(params, source))
    everything = gather_layers(params, range(26))
    ids = tokens()
    chex.assert_trees_all_equal(model.apply({"params": everything}, ids), model.apply({"params": params}, ids))


@pytest.mark.parametrize("boundaries", [[1], [6, 12], [3, 4, 25]])
def test_recut_changes_the_layout_and_nothing_else(boundaries):
    model, params = tiny_decoder("gemma3", num_layers=26)
    runs = {**params, "blocks": recut(params["blocks"], boundaries)}
    assert len(runs["blocks"]) == len(boundaries) + 1
    ids = tokens()
    chex.assert_trees_all_close(model.apply({"params": runs}, ids), model.apply({"params": params}, ids), atol=2e-5)
    chex.assert_trees_all_equal(recut(runs["blocks"], []), params["blocks"])


def test_a_missing_or_misshapen_parameter_is_named():
    model, params = tiny_decoder("llama")
    del params["blocks"][0]["mlp"]["up"]["kernel"]
    with pytest.raises(ConfigError, match="mlp/up/kernel.*missing"):
        model.apply({"params": params}, tokens())
    model, params = tiny_decoder("llama")
    params["blocks"][0]["mlp_norm"]["scale"] = jnp.ones((4, 1))
    with pytest.raises(ConfigError, match=r"mlp_norm/scale' has shape \(1,\), expected \(32,\)"):
        model.apply({"params": params}, tokens())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5, "head_dim": None}, "embed_dim 32 is not divisible by model.num_heads 5"),
        ({"num_kv_heads": 3}, "num_heads 4 is not divisible by model.num_kv_heads 3"),
        ({"activation": "gleu"}, "did you mean 'gelu'"),
        ({"head_dim": 7}, "expected an even number"),
        ({"remat": "some"}, "model.remat is 'some'"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config("llama", **changes)
