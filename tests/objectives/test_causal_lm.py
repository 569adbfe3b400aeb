import dataclasses
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.compression import QuantizeConfig, quantize
from jaxlm.core import sharding
from jaxlm.core.errors import ConfigError
from jaxlm.core.precision import BFLOAT16
from jaxlm.core.sharding import MeshConfig, make_mesh, use_mesh
from jaxlm.models import Decoder
from jaxlm.objectives import CausalLM, StepContext, causal_lm, token_loss_sums
from jaxlm.objectives.causal_lm import cut_chunks, default_chunk, join_chunks
from jaxlm.testing import tiny_config, tiny_decoder
from pallas_kernels import cross_entropy
from tests.pallas_kernels import absent_tpu


def batch(length=13, seed=0):
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.integers(0, 64, (3, length + 1)), jnp.int32)
    weights = jnp.asarray(rng.random((3, length)) * (rng.random((3, length)) > 0.3), jnp.float32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:], "loss_weights": weights}


def value_and_gradient(objective, params, data):
    def loss(params):
        totals = objective.totals(params, data, StepContext())
        return objective.loss(params, data, StepContext(), totals)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("chunk", [None, 4, 13])
def test_equals_optax_on_whole_logits(family, chunk):
    model, params = tiny_decoder(family)
    data = batch()

    def plain(params):
        logits = model.apply({"params": params}, data["inputs"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, data["targets"])
        z = jnp.square(jax.nn.logsumexp(logits, axis=-1))
        return jnp.sum(data["loss_weights"] * (nll + 1e-3 * z)) / jnp.sum(data["loss_weights"])

    expected, expected_grads = jax.jit(jax.value_and_grad(plain))(params)
    for implementation in ("fused", "reference"):
        objective = CausalLM(model, z_loss=1e-3, chunk_length=chunk, implementation=implementation)
        (loss, aux), grads = value_and_gradient(objective, params, data)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        chex.assert_trees_all_close(grads, expected_grads, atol=1e-6, rtol=1e-4)
        total = aux.metrics["loss"][0] + aux.metrics["z_loss"][0]
        np.testing.assert_allclose(total / aux.metrics["loss"][1], expected, rtol=1e-5)


@pytest.fixture
def interpreted(monkeypatch):
    """The loss's kernels as on a TPU, in Pallas' interpreter."""

    def forced(*args, implementation, **options):
        assert implementation == "tpu"
        return cross_entropy.cross_entropy(*args, implementation="tpu_interpret", **options)

    entry = types.SimpleNamespace(cross_entropy=forced, why_not=lambda *_, **__: None, Shards=cross_entropy.Shards)
    monkeypatch.setattr(causal_lm, "kernels", entry)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # a head of its own; tied, with a soft cap
@pytest.mark.parametrize("divided", [False, True])
def test_kernels_give_the_values_and_gradients_of_chunks(family, divided, interpreted):
    model, params = tiny_decoder(family, num_layers=1)
    data = {name: jnp.concatenate([x, x[:1]]) for name, x in batch(12).items()}
    expected = value_and_gradient(CausalLM(model, z_loss=1e-3, implementation="reference"), params, data)
    objective = CausalLM(model, z_loss=1e-3, implementation="kernels")
    if divided:
        mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
        rules = model.config.sharding_rules(mesh)
        params = jax.device_put(params, sharding.shardings(mesh, model.axes(), params, rules))
        with sharding.use_mesh(mesh, rules):
            got = value_and_gradient(objective, params, data)
    else:
        got = value_and_gradient(objective, params, data)
    got, expected = jax.tree.map(np.asarray, (got, expected))
    chex.assert_trees_all_close(got, expected, atol=2e-6, rtol=1e-4)


def test_kernels_say_why_they_cannot():
    model, params = tiny_decoder("llama", num_layers=1)
    objective = CausalLM(model, implementation="kernels")
    with pytest.raises(ConfigError, match="'kernels' of the loss: platform cpu, for which there is no kernel"):
        value_and_gradient(objective, params, batch())
    packed = quantize(params, QuantizeConfig(4, 16, embeddings=True), model.axes())
    with pytest.raises(ConfigError, match="the head is no product with one array"):
        jax.eval_shape(lambda: objective.sums(packed, batch()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fsdp", [1, 4])
def test_on_tpus_memory_is_independent_of_the_vocabulary(tied, fsdp):
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=fsdp), absent_tpu.devices("v5e")[:fsdp])

    def temporary(vocab):
        config = tiny_config("llama", embed_dim=256, vocab_size=vocab, tie_embeddings=tied, precision=BFLOAT16)
        model = Decoder(config)
        params, axes = model.head_params(model.abstract_params()), model.head_params(model.axes())
        where = sharding.shardings(mesh, axes, params), *[sharding.batch_sharding(mesh, n) for n in (3, 2, 2)]
        kinds = (3, jnp.bfloat16), (2, jnp.int32), (2, jnp.float32)
        shapes = [jax.ShapeDtypeStruct((8, 512, 256)[:n], dtype) for n, dtype in kinds]
        shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), (params, *shapes), where
        )

        def loss(head, hidden, targets, weights):
            return token_loss_sums(
                model.head, head, hidden, targets, weights, vocab_size=vocab, gather=model.gather_head,
                projection=model.head_projection,
            )["loss"]  # fmt: skip

        with sharding.use_mesh(mesh), absent_tpu.no_disk_cache():
            compiled = jax.jit(jax.grad(loss, (0, 1)), out_shardings=where[:2]).lower(*shapes).compile()
        assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
        return compiled.memory_analysis().temp_size_in_bytes

    # Sharded weights are gathered, and their gradient is whole before it is divided again; but no logits.
    weights = 0 if fsdp == 1 else 2 * 4 * 256 * 65536
    assert temporary(65536) <= temporary(8192) + 1.01 * weights
    assert 1.01 * weights < 8 * 512 * 65536 * 4 / fsdp


