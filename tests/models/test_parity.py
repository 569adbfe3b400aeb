"""Our logits against those of Hugging Face transformers, stored by `make_golden.py`."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxlm.models import Decoder
from jaxlm.testing import FAMILIES
from tests.models import golden

LOGITS, META = golden.load()


def logits(config, params):
    return np.asarray(jax.jit(Decoder(config).apply)({"params": params}, golden.tokens()))


def test_every_family_has_a_case():
    assert set(FAMILIES) <= set(golden.CASES)
    assert set(golden.CASES) == set(LOGITS)


def test_parameters_are_those_of_the_stored_logits():
    assert {name: golden.checksum(golden.parameters(c)) for name, c in golden.CASES.items()} == META["checksums"]


@pytest.mark.parametrize("name", golden.CASES)
def test_logits_are_those_of_transformers(name):
    config = golden.CASES[name]
    np.testing.assert_allclose(logits(config, golden.parameters(config)), LOGITS[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gemma3"])
def test_blocked_attention_gives_the_same_logits(name):
    config = dataclasses.replace(golden.CASES[name], attention="blocked")
    np.testing.assert_allclose(logits(config, golden.parameters(config)), LOGITS[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"norm_eps": 0.009}),
        ("llama", {"attention_scale": 0.34}),
        ("llama3.2", {"rope_scaling": dataclasses.replace(golden.CASES["llama3.2"].rope_scaling, original_length=64)}),
        ("yarn", {"rope_scaling": dataclasses.replace(golden.CASES["yarn"].rope_scaling, attention_factor=1.0)}),
        ("dynamic", {"rope_scaling": None}),
        ("neox", {"activation": "gelu_tanh"}),
        ("neox", {"parallel_residual": False}),
        ("neox", {"rope_fraction": 1.0}),
        ("gpt2", {"activation": "gelu"}),
        ("gpt2_scaled", {"attention_scale_by_layer": False}),
        ("gemma", {"norm_unit_offset": False}),
        ("gemma2", {"window": 6}),
        ("gemma2", {"window_pattern": (False, True)}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma3", {"rope_theta_local": None}),
        ("gemma3", {"window_pattern": (True, True, True, True, False, True)}),
    ],
)
def test_a_wrong_switch_shows(name, changes):
    """The stored logits tell each switch from its neighbor, so agreement with them means something."""
    config = golden.CASES[name]
    wrong = logits(dataclasses.replace(config, **changes), golden.parameters(config))
    assert np.abs(wrong - LOGITS[name]).max() > 5e-4


def test_key_value_heads_in_the_wrong_order_show():
    config = golden.CASES["qwen2"]
    params = golden.parameters(config)
    for part in ("key", "value"):
        kernel = params["blocks"][0]["attention"][part]["kernel"]
        halves = np.split(kernel, config.kv_heads, axis=-1)
        params["blocks"][0]["attention"][part]["kernel"] = np.concatenate(halves[::-1], axis=-1)
    assert np.abs(logits(config, params) - LOGITS["qwen2"]).max() > 5e-4
