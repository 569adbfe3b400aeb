"""The page and its figures: everything escaped, self-contained, well formed, and complete."""

import dataclasses
import html.parser
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.reporting import Claim, Figure, Report, Sample, Series, Table, figures
from jaxlm.reporting import html as page_module
from jaxlm.reporting.environment import environment, small_print

HOSTILE = """<script>alert('1')</script>"><img src=x onerror=alert(1)> & $x_1$ \x00 \ud800 日本 --> </pre>"""
VOID = {"meta", "img", "br"}


class Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text, and checks that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def hostile_report():
    h = HOSTILE
    return Report(
        title=h,
        summary=h,
        numbers={h: h, "loss": 1.5},
        claims=(Claim(h, h, h, True, h), Claim("second", 1.0, 2.0, False, "tried")),
        tables=(Table(h, (h, "n"), ((h, 1.25), (h, None)), h),),
        figures=(
            Figure(h, (Series(h, (1, 2), (1.0, 2.0)), Series("b", (1, 2), (2.0, 1.0), "points")), h, h, caption=h),
            Figure("bars", (Series("s", (h, "b"), (1.0, 2.0), "bars"),)),
        ),
        samples=(Sample(h, h, h),),
        experiment=h,
        preset=h,
        command=h,
        seconds=272.0,
        config={h: {h: h}, "seed": 0},
        environment={h: h},
    )


def test_every_text_is_shown_and_none_is_markup():
    text = page_module.page(hostile_report())
    text.encode("utf-8")
    reader = Reader(text)
    assert "script" not in reader.tags
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    shown = HOSTILE.replace("\x00", "␀").replace("\ud800", "?")
    # Title, heading, kicker (2), summary, number (2), claim (4), figure title, caption, legend and labels of
    # two drawings each, table (5), sample (3), command, environment (2), configuration (2).
    assert reader.text.count(shown) >= 22
    assert "1 of 2 claims hold" in reader.text
    assert "4 min 32 s" in reader.text


