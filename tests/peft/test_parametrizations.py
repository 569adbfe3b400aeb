"""Models whose kernels are products and sums: what is trained, what restarts keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.models import Decoder
from jaxlm.models.config import DecoderConfig
from jaxlm.objectives import CausalLM
from jaxlm.optim.config import OptimizerConfig
from jaxlm.optim.roles import label
from jaxlm.peft import Parametrization, parametrize, restart, stop_bases
from jaxlm.peft.lora import adapted_axes
from jaxlm.training import change_every, init_state, make_step

MODEL = Decoder(DecoderConfig(vocab_size=16, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, max_length=8))
TOKENS = jnp.arange(9)[None] * 5 % 16
BATCH = {"inputs": TOKENS[:, :-1], "targets": TOKENS[:, 1:], "loss_weights": jnp.ones((1, 8))}
NAMES = ("dense", "low_rank", "sltrain", "lora", "relora")


def draw(name, seed=0):
    how = Parametrization(name, rank=3, density=0.1)
    params = parametrize(jax.random.key(seed), MODEL.init(jax.random.key(seed))["params"], how)
    return how, params


@pytest.mark.parametrize(
    ("name", "trained"), [("dense", None), ("low_rank", 0), ("sltrain", 0.1), ("lora", 0), ("relora", 1)]
)
def test_what_is_trained(name, trained):
    how, params = draw(name)
    mine, rest = trees.partition(params, how.is_trained, label(params, adapted_axes(params, MODEL.axes())))
    kernels = {"query": (16, 16), "key": (16, 16), "value": (16, 16), "out": (16, 16)}
    kernels |= {"gate": (16, 24), "up": (16, 24), "down": (24, 16)}
    dense = sum(a * b for a, b in kernels.values())
    factors = sum(3 * (a + b) for a, b in kernels.values())
    places = sum(int(0.1 * a * b) for a, b in kernels.values())
    expected = dense if trained is None else factors + {0: 0, 0.1: places, 1: dense}[trained]
    found = sum(x.size for path, x in trees.named_leaves(mine) if path.startswith("blocks/") and "/kernel" in path)
    assert found == 2 * expected
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(mine))
    same = trees.merge(mine, rest)
    jax.tree.map(np.testing.assert_array_equal, same, params)


@pytest.mark.parametrize("name", NAMES)
def test_a_restart_keeps_the_function(name):
    how, params = draw(name)
    params = jax.tree.map(lambda x: x + 0.1 if jnp.issubdtype(x.dtype, jnp.floating) else x, params)
    again = jax.jit(lambda p: restart(jax.random.key(1), p, how))(params)
    logits = [MODEL.apply({"params": p}, BATCH["inputs"]) for p in (params, again)]
    np.testing.assert_allclose(*logits, rtol=2e-4, atol=2e-4)
    assert (name in ("dense", "lora")) == all(
        np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, again)), strict=True)
    )


def test_stopped_bases_have_no_gradient():
    _, params = draw("relora")

    def loss(params):
        return CausalLM(MODEL).sums(stop_bases(params), BATCH)["loss"]

    for path, g in trees.named_leaves(jax.grad(loss)(params)):
        if path.endswith("/base"):
            assert not np.any(g)
        elif path.endswith("/b"):
            assert np.any(g)


def steps_of(period, reset, count=5):
    how, params = draw("low_rank")
    config = OptimizerConfig(warmup=0.0, decay=0.0, reset_every=reset, recovery=2)
    tx = config.make(count, adapted_axes(params, MODEL.axes()))
    step = make_step(CausalLM(MODEL), tx)
    if period:
        step = change_every(step, period, lambda key, trainable: restart(key, trainable, how))
    state, step = init_state(params, tx, jax.random.key(0)), jax.jit(step)
    states = []
    for _ in range(count):
        state, _ = step(state, None, BATCH)
        states.append(state)
    return states


def test_restarts_happen_at_multiples_of_the_period_and_never_beyond_the_run():
    plain, beyond, every = steps_of(0, 0), steps_of(9, 9), steps_of(3, 3)
    jax.tree.map(np.testing.assert_array_equal, plain[-1].trainable, beyond[-1].trainable)
    jax.tree.map(np.testing.assert_array_equal, plain[2].trainable, every[2].trainable)
    a, b = (s[3].trainable["blocks"][0]["mlp"]["up"]["kernel"] for s in (plain, every))
    assert np.abs(a.a - b.a).max() > 1e-3
    # Right after the restart the rate is a thousandth: the product has hardly moved.
    before = every[2].trainable["blocks"][0]["mlp"]["up"]["kernel"].dense()
    np.testing.assert_allclose(b.dense(), before, atol=1e-4)
    np.testing.assert_allclose(jnp.einsum("lir,lis->lrs", b.a, b.a), jnp.einsum("lro,lso->lrs", b.b, b.b), atol=1e-3)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="parametrization 'lowrank'.*low_rank"):
        Parametrization("lowrank")
    with pytest.raises(ConfigError, match="rank is 0"):
        Parametrization("low_rank", rank=0)
    params = MODEL.init(jax.random.key(0))["params"]
    with pytest.raises(ConfigError, match=r"blocks/0/attention/\w+/kernel: rank is 40"):
        parametrize(jax.random.key(0), params, Parametrization("low_rank", rank=40))
    with pytest.raises(ConfigError, match="period is 0"):
        change_every(lambda *x: x, 0, lambda key, x: x)
