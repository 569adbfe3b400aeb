"""Configurations from JSON: what was written comes back, and values of another type are refused by their name."""

import dataclasses
import enum
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest

from jaxlm.core.configs import from_dict, to_dict
from jaxlm.core.errors import ConfigError
from jaxlm.core.json_files import dumps


class Color(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    maybe: Inner | None = None
    rate: float = 0.5
    rates: tuple[float, ...] = ()
    pair: tuple[int, str] = (1, "a")
    names: list[str] = dataclasses.field(default_factory=list)
    table: Mapping[str, int] = dataclasses.field(default_factory=dict)
    choice: Literal["a", "b"] = "a"
    cell: str | int | float | bool | None = None
    on: bool = True
    path: Path = Path(".")

    def __post_init__(self):
        if self.rate < 0:
            raise ConfigError(f"rate is {self.rate}, expected at least 0")
        if self.rate > 1e6:
            raise OverflowError("too fast")


def test_everything_comes_back():
    config = Outer(
        Inner(3), Inner(4), 2.0, (1.0, math.inf), (2, "b"), ["x"], {"y": 5}, "b", 7, False, Path("/tmp/a")
    )  # fmt: skip
    assert from_dict(Outer, json.loads(dumps(to_dict(config)))) == config
    assert from_dict(Outer, {"rate": 3, "cell": 3}) == Outer(rate=3.0, cell=3)
    assert type(from_dict(Outer, {"cell": 3}).cell) is int
    assert math.isnan(from_dict(Outer, {"rates": ["NaN"]}).rates[0])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "expected an object with fields of Outer"),
        ({"inner": 3}, "config.inner: expected an object"),
        ({"inner": {"size": "x"}}, "config.inner.size is 'x', expected an integer"),
        ({"inner": {"size": True}}, "config.inner.size is True, expected an integer"),
        ({"inner": {"size": None}}, "config.inner.size is None"),
        ({"inner": {"sise": 1}}, "no field 'sise' in Inner: did you mean 'size'"),
        ({"maybe": 3}, "config.maybe: expected an object"),
        ({"rate": "fast"}, "config.rate is 'fast', expected a number"),
        ({"rate": 10**400}, "config.rate is 1000.*expected a number"),
        ({"rate": -1}, "rate is -1.0, expected at least 0"),
        ({"rate": 1e9}, "config: too fast"),
        ({"rates": 3}, "config.rates is 3, expected a list"),
        ({"rates": [1, None]}, r"config.rates\[1\] is None"),
        ({"pair": [1]}, "config.pair has 1 entries, expected 2"),
        ({"names": "abc"}, "config.names is 'abc', expected a list"),
        ({"table": []}, r"config.table is \[\], expected an object"),
        ({"table": {"y": 0.5}}, "config.table.y is 0.5, expected an integer"),
        ({"choice": "c"}, "config.choice is 'c'"),
        ({"choice": []}, "config.choice is"),
        ({"on": 1}, "config.on is 1, expected true or false"),
        ({"path": 1}, "config.path is 1"),
    ],
)
def test_values_of_another_type_are_refused_by_name(values, said):
    with pytest.raises(ConfigError, match=said):
        from_dict(Outer, values)


def test_an_enumeration_is_its_value():
    made = dataclasses.make_dataclass("Made", [("color", Color)], frozen=True)
    assert to_dict(made(Color.RED)) == {"color": "red"}
    assert from_dict(made, {"color": "red"}) == made(Color.RED)
    with pytest.raises(ConfigError, match="config.color is 'blue'"):
        from_dict(made, {"color": "blue"})
