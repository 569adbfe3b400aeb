"""One self-contained page of a run, `report.html`: no network, no script, no other file.

Everything that comes from outside (names, samples, configuration) is escaped.
"""

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.core.json_files import write_text
from jaxlm.reporting import figures
from jaxlm.reporting.environment import small_print
from jaxlm.reporting.report import Cell, Claim, Figure, Report, Sample, Table, format_cell, printable, save


def page(report: Report, folder: Path | str = ".") -> str:
    """The HTML page of a report.

    Args:
      report: what the run handed back.
      folder: the run folder, where `Figure.image` files lie.
    """
    parts = [
        _header(report),
        _numbers(report.numbers),
        _section("Claims", "".join(map(_claim, report.claims))),
        _section("Figures", "".join(_figure(f, Path(folder), i) for i, f in enumerate(report.figures))),
        _section("Tables", "".join(map(_table, report.tables))),
        _section("Samples", "".join(map(_sample, report.samples))),
        _section("How it was made", _made(report)),
    ]
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(report.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def write(report: Report, folder: Path | str) -> Path:
    """Writes `report.json`, `figures/*.png` and `report.html` into a run folder; returns the page's path.

    The page comes last, and each file is replaced whole.
    """
    folder = Path(folder)
    save(report, folder / "report.json")
    made = small_print(report.environment, report.command)
    for figure in report.figures:
        if figure.series:
            name = re.sub(r"\W+", "_", figure.title.lower()).strip("_") or "figure"
            figures.save_png(figure, folder / "figures" / f"{name}.png", made)
    path = folder / "report.html"
    write_text(path, page(report, folder))
    return path


def _header(report: Report) -> str:
    where = " · ".join(_text(part) for part in ("jaxlm", report.experiment, report.preset) if part)
    verdict = ""
    if report.claims:
        count, held = len(report.claims), report.holding
        kind = "holds" if held == count else "fails"
        noun = "claim holds" if count == 1 else "claims hold"
        verdict = f'<p class="verdict {kind}">{held} of {count} {noun}</p>'
    summary = "".join(f"<p>{_text(part)}</p>" for part in report.summary.split("\n\n") if part.strip())
    return f'<header><p class="where">{where}</p><h1>{_text(report.title)}</h1>{verdict}{summary}</header>'


def _numbers(numbers: Mapping[str, Cell]) -> str:
    tiles = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(format_cell(value))}</dd></div>" for name, value in numbers.items()
    )
    return f'<dl class="numbers">{tiles}</dl>' if tiles else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def _claim(claim: Claim) -> str:
    kind, word = ("holds", "holds") if claim.holds else ("fails", "does not hold")
    note = f'<p class="note">{_text(claim.note)}</p>' if claim.note else ""
    return (
        f'<article class="claim {kind}"><p class="badge">{word}</p>'
        f'<p class="statement">{_text(claim.statement)}</p>'
        f"<dl><div><dt>paper</dt><dd>{_text(format_cell(claim.paper_value))}</dd></div>"
        f"<div><dt>here</dt><dd>{_text(format_cell(claim.measured))}</dd></div></dl>{note}</article>"
    )


def _figure(figure: Figure, folder: Path, number: int) -> str:
    if figure.image:
        body = _image(folder / figure.image, figure.title)
    else:  # one drawing for wide screens and one for phones, where the wide one's text would be too small
        wide = _drawing(figures.svg(figure, 7.2, 3.5), figure.title, f"{number}-wide")
        narrow = _drawing(figures.svg(figure, 3.7, 3.2), figure.title, f"{number}-narrow")
        body = f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'
    caption = f"<span>{_text(figure.caption)}</span>" if figure.caption else ""
    return f"<figure><figcaption><strong>{_text(figure.title)}</strong>{caption}</figcaption>{body}</figure>"


def _image(path: Path, title: str) -> str:
    try:
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return f'<p class="note">The image {_text(path.name)} is missing from the run folder.</p>'
    return f'<img alt="{_text(title)}" src="data:image/png;base64,{data}">'


def _drawing(svg: str, title: str, prefix: str) -> str:
    """An SVG with a name for screen readers, whose ids are its own, so that several on a page do not mix."""
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{_text(title)}" ', 1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="f{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#f{prefix}-\1"', svg)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#f{prefix}-\1)", svg)


def _table(table: Table) -> str:
    numeric = [
        bool(table.rows) and all(isinstance(row[i], (int, float, type(None))) for row in table.rows)
        for i in range(len(table.columns))
    ]
    kind = [' class="number"' if flag else "" for flag in numeric]
    head = "".join(f'<th scope="col"{k}>{_text(name)}</th>' for name, k in zip(table.columns, kind, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{k}>{_text(format_cell(c))}</td>" for c, k in zip(row, kind, strict=True)) + "</tr>"
        for row in table.rows
    )
    caption = f"<p>{_text(table.caption)}</p>" if table.caption else ""
    return (
        f"<h3>{_text(table.title)}</h3>{caption}"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _sample(sample: Sample) -> str:
    note = f'<figcaption class="note">{_text(sample.note)}</figcaption>' if sample.note else ""
    return (
        f'<figure class="sample">{note}<pre><span class="prompt">{_text(sample.prompt)}</span>'
        f"{_text(sample.text)}</pre></figure>"
    )


def _made(report: Report) -> str:
    body = f"<h3>Command</h3><pre>{_text(report.command)}</pre>" if report.command else ""
    facts = dict(report.environment)
    if report.seconds is not None:
        facts = {"took": duration(report.seconds), **facts}
    if facts:
        body += f"<details open><summary>Environment</summary>{_pairs(facts)}</details>"
    if report.config:
        body += f"<details><summary>Configuration</summary>{_pairs(flatten(report.config))}</details>"
    return body


def _pairs(values: Mapping[str, Any]) -> str:
    return (
        '<dl class="pairs">'
        + "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(str(v))}</dd></div>" for k, v in values.items())
        + "</dl>"
    )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with dotted names: `{"model": {"num_layers": 6}}` -> `{"model.num_layers": 6}`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def duration(seconds: float) -> str:
    """A time span as people read it: `"4 min 10 s"`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _text(value: str) -> str:
    return html.escape(printable(value))
