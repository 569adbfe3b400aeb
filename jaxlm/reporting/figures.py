"""Draws figures: PNG files that say how they were made, and SVG that takes its colors from the page.

Matplotlib is imported when the first figure is drawn; no pyplot, no display, no global state.
"""

import dataclasses
import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

from jaxlm.reporting.report import Figure, Series, printable
from jaxlm.reporting.run_folder import Row, evaluations, series

INK, FAINT, GRID = "#1c2024", "#6b7280", "#d9dde3"
COLORS = ("#2f6fdb", "#d9622b", "#1f9d76", "#a04fc4", "#c2940a", "#cf3f6b", "#4b8fa8", "#7a6a53")
"""Line colors that can be told apart on white and on near-black, also with the common color blindnesses."""

PAGE_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", GRID: "var(--grid)"} | {
    color: f"var(--series-{i})" for i, color in enumerate(COLORS)
}
"""What each color of an SVG becomes in a page with a light and a dark side."""

MARKERS = "osD^vP"


def loss_curves(rows: Sequence[Row], points: int = 400) -> list[Figure]:
    """The figures of a training run from its metrics: loss with evaluations, and bits per byte by source.

    Args:
      rows: what `read_metrics` returns.
      points: at most about this many points a line are kept; peaks are kept.

    Returns:
      No, one or two figures, by what was logged.
    """
    steps, losses = series(rows, "train/loss")
    curves = []
    if len(steps) > 60:
        curves.append(Series("train, each step", *thin(steps, losses, points), style="faint"))
        curves.append(Series("train, smoothed", *thin(steps, smooth(losses), points)))
    elif steps:
        curves.append(Series("train", steps, losses))
    for source, (at, values) in evaluations(rows, "loss").items():
        curves.append(Series(f"{source}, evaluated", at, values, style="points"))
    figures = []
    if curves:
        figures.append(Figure("Loss", tuple(curves), "step", "loss, nats per token"))
    bits = evaluations(rows, "bits_per_byte")
    if bits:
        lines = tuple(Series(source, *found, style="points") for source, found in bits.items())
        figures.append(Figure("Bits per byte", lines, "step", "bits per byte"))
    return figures


def smooth(values: Sequence[float], part: float = 0.04) -> list[float]:
    """The mean of the values around each one, over `part` of them all, so that it does not lag behind.

    Near the ends the window narrows on both sides. NaN and infinities are left out of the means.
    """
    kept = [value if math.isfinite(value) else 0.0 for value in values]
    sums = [0.0, *itertools.accumulate(kept)]
    counts = [0, *itertools.accumulate(math.isfinite(value) for value in values)]
    reach = max(1, round(len(values) * part / 2))
    means = []
    for i, value in enumerate(values):
        side = min(reach, i, len(values) - 1 - i)
        low, high = i - side, i + side + 1
        count = counts[high] - counts[low]
        means.append((sums[high] - sums[low]) / count if count else value)
    return means


