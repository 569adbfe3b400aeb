import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.models import Decoder
from jaxlm.surgery import widen_by_tiling
from jaxlm.testing import tiny_decoder
from jaxlm.testing.models import FAMILIES

TOKENS = jnp.arange(24).reshape(2, 12) % 60


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wider_model_computes_the_same(family):
    model, params = tiny_decoder(family, num_layers=2)
    config, wide = widen_by_tiling(model.config, params, 3)
    assert config.embed_dim == 3 * model.config.embed_dim
    found = Decoder(config).apply({"params": wide}, TOKENS)
    np.testing.assert_allclose(found, model.apply({"params": params}, TOKENS), rtol=1e-4, atol=1e-4)
    shapes = Decoder(config).abstract_params()
    assert jax.tree.map(lambda x: x.shape, wide) == jax.tree.map(lambda x: x.shape, shapes)


def test_factor_one_changes_nothing():
    model, params = tiny_decoder("gpt2", num_layers=2)
    _, same = widen_by_tiling(model.config, params, 1)
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_what_cannot_be_widened_is_refused():
    model, params = tiny_decoder("llama", num_layers=2)
    with pytest.raises(ConfigError, match="factor is 0"):
        widen_by_tiling(model.config, params, 0)
    _, other = tiny_decoder("llama", num_layers=2, mlp_dim=32)
    with pytest.raises(ConfigError, match="mlp/down/kernel has shape"):
        widen_by_tiling(model.config, other, 2)
