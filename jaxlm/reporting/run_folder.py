"""Reads what a run left in its folder: `config.json`, `metrics.jsonl`, `report.json`. Nothing here needs JAX.

`metrics.jsonl` has one object a line with a `step`, and is only ever appended to. A run that was stopped and
resumed repeats steps: its first line after the resume carries `resumed_at`, the first step that is logged
again, and what was recorded from that step on belongs to the abandoned attempt. Lines of one step are one
row; where a name appears twice, the last line wins.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.core.errors import DataError
from jaxlm.core.json_files import number, read_object

Row = dict[str, Any]

_EVALUATION = re.compile(r"eval/(.+)/([^/]+)")


def read_metrics(folder: Path | str) -> list[Row]:
    """The rows of a run, one a step, in order; empty when nothing was logged yet.

    A last line without its end (the run was killed while writing, or writes now) is left out.

    Raises:
      DataError: a whole line is not an object with an integer `step`; names the file and line.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    rows: dict[int, Row] = {}
    *lines, _torn = path.read_bytes().split(b"\n")
    for count, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {count}: not JSON: {line[:80]!r}") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise DataError(f"{path} line {count}: expected an object with an integer 'step': {line[:80]!r}")
        resumed_at = row.pop("resumed_at", None)
        if type(resumed_at) not in (int, type(None)):
            raise DataError(f"{path} line {count}: resumed_at is {resumed_at!r}, expected an integer")
        if resumed_at is not None:
            rows = {step: kept for step, kept in rows.items() if step < resumed_at}
        rows.setdefault(row["step"], {}).update({name: number(value) for name, value in row.items()})
    return [rows[step] for step in sorted(rows)]


def series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """The steps at which `name` was logged, and its values."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def evaluations(rows: Sequence[Row], measure: str) -> dict[str, tuple[list[int], list[float]]]:
    """Every source evaluated under `eval/<source>/<measure>`, with its steps and values."""
    sources: dict[str, None] = {}
    for row in rows:
        for name in row:
            match = _EVALUATION.fullmatch(name)
            if match and match[2] == measure:
                sources[match[1]] = None
    return {source: series(rows, f"eval/{source}/{measure}") for source in sources}


def read_config(folder: Path | str) -> dict[str, Any]:
    """The resolved config of a run as plain values; `jaxlm.core.configs.from_dict` makes the dataclass.

    Raises:
      DataError: the folder has no readable `config.json`.
    """
    return read_object(Path(folder) / "config.json")
