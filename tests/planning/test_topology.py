"""Names of machines; that the devices they stand for are there."""

import importlib.util

import pytest

from jaxlm.core.errors import ConfigError
from jaxlm.planning import CHIPS, find_topology, num_chips, parse_topology
from jaxlm.planning.topology import SHAPES


@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e"])
def test_every_slice_has_as_many_devices_as_its_name_says(kind):
    for shape in SHAPES[kind]:
        name = f"{kind}:{shape}"
        topology = find_topology(name)
        assert len(topology.devices) == num_chips(name)
        assert topology.chip is CHIPS[kind]
        assert topology.devices[0].platform == "tpu"


def test_names():
    assert parse_topology("v5p:2x4x4") == ("v5p", (2, 4, 4))
    assert parse_topology("h200") == ("h200", (1,))
    assert num_chips("h200:8") == 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:16x15", "v5e:16x15' does not exist; the nearest are v5e:16x16, v5e:8x16"),
        ("v5p:3x3x3", "v5p:2x4x4"),
        ("v5e", "does not exist; the nearest are"),
        ("v5e:big", "does not exist; the nearest are"),
        ("v6:2x2", "no machine 'v6', did you mean 'v6e'"),
        ("h200:3", "h200:2"),
        ("", "no machine ''"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_comes_nearest(name, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_topology(name)


@pytest.mark.parametrize(("name", "install"), [("v5e:2x2", r"install '.\[tpu\]'"), ("h200", r"install '.\[cuda\]'")])
def test_a_missing_compiler_says_how_to_install_it(name, install, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=install):
        find_topology(name)