def thin(x: Sequence[float], y: Sequence[float], points: int) -> tuple[list[float], list[float]]:
    """At most about `points` of a line: of every stretch its lowest and highest point, so that peaks stay."""
    if len(x) <= points:
        return list(x), list(y)
    width = -(-2 * len(x) // points)
    kept = {0, len(x) - 1}
    for start in range(0, len(x), width):
        stretch = range(start, min(start + width, len(x)))
        kept |= {min(stretch, key=y.__getitem__), max(stretch, key=y.__getitem__)}
    order = sorted(kept)
    return [x[i] for i in order], [y[i] for i in order]


def save_png(figure: Figure, path: Path | str, small_print: str = "") -> None:
    """Writes a figure as a PNG with how it was made in small print below."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_draw(figure, (7.2, 4.2), "png", small_print))


def svg(figure: Figure, width: float, height: float) -> str:
    """A figure as an SVG element whose colors and font are the page's variables; its size in inches."""
    text = _draw(figure, (width, height), "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"(font(?:-family)?: ?[^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1var(--sans)", text)
    for color, variable in PAGE_VARIABLES.items():
        text = text.replace(color, variable)
    return re.sub(r' (?:width|height)="[^"]*pt"', "", text, count=2)


def _draw(figure: Figure, size: tuple[float, float], kind: str, small_print: str = "") -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    letters = round(size[0] * 13)  # that fit beside each other
    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": FAINT,
        "axes.edgecolor": GRID,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": f"{figure.title!a} {size}",
        "axes.formatter.useoffset": False,
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # a name in a script the font lacks
        canvas = Canvas(figsize=size, layout="constrained", facecolor="none" if kind == "svg" else "white")
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot(facecolor="none")
        if kind == "png":
            canvas.suptitle(printable(figure.title), x=0.01, ha="left", fontweight="bold", fontsize=11)
        _plot(axes, _fitted(figure, letters), letters)
        if small_print:
            canvas.supxlabel(
                "\n".join(textwrap.wrap(printable(small_print), 150)),
                x=0.01,
                ha="left",
                fontsize=6,
                color=FAINT,
            )
        out = io.BytesIO()
        canvas.savefig(out, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _fitted(figure: Figure, letters: int) -> Figure:
    """The figure with its texts printable and in lines that fit, and without values that cannot be drawn."""

    def fit(text: str, width: int = letters) -> str:
        return "\n".join(textwrap.wrap(printable(text), width))

    def drawable(value: float, scale: str) -> bool:
        return math.isfinite(value) and (value > 0 or scale == "linear")

    series, scale = [], figure.y_scale
    if not any(drawable(value, scale) for line in figure.series for value in line.y):
        scale = "linear"
    for line in figure.series:
        x = tuple(printable(value) if isinstance(value, str) else value for value in line.x)
        y = tuple(value if drawable(value, scale) else math.nan for value in line.y)  # a gap in a line
        if line.style == "bars":
            y = tuple(0.0 if value != value else value for value in y)
        series.append(dataclasses.replace(line, name=fit(line.name, letters - 8), x=x, y=y))
    labels = {"x_label": fit(figure.x_label), "y_label": fit(figure.y_label, 36)}
    return dataclasses.replace(figure, series=tuple(series), y_scale=scale, **labels)


def _plot(axes, figure: Figure, letters: int) -> None:
    bars = figure.series[0].style == "bars"
    across = _plot_bars(axes, figure, letters) if bars else _plot_lines(axes, figure)
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
    if across:
        axes.set(xlabel=figure.y_label, ylabel=figure.x_label)
    axes.grid(axis="x" if across else "y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "bottom" if across else "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(which="both", length=0)
    if len(figure.series) > 1 or figure.series[0].name not in ("", figure.y_label):
        longest = max(len(part) for line in figure.series for part in line.name.splitlines() or [""])
        columns = max(1, min(len(figure.series), 4, letters // (longest + 6)))
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
        axes.legend(frameon=False, ncols=columns, fontsize=8.5, **place)


def _plot_lines(axes, figure: Figure) -> bool:
    color = 0
    for i, line in enumerate(figure.series):
        look = {"label": line.name, "color": COLORS[color % len(COLORS)], "linewidth": 1.6}
        if line.style in ("points", "scatter"):
            look |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 4.5, "linewidth": 1}
        if line.style == "scatter":
            look |= {"linestyle": "none"}
        if line.style == "faint":
            look |= {"alpha": 0.3, "linewidth": 0.8}
        else:
            color += 1  # the line that belongs to a faint one follows, and has its color
        axes.plot(line.x, line.y, **look)
    axes.margins(x=0.02)
    _scale(axes, "x", figure.x_scale)
    _scale(axes, "y", figure.y_scale)
    return False


def _plot_bars(axes, figure: Figure, letters: int) -> bool:
    """Bars beside each other, upright if their names have room there. Returns whether they lie across."""
    names = list(dict.fromkeys(str(x) for line in figure.series for x in line.x))
    room = letters // len(names) - 2
    across = any(len(word) > room for name in names for word in name.split())
    draw = axes.barh if across else axes.bar
    width = 0.8 / len(figure.series)
    for i, line in enumerate(figure.series):
        offset = (i - (len(figure.series) - 1) / 2) * width
        at = [names.index(str(x)) + offset for x in line.x]
        draw(at, line.y, width * 0.92, label=line.name, color=COLORS[i % len(COLORS)])
    wrapped = [textwrap.fill(name, letters // 2 if across else room) for name in names]
    (axes.set_yticks if across else axes.set_xticks)(range(len(names)), wrapped)
    if across:
        axes.invert_yaxis()
    _scale(axes, "x" if across else "y", figure.y_scale)
    return across


def _scale(axes, axis: str, scale: str) -> None:
    """Sets the scale; a logarithmic one has plain numbers, at 1, 2 and 5 or more densely if it is short."""
    if scale == "linear":
        return
    from matplotlib import ticker

    getattr(axes, f"set_{axis}scale")("log")
    low, high = sorted(getattr(axes, f"get_{axis}lim")())
    decades = math.log10(high / low)
    steps = (1,) if decades > 4 else (1, 2, 5) if decades > 1 else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    ticks = getattr(axes, f"{axis}axis")
    ticks.set_major_locator(ticker.LogLocator(subs=steps, numticks=12))
    ticks.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
    ticks.set_minor_locator(ticker.NullLocator())