def test_the_page_needs_nothing_but_itself(tmp_path):
    page_module.write(hostile_report(), tmp_path)
    reader = Reader((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "link" not in reader.tags
    for name, value in reader.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("data:", "#")), value


def test_scattered_points_are_marked_and_not_joined():
    def svg(style: str) -> str:
        return figures.svg(Figure("f", (Series("s", (1, 2, 3), (1.0, 3.0, 2.0), style),)), 7, 3)

    joined, scattered = svg("points"), svg("scatter")
    assert joined.count("<use") == scattered.count("<use")
    assert joined.count("<path") > scattered.count("<path")


def test_ids_on_a_page_are_unique_and_every_reference_has_its_target():
    line = Figure("same", (Series("s", (1, 2), (1.0, 2.0), "points"), Series("t", (1, 2), (2.0, 1.0))))
    reader = Reader(page_module.page(Report("t", figures=(line, line))))
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = [value[1:] for name, value in reader.attributes if name == "xlink:href"]
    targets += [value[5:-1] for name, value in reader.attributes if name == "clip-path"]
    assert targets
    assert set(targets) <= set(ids)


def test_images_are_embedded_and_a_missing_one_is_said(tmp_path):
    figures.save_png(Figure("f", (Series("s", (1, 2), (1.0, 2.0)),)), tmp_path / "figures" / "f.png", "small")
    found = Report("t", figures=(Figure("one", image="figures/f.png"), Figure("two", image="figures/gone.png")))
    reader = Reader(page_module.page(found, tmp_path))
    assert sum(str(value).startswith("data:image/png;base64,") for _, value in reader.attributes) == 1
    assert "gone.png is missing" in reader.text


def test_write_leaves_json_figures_and_page(tmp_path):
    report = dataclasses.replace(hostile_report(), environment=environment())
    assert page_module.write(report, tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.json").exists()
    images = list((tmp_path / "figures").glob("*.png"))
    assert len(images) == 2
    for image in images:
        width, height = struct.unpack(">II", image.read_bytes()[16:24])
        assert width > 1000
        assert height > 500


def test_an_empty_report_is_a_page():
    reader = Reader(page_module.page(Report("Only a title")))
    assert "Only a title" in reader.text
    assert "h2" not in reader.tags


def test_drawings_take_their_colors_from_the_page():
    drawn = figures.svg(Figure("f", (Series("s", (1, 2), (1.0, 2.0)), Series("t", (1, 2), (2.0, 1.0)))), 5, 3)
    for variable in (
        "var(--ink)",
        "var(--faint)",
        "var(--grid)",
        "var(--series-0)",
        "var(--series-1)",
        "var(--sans)",
    ):
        assert variable in drawn
    style = page_module.Path(page_module.__file__).parent.joinpath("style.css").read_text()
    for variable in figures.PAGE_VARIABLES.values():
        assert style.count(f"{variable[4:-1]}:") == 2, variable  # once for light, once for dark


def texts(drawn):
    return [part.split("</text>")[0].split(">")[-1] for part in drawn.split("<text")[1:]]


def test_logarithmic_axes_have_plain_numbers():
    lines = (Series("s", (1, 10, 100), (1.5, 2.5, 4.5)),)
    found = texts(figures.svg(Figure("f", lines, x_scale="log", y_scale="log"), 7, 3))
    assert {"1", "2", "5", "10", "20", "50", "100"} <= set(found)
    assert {"1.5", "2.5", "3", "4"} <= set(found)
    assert not any("$" in text or "^" in text for text in found)


def test_bars_lie_across_where_their_names_have_no_room_upright():
    names = tuple(f"configuration {i}" for i in range(9))
    figure = Figure("f", (Series("s", names, tuple(map(float, range(9))), "bars"),), "arm", "perplexity")
    upright, across = figures.svg(figure, 11, 3), figures.svg(figure, 3.7, 3)
    wide, narrow = texts(upright), texts(across)
    assert "configuration 3" in narrow
    assert "configuration 3" not in wide  # two lines
    turned = [texts("<text" + part)[0] for part in across.split("<text")[1:] if "rotate(-90" in part]
    assert turned == ["arm"]  # the names are on the vertical axis now
    assert "perplexity" in narrow


@pytest.mark.parametrize("y", [(float("nan"),) * 2, (0.0, -1.0), (2.0, 2.0), (1e-9, 1e9), (float("inf"), 1.0)])
@pytest.mark.parametrize("scale", ["linear", "log"])
@pytest.mark.parametrize("style", ["line", "bars"])
@pytest.mark.filterwarnings("error")
def test_no_values_can_stop_a_report(y, scale, style):
    figures.svg(Figure("f", (Series("s", (1, 2), y, style),), y_scale=scale), 4, 3)


def test_the_same_figure_is_drawn_the_same():
    figure = Figure("f", (Series("s", (1, 2), (1.0, 2.0), "points"),))
    assert figures.svg(figure, 5, 3) == figures.svg(figure, 5, 3)


@pytest.mark.parametrize("rows", [0, 3, 500])
def test_loss_curves_of_a_run(rows):
    found = figures.loss_curves([{"step": s, "train/loss": 5.0 - s / 500} for s in range(rows)])
    assert [len(figure.series) for figure in found] == {0: [], 3: [1], 500: [2]}[rows]
    with_evaluations = figures.loss_curves(
        [
            {
                "step": 0,
                "train/loss": 5.0,
                "eval/a/loss": 5.0,
                "eval/a/bits_per_byte": 2.0,
                "eval/b/bits_per_byte": 3.0,
            }
        ]
    )
    assert [[s.name for s in figure.series] for figure in with_evaluations] == [
        ["train", "a, evaluated"],
        ["a", "b"],
    ]


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=300), st.integers(4, 50))
def test_thinning_keeps_ends_and_extremes(values, points):
    x, y = figures.thin(range(len(values)), values, points)
    assert len(x) <= points + 3
    assert (x[0], x[-1]) == (0, len(values) - 1)
    assert (min(y), max(y)) == (min(values), max(values))
    assert list(x) == sorted(set(x))
    assert [values[i] for i in x] == list(y)


def test_smoothing_is_a_centered_mean_that_keeps_straight_lines_and_steps_over_nan():
    line = [3.0 - 0.01 * i for i in range(200)]
    np.testing.assert_allclose(figures.smooth(line), line, rtol=1e-9)
    noisy = np.random.default_rng(0).normal(size=1000)
    assert np.std(figures.smooth(list(noisy))) < 0.3
    line[50] = float("nan")
    np.testing.assert_allclose(figures.smooth(line)[50], 2.5, rtol=1e-2)


def test_environment_says_versions_machine_date_and_commit():
    facts = environment()
    for name in (
        "date",
        "commit",
        "python",
        "jaxlm",
        "jax",
        "flax",
        "optax",
        "cpu",
        "cores",
        "memory",
        "devices",
    ):
        assert facts[name], name
    assert facts["devices"] == "8 x cpu"
    line = small_print(facts, "python -m experiments.x")
    for part in ("python -m experiments.x", f"jax {facts['jax']}", facts["date"]):
        assert part in line
