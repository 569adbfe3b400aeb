"""Writes `experiments/README.md`, the claims of all papers with their figures beside ours.

A result is the `report.json` of a paper's `small` preset, kept as `experiments/results/<slug>.json`.
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from experiments.catalog import HOME, Entry, entries
from jaxlm.core.errors import DataError, nearest
from jaxlm.core.json_files import write_text
from jaxlm.reporting.html import duration
from jaxlm.reporting.report import Cell, Report, format_cell, load

INTRODUCTION = """\
# Claims

This page is written by `python -m experiments gallery` from the results in [results/](results). Every row
is a claim of a paper, the paper's figure, and what the `small` preset measured on the machine named: the
direction of the claim at a size that runs in minutes, not the paper's scale. What does not hold is said so.

`python -m experiments list` shows every experiment; `python -m experiments.<area>.<slug>` runs one.
"""


def write(results: Path = HOME / "results", out: Path = HOME / "README.md") -> str:
    """Writes the page and returns what it holds in one line.

    Raises:
      ConfigError, DataError: a file is not a report, or of no experiment here; names the file.
    """
    reports = read_results(results, entries())
    write_text(out, page(reports))
    claims = [claim for report in reports for claim in report.claims]
    held = sum(claim.holds for claim in claims)
    return f"{out}: {len(reports)} experiments, {len(claims)} claims, {held} hold"


def read_results(results: Path, known: Sequence[Entry]) -> list[Report]:
    """The kept reports in the order of the list of experiments."""
    order = {entry.name: i for i, entry in enumerate(known)}
    reports = []
    for path in sorted(results.glob("*.json")):
        report = load(path)
        if report.experiment not in order:
            hint = nearest(report.experiment, order)
            raise DataError(f"{path}: no experiment '{report.experiment}': {hint}")
        if path.stem != report.experiment.rsplit(".", 1)[-1]:
            raise DataError(f"{path}: holds a report of '{report.experiment}', expected the file's own slug")
        reports.append(report)
    return sorted(reports, key=lambda report: order[report.experiment])


def page(reports: Sequence[Report]) -> str:
    """The page as Markdown; the same for the same reports."""
    if not reports:
        return f"{INTRODUCTION}\nNo results are kept yet.\n"
    claims = [claim for report in reports for claim in report.claims]
    held = sum(claim.holds for claim in claims)
    parts = [INTRODUCTION, f"**{held} of {len(claims)} claims hold, in {len(reports)} experiments.**"]
    area = None
    for report in reports:
        found, slug = report.experiment.rpartition(".")[::2]
        if found != area:
            area = found
            parts.append(f"## {area.replace('_', ' ') or 'main jobs'}")
        parts.append(_experiment(report, f"{found}/{slug}.py" if found else f"{slug}.py"))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _experiment(report: Report, path: str) -> str:
    lines = [f"### [{_text(report.title)}]({path})", "", "| claim | paper | here | |", "|---|---|---|---|"]
    for claim in report.claims:
        statement = _text(claim.statement) + (f"<br>*{_text(claim.note)}*" if claim.note else "")
        verdict = "holds" if claim.holds else "**does not hold**"
        lines.append(f"| {statement} | {_cell(claim.paper_value)} | {_cell(claim.measured)} | {verdict} |")
    if not report.claims:
        lines[2:] = ["No claim is judged here."]
    facts = report.environment
    made = [
        f"`{report.command}`" if report.command else "",
        duration(report.seconds) if report.seconds is not None else "",
        f"{facts.get('devices') or facts.get('cpu', '')}, {facts.get('cores', '?')} cores",
        *(f"{name} {facts[name]}" for name in ("jax", "flax", "optax") if name in facts),
        f"commit {facts['commit']}" if "commit" in facts else "",
        str(facts.get("date", "")),
    ]
    code = [part if part.startswith("`") else _text(part) for part in made if part]
    return "\n".join([*lines, "", f"<sub>{' · '.join(code)}</sub>"])


def _cell(value: Cell) -> str:
    return _text(format_cell(value))


def _text(text: str) -> str:
    """Text that Markdown shows as it is, in one table cell."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", escaped)
