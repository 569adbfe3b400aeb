"""What an experiment hands back: claims, numbers, tables, figures and samples, as values JSON can hold."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from jaxlm.core.configs import from_dict, to_dict
from jaxlm.core.errors import ConfigError
from jaxlm.core.json_files import number, read_json, write_json

Cell = str | int | float | bool | None
Style = Literal["line", "faint", "points", "scatter", "bars"]

STYLES = ("line", "faint", "points", "scatter", "bars")
SCALES = ("linear", "log")


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of the paper, its figure, ours, and whether it holds here.

    `note` says what was tried when it does not hold.
    """

    statement: str
    paper_value: Cell
    measured: Cell
    holds: bool
    note: str = ""

    def __post_init__(self):
        _set(self, paper_value=number(self.paper_value), measured=number(self.measured), holds=bool(self.holds))


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns and rows of text and numbers. Every row has one cell a column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def __post_init__(self):
        _set(self, columns=tuple(self.columns), rows=tuple(tuple(map(number, row)) for row in self.rows))
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ConfigError(
                    f"table '{self.title}' row {i} has {len(row)} cells, expected {len(self.columns)}: {row}"
                )


@dataclasses.dataclass(frozen=True)
class Series:
    """Points of one name in a figure. `x` are numbers, or names for bars; arrays are accepted.

    `points` are marked and joined by a line, `scatter` marked alone.
    """

    name: str
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    style: Style = "line"

    def __post_init__(self):
        _set(self, x=_numbers(self.x), y=_numbers(self.y))
        if len(self.x) != len(self.y):
            raise ConfigError(f"series '{self.name}' has {len(self.x)} x but {len(self.y)} y")
        if self.style not in STYLES:
            raise ConfigError(f"series '{self.name}': style is '{self.style}', expected one of {STYLES}")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot kept as data, so that a report can draw it for any screen; or an image file of the run."""

    title: str
    series: tuple[Series, ...] = ()
    x_label: str = ""
    y_label: str = ""
    x_scale: Literal["linear", "log"] = "linear"
    y_scale: Literal["linear", "log"] = "linear"
    caption: str = ""
    image: str = ""
    """Path of a PNG relative to the run folder, for what series cannot show; then `series` is empty."""

    def __post_init__(self):
        _set(self, series=tuple(self.series))
        for name in ("x_scale", "y_scale"):
            if getattr(self, name) not in SCALES:
                raise ConfigError(f"figure '{self.title}': {name} is '{getattr(self, name)}', expected one of {SCALES}")
        if len({line.style == "bars" for line in self.series}) == 2:
            raise ConfigError(f"figure '{self.title}': bars and lines do not go into one figure")
        if bool(self.series) == bool(self.image):
            raise ConfigError(f"figure '{self.title}': give either series or an image")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Text a model wrote, after the prompt it was given."""

    prompt: str
    text: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of a run.

    The fields from `experiment` on say how it was made; the runner fills them in.
    """

    title: str
    summary: str = ""
    numbers: dict[str, Cell] = dataclasses.field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    samples: tuple[Sample, ...] = ()
    experiment: str = ""
    preset: str = ""
    command: str = ""
    seconds: float | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, Cell] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("claims", "tables", "figures", "samples"):
            _set(self, **{name: tuple(getattr(self, name))})
        for name in ("numbers", "environment"):
            _set(self, **{name: {k: number(v) for k, v in getattr(self, name).items()}})

    @property
    def holding(self) -> int:
        """How many claims hold."""
        return sum(claim.holds for claim in self.claims)


def save(report: Report, path: Path | str) -> None:
    """Writes `report.json`."""
    write_json(path, to_dict(report))


def load(path: Path | str) -> Report:
    """Reads `report.json`.

    Raises:
      DataError: the file is missing or not JSON.
      ConfigError: it is not a report; names the file and field.
    """
    return from_dict(Report, read_json(path), where=str(path))


def format_cell(value: Cell) -> str:
    """A cell as people read it: 4 significant digits, thousands apart, yes and no."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")) or value == 0:
            return f"{value:g}"
        if abs(value) >= 1000 and abs(value) < 1e9:
            return f"{value:,.0f}"
        return f"{value:.4g}"
    return value


def printable(text: str) -> str:
    """Text that any page or drawing can hold: control characters and half surrogates become symbols."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda m: chr(0x2400 + ord(m[0])), text)
    return re.sub(r"[\x7f-\x9f\ufffe\uffff]", "\ufffd", text)


def _numbers(values: Iterable) -> tuple:
    values = values.tolist() if hasattr(values, "tolist") else values
    return tuple(map(number, values))


def _set(instance: Any, **fields: Any) -> None:
    for name, value in fields.items():
        object.__setattr__(instance, name, value)
