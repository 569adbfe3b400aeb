import pytest

from jaxlm.core import trees
from jaxlm.core.errors import ConfigError
from jaxlm.models import Decoder
from jaxlm.models.presets import PARAMETERS, PRESETS, preset


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameter_counts_are_the_published_ones(name):
    assert trees.count(Decoder(PRESETS[name]).abstract_params()) == PARAMETERS[name]


def test_shared_pretraining_sizes_match_the_papers_count():
    # "60M (58.07M params)", 1339.0M and 6738.1M in the accounting of SCALE (arXiv 2506.16659).
    counts = [trees.count(Decoder(PRESETS[f"llama-{n}"]).abstract_params()) / 1e6 for n in ("60m", "1b", "7b")]
    assert counts == pytest.approx([58.07, 1339.0, 6738.1], abs=0.4)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'smollm2-135m'"):
        preset("smollm-135m")


@pytest.mark.parametrize(("name", "count"), [("150m", 154.1), ("300m", 299.6), ("600m", 602.5), ("1.4b", 1431.4)])
def test_sizes_of_infinite_compute_are_what_they_are_called(name, count):
    # The formula of the authors' configurations: 2 V d + layers (2 d (d + kv) + 3 d f + 2 d).
    assert trees.count(Decoder(PRESETS[f"infinite-{name}"]).abstract_params()) / 1e6 == pytest.approx(count, abs=0.3)
