"""MiniCPM's parametrization: multipliers where they belong; activations and updates that do not follow the width."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.models import Decoder, DecoderConfig, ScalingRules, extend_context, untie_head
from jaxlm.models.presets import preset
from jaxlm.optim import adamw, roles
from jaxlm.testing import tiny_decoder

RULES = ScalingRules(base_dim=32)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 17)))


def model(width, rules=RULES, layers=2):
    plain = DecoderConfig(
        64, layers, width, width // 16, 2 * width, max_length=32, tie_embeddings=True, attention="reference"
    )
    return Decoder(rules.apply(plain) if rules else dataclasses.replace(plain, init_std=0.1, init_out_std=0.1))


def test_multipliers_are_where_the_paper_has_them():
    """The scaled model computes what the plain one does with scaled weights."""
    config = dataclasses.replace(model(64).config, norm_eps=1e-12)
    params = Decoder(config).init(jax.random.key(0))["params"]
    plain = Decoder(
        dataclasses.replace(config, residual_scale=None, logit_scale=None, embedding_scale=None, tie_embeddings=False)
    )
    depth = 1.4 / 2**0.5
    scaled = dict(params)
    scaled["head"] = {"kernel": params["embedding"]["table"].T / 2}
    scaled["embedding"] = {"table": 12 * params["embedding"]["table"]}
    scaled["blocks"] = trees.map_named(
        lambda path, x: depth * x if "out/" in path or "down/" in path else x, params["blocks"]
    )
    chex.assert_trees_all_close(
        Decoder(config).apply({"params": params}, IDS), plain.apply({"params": scaled}, IDS), rtol=1e-4, atol=1e-5
    )


def test_deviations_and_rates_follow_the_width():
    config = model(128).config
    params, axes = Decoder(config).init(jax.random.key(0))["params"], Decoder(config).axes()
    assert float(jnp.std(params["blocks"][0]["mlp"]["down"]["kernel"])) == pytest.approx(0.1 / 2, rel=0.05)
    assert float(jnp.std(params["embedding"]["table"])) == pytest.approx(0.1, rel=0.05)
    factors = dict(trees.named_leaves(roles.select(params, axes, RULES.rate_factor(config))))
    assert {path.split("/")[-1]: f for path, f in factors.items()} == {"scale": 1.0, "table": 1.0, "kernel": 0.25}


def test_activations_do_not_grow_with_the_width():
    """Root mean squares before the final norm at initialization, within 10 %."""

    def rms(width):
        found = []
        for seed in range(4):
            m = model(width)
            params = m.init(jax.random.key(seed))["params"]
            hidden = m.trunk(params, m.embed(params, IDS)).hidden
            found.append(float(jnp.sqrt(jnp.mean(hidden**2))))
        return np.mean(found)

    sizes = [rms(width) for width in (64, 128, 256)]
    assert max(sizes) / min(sizes) < 1.1


def change_of_logits(width, rules):
    """Root mean square of what the third of three Adam steps changes in the logits."""
    m = model(width, rules)
    factor = rules.rate_factor(m.config) if rules else None
    tx = adamw(0.01, axes=m.axes(), weight_decay=0.0, rate_factor=factor)

    def loss(params):
        logits = m.apply({"params": params}, IDS[:, :-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, IDS[:, 1:]))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = m.init(jax.random.key(0))["params"]
    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state)
    after, _ = step(params, state)
    change = m.apply({"params": after}, IDS) - m.apply({"params": params}, IDS)
    return float(jnp.sqrt(jnp.mean(change**2)))


def test_updates_change_the_logits_alike_at_every_width():
    ruled, plain = ([change_of_logits(width, rules) for width in (32, 128, 512)] for rules in (RULES, None))
    assert max(ruled) / min(ruled) < 2
    assert plain[2] / plain[0] > 4


def test_decay_is_not_multiplied():
    axes = {"w": ("embed", "mlp")}
    tx = adamw(0.1, axes=axes, weight_decay=0.5, rate_factor=lambda path, role: 0.25)
    params, zero = {"w": jnp.ones((2, 2))}, {"w": jnp.zeros((2, 2))}
    updates, _ = tx.update(zero, tx.init(params), params)
    chex.assert_trees_all_close(updates, {"w": jnp.full((2, 2), -0.05)})
    one, _ = tx.update({"w": jnp.ones((2, 2))}, tx.init(params), params)
    chex.assert_trees_all_close(one, {"w": jnp.full((2, 2), -0.1 * (0.25 + 0.5))}, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("2.4b", 2.4), ("1.2b", 1.2), ("0.5b", 0.5), ("0.2b", 0.24), ("0.17b", 0.17), ("0.1b", 0.1), ("70m", 0.07),
     ("30m", 0.035), ("9m", 0.009)],
)  # fmt: skip
def test_published_sizes_without_embeddings(name, billions):
    config = preset(f"minicpm-{name}")
    count = trees.count(Decoder(config).abstract_params()["blocks"]) / 1e9
    assert count == pytest.approx(billions, rel=0.1)
    assert config.head_size == 64
    assert config.residual_scale == pytest.approx(1.4 / config.num_layers**0.5)
    assert config.logit_scale == pytest.approx(256 / config.embed_dim)


def test_rules_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="scaling_rules.base_dim is 0"):
        ScalingRules(base_dim=0)


def test_an_untied_head_is_the_same_function():
    decoder, params = tiny_decoder("smollm2")
    config, untied = untie_head(decoder.config, params)
    expected = decoder.apply({"params": params}, IDS)
    chex.assert_trees_all_close(Decoder(config).apply({"params": untied}, IDS), expected, atol=1e-5)
    assert trees.count(untied) == trees.count(Decoder(config).abstract_params())
    with pytest.raises(ConfigError, match="not tied"):
        untie_head(config, untied)


def test_a_longer_context_turns_the_slowest_pair_slower_and_the_fastest_as_before():
    from jaxlm.layers.rotary import frequencies

    config = DecoderConfig(64, 1, 64, 4, 64, max_length=128)
    longer = extend_context(config, 512)
    old, new = (np.asarray(frequencies(c.rotary_dim, c.rope_theta)) for c in (config, longer))
    assert old[0] == new[0]
    assert old[-1] / new[-1] == pytest.approx(4, rel=1e-4)
    assert extend_context(config, 512, theta=5e4).rope_theta == 5e4
    for changes, length, said in (
        ({}, 64, "already reaches 128"),
        ({"position": "none"}, 512, "position 'none'"),
    ):
        with pytest.raises(ConfigError, match=said):
            extend_context(dataclasses.replace(config, **changes), length)
    with pytest.raises(ConfigError, match="at least the model's own"):
        extend_context(config, 512, theta=100.0)
