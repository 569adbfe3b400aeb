"""AdamW against its formula, Muon against a loop over layers, and what optax.contrib.muon does instead."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from jaxlm.core.errors import ConfigError
from jaxlm.optim import FromHparams, adamw, muon, warmup_stable_decay
from jaxlm.optim.learning_rate import value_of

AXES = {
    "embed": ("vocab", "embed"),
    "kernel": ("layers", "embed", "mlp"),
    "expert": ("layers", "experts", "mlp", "embed"),
    "scale": ("layers", "embed"),
}


def values(seed):
    rng = np.random.default_rng(seed)
    shapes = {"embed": (10, 4), "kernel": (3, 4, 6), "expert": (3, 2, 6, 4), "scale": (3, 4)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def test_adamw_is_the_formula_with_decay_where_the_role_says():
    b1, b2, eps, decay, rate, clip = 0.8, 0.9, 1e-4, 0.3, 0.05, 2.0
    tx = adamw(rate, axes=AXES, b1=b1, b2=b2, eps=eps, weight_decay=decay, clip_norm=clip)
    params = values(0)
    mine = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in mine.items()}
    v = {k: np.zeros_like(x) for k, x in mine.items()}
    state = tx.init(params)
    for t in range(1, 6):
        gradients = values(t)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in gradients.values()))
        for k in mine:
            g = np.asarray(gradients[k], np.float64) * min(1.0, clip / norm)
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g**2
            step = (m[k] / (1 - b1**t)) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
            mine[k] = mine[k] - rate * (step + (0.0 if k == "scale" else decay) * mine[k])
    for k in mine:
        np.testing.assert_allclose(params[k], mine[k], rtol=2e-4, atol=1e-5, err_msg=k)


def test_decay_is_a_choice_by_path_and_role():
    params = values(0)
    tx = adamw(1.0, axes=AXES, weight_decay=0.5, decay=lambda path, role: path == "scale" or role == "embed")
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    for name in params:
        expected = -0.5 * params[name] if name in ("scale", "embed") else np.zeros_like(params[name])
        np.testing.assert_allclose(updates[name], expected, rtol=1e-6)


def by_layer(tx_of_one, gradients, params):
    """A two-dimensional optax.contrib.muon for every single matrix of a stack, one by one; three updates."""
    lead = params.shape[:-2]
    flat = lambda x: x.reshape(-1, *x.shape[-2:])  # noqa: E731
    out = []
    for i in range(flat(params).shape[0]):
        one = {"w": flat(params)[i]}
        state = tx_of_one.init(one)
        for g in gradients:
            updates, state = tx_of_one.update({"w": flat(g)[i]}, state, one)
        out.append(updates["w"])
    return jnp.stack(out).reshape(*lead, *params.shape[-2:])


@pytest.mark.parametrize("consistent_rms", [0.2, None])
def test_muon_on_stacks_equals_optax_muon_on_each_matrix_alone(consistent_rms):
    params, gradients = values(0), [values(i) for i in (1, 2, 3)]
    ours = muon(0.1, axes=AXES, weight_decay=0.3, consistent_rms=consistent_rms)
    state = ours.init(params)
    for g in gradients:
        updates, state = ours.update(g, state, params)
    alone = contrib.muon(0.1, weight_decay=0.3, consistent_rms=consistent_rms)
    for name in ("kernel", "expert"):
        expected = by_layer(alone, [g[name] for g in gradients], params[name])
        np.testing.assert_allclose(updates[name], expected, rtol=1e-3, atol=1e-5, err_msg=name)

    adam = adamw(0.1, axes=AXES, weight_decay=0.3)
    adam_state = adam.init(params)
    for g in gradients:
        adam_updates, adam_state = adam.update(g, adam_state, params)
    for name in ("embed", "scale"):
        np.testing.assert_allclose(updates[name], adam_updates[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_large_muon_update_is_nearly_orthogonal_in_every_layer():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 16, 32)), jnp.float32)}
    tx = muon(1.0, axes={"w": ("layers", "embed", "mlp")}, weight_decay=0.0, consistent_rms=1 / np.sqrt(32))
    updates, _ = tx.update(params, tx.init(params), params)
    singular = np.linalg.svd(np.asarray(updates["w"]), compute_uv=False)
    assert singular.shape == (3, 16)
    assert (singular > 0.5).all()
    assert (singular < 1.3).all()


def test_plain_optax_muon_is_wrong_on_stacked_kernels():
    """The reason for roles: it takes the embedding for the only matrix, and the kernels get Adam."""
    params, gradients = values(0), values(1)
    plain = contrib.muon(0.1)
    updates, state = plain.update(gradients, plain.init(params), params)
    momentum = state.inner_states["muon"].inner_state[0].mu
    assert isinstance(momentum["kernel"], optax.MaskedNode)
    assert isinstance(momentum["expert"], optax.MaskedNode)
    assert not isinstance(momentum["embed"], optax.MaskedNode)
    right = by_layer(contrib.muon(0.1), [gradients["kernel"]], params["kernel"])
    assert np.max(np.abs(updates["kernel"] - right)) > 0.01

    tx = muon(0.1, axes=AXES, weight_decay=0.0, consistent_rms=None)
    ours, _ = tx.update(gradients, tx.init(params), params)
    np.testing.assert_allclose(ours["kernel"], right, rtol=1e-3, atol=1e-5)


def test_muon_takes_what_the_predicate_names_and_adam_may_have_a_rate_of_its_own():
    params, gradients = values(0), values(1)
    tx = muon(
        1.0,
        axes=AXES,
        weight_decay=0.0,
        muon_roles=lambda path, role: path == "kernel",
        adam_learning_rate=0.5,
    )
    updates, _ = tx.update(gradients, tx.init(params), params)
    for name in ("embed", "expert", "scale"):  # Adam's first update is the sign
        np.testing.assert_allclose(updates[name], -0.5 * np.sign(gradients[name]), rtol=1e-4)
    assert np.max(np.abs(np.abs(updates["kernel"]) - 1.0)) > 0.1


def test_the_rate_of_a_step_can_be_asked():
    schedule = warmup_stable_decay(2.0, 100, 10, 10)
    assert value_of(0.1) == 0.1
    assert float(value_of(schedule, 5)) == pytest.approx(1.0)
    assert float(value_of(FromHparams("rate", schedule), 5, {"rate": 0.1})) == pytest.approx(0.1)
    assert value_of(FromHparams("rate"), hparams={"rate": 0.1}) == 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: adamw(-1.0, axes=AXES), "learning_rate is -1.0"),
        (lambda: adamw(0.1, axes=AXES, b2=1.0), "b2 is 1.0"),
        (lambda: adamw(0.1, axes=AXES, weight_decay=-0.1), "weight_decay is -0.1"),
        (lambda: adamw(0.1, axes=AXES, clip_norm=0.0), "clip_norm is 0.0"),
        (lambda: adamw(0.1, axes=AXES, decay=("vectors",)), "did you mean 'vector'"),
        (lambda: muon(0.1, axes=AXES, beta=1.5), "beta is 1.5"),
        (lambda: muon(0.1, axes=AXES, ns_steps=0), "ns_steps is 0"),
        (lambda: muon(0.1, axes=AXES, muon_roles=("kernel",)), "no role 'kernel'"),
    ],
)
def test_bad_values_are_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
