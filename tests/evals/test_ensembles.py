"""The loss of a growing ensemble is that of each ensemble by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.data.resident import ResidentRows
from jaxlm.evals import growing_ensemble_loss, resident_loss
from jaxlm.models import Decoder, EnsembleModel, stack_members
from jaxlm.models.ensemble import COMBINE
from jaxlm.objectives import CausalLM
from jaxlm.testing import randomize, tiny_config

MODEL = Decoder(tiny_config("llama", num_layers=1))
MEMBERS = [randomize(MODEL.init(jax.random.key(i))["params"], i) for i in range(3)]
IDS = np.random.default_rng(0).integers(0, 64, (7, 9)).astype(np.int32)
ROWS = ResidentRows(
    {"inputs": jnp.asarray(IDS[:, :-1]), "targets": jnp.asarray(IDS[:, 1:]), "loss_weights": jnp.ones((7, 8))}
)


@pytest.mark.parametrize("combine", COMBINE)
def test_every_size_is_the_ensemble_of_the_first_members(combine):
    # Seven rows in batches of three: the last batch is filled up with rows that do not count.
    found = jax.jit(growing_ensemble_loss(MODEL, ROWS, 3, combine))(stack_members(MEMBERS))
    plain = resident_loss(CausalLM(EnsembleModel(MODEL, combine)), ROWS, 7)
    expected = [float(plain(stack_members(MEMBERS[:k]))) for k in (1, 2, 3)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert float(found[0]) == pytest.approx(float(resident_loss(CausalLM(MODEL), ROWS, 3)(MEMBERS[0])), rel=1e-4)


def test_what_cannot_be_combined_is_refused():
    with pytest.raises(ConfigError, match="combine is 'votes'"):
        growing_ensemble_loss(MODEL, ROWS, 3, "votes")
