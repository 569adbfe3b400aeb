"""Optimizers by name: options reach the optimizer, bad ones are named, a run's saved settings come back."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.configs import from_dict, to_dict
from jaxlm.core.errors import ConfigError
from jaxlm.optim import OptimizerConfig, scale_optimizer
from jaxlm.optim.config import OPTIMIZERS, LowRankOptions, ScaleOptions, SpikeOptions
from jaxlm.optim.memory import STATES

AXES = {"w": ("layers", "embed", "mlp"), "embed": ("vocab", "embed"), "head": ("embed", "vocab"), "norm": ("embed",)}
SHAPES = {"w": (2, 6, 8), "embed": (10, 6), "head": (6, 10), "norm": (6,)}


def values(seed):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def updates(tx, steps=3):
    params, state = values(0), tx.init(values(0))
    for step in range(steps):
        out, state = tx.update(values(step + 1), state, params, step=jnp.int32(step))
    return out


def test_names_are_those_whose_memory_is_known():
    assert set(OPTIMIZERS) == set(STATES)


def test_scale_gets_its_options_and_a_schedule_for_adam_of_the_same_form():
    config = OptimizerConfig(
        name="scale",
        learning_rate=0.1,
        weight_decay=0.0,
        clip_norm=None,
        scale=ScaleOptions("row", 0.5, "all", adam_learning_rate=0.3),
    )
    expected = scale_optimizer(
        config.schedule(10),
        axes=AXES,
        normalization="row",
        momentum=0.5,
        momentum_roles=("matrix", "embed", "head"),
        adam_learning_rate=lambda step: 3.0 * config.schedule(10)(step),
        adam_b2=0.95,
    )
    found = updates(config.make(10, AXES))
    for name, value in updates(expected).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "galore", "low_rank": LowRankOptions(rank=3)},
        {"name": "galore", "low_rank": LowRankOptions(rank=2, period=2)},
        {"name": "galore", "low_rank": LowRankOptions(rank=2, scale=1.0)},
        {"name": "natural_galore", "low_rank": LowRankOptions(rank=2, history=2, damping=1.0)},
        {"name": "natural_galore", "low_rank": LowRankOptions(rank=2, damping=1.0, damping_mode="relative")},
        {"name": "apollo_mini", "low_rank": LowRankOptions(rank=2, scale=1.0)},
        {"name": "stable_spam", "spikes": SpikeOptions(period=2)},
        {"name": "spam", "spikes": SpikeOptions(period=2, warmup=2)},
    ],
)
def test_every_option_makes_a_difference(options):
    plain = {**options, "low_rank": LowRankOptions(rank=2), "spikes": SpikeOptions()}
    a, b = (updates(OptimizerConfig(warmup=0.0, **o).make(10, AXES))["w"] for o in (options, plain))
    assert np.max(np.abs(np.asarray(a - b))) > 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "galor"}, "did you mean 'galore'"),
        ({"scale": ScaleOptions(normalization="col")}, "optimizer.scale.normalization is 'col'"),
        ({"scale": ScaleOptions(momentum_on="heads")}, "optimizer.scale.momentum_on is 'heads'"),
        ({"low_rank": LowRankOptions(damping_mode="rel")}, "optimizer.low_rank.damping_mode is 'rel'"),
    ],
)
def test_unknown_names_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        OptimizerConfig(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low_rank": LowRankOptions(rank=0)}, "rank is 0"),
        ({"low_rank": LowRankOptions(rank=4, period=-1)}, "period is -1"),
        ({"b1": 1.0, "low_rank": LowRankOptions(rank=4)}, "b1 is 1.0"),
    ],
)
def test_values_out_of_range_are_refused_when_the_optimizer_is_made(options, words):
    with pytest.raises(ConfigError, match=words):
        OptimizerConfig(name="galore", **options).make(10, AXES)


def test_saved_settings_come_back_also_those_of_before_there_were_options():
    config = OptimizerConfig(name="fira", low_rank=LowRankOptions(rank=7, scale=0.5))
    assert from_dict(OptimizerConfig, to_dict(config)) == config
    assert from_dict(OptimizerConfig, {"name": "muon"}) == OptimizerConfig(name="muon")