def test_uniform_logits_give_log_vocabulary_whatever_the_weights():
    model, params = tiny_decoder("llama")
    params["head"]["kernel"] = jnp.zeros_like(params["head"]["kernel"])
    (loss, _), _ = value_and_gradient(CausalLM(model), params, batch())
    np.testing.assert_allclose(loss, np.log(64), rtol=1e-6)


def test_doubling_all_weights_changes_nothing():
    model, params = tiny_decoder("llama")
    data = batch()
    twice = {**data, "loss_weights": 2 * data["loss_weights"]}
    chex.assert_trees_all_close(
        value_and_gradient(CausalLM(model), params, data)[1],
        value_and_gradient(CausalLM(model), params, twice)[1],
        atol=1e-6,
    )


def test_a_batch_without_weights_has_loss_and_gradients_of_zero():
    model, params = tiny_decoder("llama")
    data = {**batch(), "loss_weights": jnp.zeros((3, 13))}
    (loss, _), grads = value_and_gradient(CausalLM(model), params, data)
    assert float(loss) == 0.0
    assert all(float(jnp.abs(g).max()) == 0.0 for g in jax.tree.leaves(grads))


def test_packed_documents_have_the_loss_and_gradient_of_documents_alone():
    model, params = tiny_decoder("gpt2")
    a, b = batch(6, 1), batch(9, 2)
    pieces = [jax.tree.map(lambda x: x[:1], part) for part in (a, b)]
    packed = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *pieces)
    packed["segment_ids"] = jnp.array([[1] * 6 + [2] * 9], jnp.int32)
    packed["positions"] = jnp.array([[*range(6), *range(9)]], jnp.int32)
    objective = CausalLM(model)
    expected = [jax.jit(jax.grad(lambda p, d=d: objective.sums(p, d)["loss"]))(params) for d in pieces]
    got = jax.jit(jax.grad(lambda p: objective.sums(p, packed)["loss"]))(params)
    chex.assert_trees_all_close(got, jax.tree.map(jnp.add, *expected), atol=2e-5, rtol=1e-4)


def test_a_frozen_head_costs_no_weight_gradient():
    model, params = tiny_decoder("llama", vocab_size=64)
    hidden = jax.random.normal(jax.random.key(0), (3, 12, 32))
    data = batch(12)

    def loss(head, hidden):
        sums = token_loss_sums(
            model.head, head, hidden, data["targets"], data["loss_weights"], vocab_size=64, chunk_length=4
        )
        return sums["loss"]

    head = model.head_params(params)
    both = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(head, hidden).compile().as_text()
    one = jax.jit(jax.grad(loss, argnums=1)).lower(head, hidden).compile().as_text()
    assert one.count(" dot(") < both.count(" dot(")
    chex.assert_trees_all_close(
        jax.grad(loss, argnums=1)(head, hidden), jax.grad(loss, argnums=(0, 1))(head, hidden)[1], atol=1e-6
    )


def test_no_array_of_all_logits_exists():
    model, params = tiny_decoder("llama", vocab_size=3001)
    data = batch(16)
    objective = CausalLM(model, chunk_length=4)
    text = jax.jit(jax.grad(lambda p: objective.sums(p, data)["loss"])).lower(params).as_text()
    assert "x3001xf32" in text
    assert "3x16x3001xf32" not in text
    assert "48x3001xf32" not in text


def test_the_reference_has_second_derivatives():
    model, params = tiny_decoder("llama", num_layers=1, attention="reference")
    objective = CausalLM(model, implementation="reference")
    data = batch(5)
    direction = jax.tree.map(jnp.ones_like, params)
    product = jax.jvp(jax.grad(lambda p: objective.sums(p, data)["loss"]), (params,), (direction,))[1]
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(product))


def test_batches_under_vmap():
    model, params = tiny_decoder("llama", num_layers=2)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params)
    objective, data = CausalLM(model, chunk_length=4), batch(12)
    grad = jax.grad(lambda p: objective.sums(p, data)["loss"])
    together = jax.jit(jax.vmap(grad))(stacked)
    for i in range(2):
        alone = jax.jit(grad)(jax.tree.map(lambda x: x[i], stacked))  # noqa: B023
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[i], together), alone, atol=1e-4, rtol=1e-3)  # noqa: B023


def test_bad_settings_are_refused():
    model, _ = tiny_decoder("llama")
    with pytest.raises(ConfigError, match="z_loss is -1"):
        CausalLM(model, z_loss=-1)
    with pytest.raises(ConfigError, match="implementation 'fast'"):
        dataclasses.replace(CausalLM(model), implementation="fast")


def test_chunks_of_a_divided_length_have_a_part_of_each_device():
    x = jnp.arange(2 * 24).reshape(2, 24)
    plain = cut_chunks(x, 8)
    assert plain.tolist()[1][0] == list(range(8, 16))
    np.testing.assert_array_equal(join_chunks(plain), x)
    with use_mesh(make_mesh(MeshConfig(data=2, sequence=4))):
        cut, odd = cut_chunks(x, 8), cut_chunks(x, 6)
        # Each of four devices holds six tokens, of which a chunk has two.
        assert cut.tolist()[1][0] == [2, 3, 8, 9, 14, 15, 20, 21]
        np.testing.assert_array_equal(join_chunks(cut), x)
        np.testing.assert_array_equal(join_chunks(odd), x)
        assert default_chunk(8, 24, 10**9) == 4
    assert default_chunk(8, 24, 10**9) == 1
