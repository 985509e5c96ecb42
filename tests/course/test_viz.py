"""Pictures are judged headless: by the data they show, the marks they hold and the pixels that result."""

import base64
import html
import io
import re
import subprocess
import sys
from pathlib import Path

import ipywidgets
import numpy as np
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from dsa_course import viz

TEXT = b"def f(x):\n\treturn x\n\nprint(f(2))\xff\x00"


def bars(heights):
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().bar(range(len(heights)), heights)
    return figure


def pixels(figure):
    """Lightness of each pixel of the page in [0, 1], as a grey printer would show it."""
    grey = np.asarray(Image.open(io.BytesIO(viz.png(figure, "x"))).convert("L")) / 255
    h, w = (n // viz.SHARP * viz.SHARP for n in grey.shape)
    return grey[:h, :w].reshape(h // viz.SHARP, viz.SHARP, w // viz.SHARP, viz.SHARP).mean((1, 3))


def cell(figure, place):
    """The lightness inside one cell of the text grid; place = (column, line, width)."""
    x, y, w = place
    axes = figure.axes[0]
    grey = pixels(figure)
    (left, top), (right, bottom) = axes.transData.transform([(x, y), (x + w, y + 1)]) / viz.SHARP
    rows = slice(grey.shape[0] - round(top), grey.shape[0] - round(bottom))
    return grey[rows, round(left) : round(right)]


# --------------------------------------------------------------------------------------------------------------- PNG


def test_equal_figures_give_equal_bytes_with_the_alt_text_inside():
    one, again, other = (viz.png(bars(h), "Three bars, rising. ≥") for h in ([1, 2, 3], [1, 2, 3], [1, 2, 4]))
    assert one == again != other
    info = Image.open(io.BytesIO(one)).info
    assert info["Description"] == "Three bars, rising. ≥"
    assert "Software" not in info and b"atplotlib" not in one


def test_a_still_picture_carries_its_alt_text():
    data, metadata = DisplayFormatter().format(viz.picture(bars([1]), "One bar."))
    shown = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert shown.format == "PNG" and shown.info["Description"] == "One bar."
    assert metadata["image/png"]["alt"] == "One bar."


@pytest.mark.parametrize(
    "figure, alt, error, named",
    [
        (bars([1]), "  ", ValueError, "alt must describe"),
        (bars([1]), None, TypeError, "alt must be a str"),
        ("not a figure", "x", TypeError, "figure must be a matplotlib Figure, got str"),
    ],
)
def test_png_refuses(figure, alt, error, named):
    with pytest.raises(error, match=named):
        viz.png(figure, alt)


# ------------------------------------------------------------------------------------------------------- LiveFigure


@pytest.fixture
def live():
    slider = ipywidgets.IntSlider(value=3, min=1, max=9)
    box = ipywidgets.Checkbox(value=False)
    return viz.LiveFigure(
        "squares",
        compute=lambda n, double: [(1 + double) * i * i for i in range(n)],
        draw=bars,
        alt=lambda data: f"{len(data)} bars up to {max(data)}.",
        n=slider,
        double=box,
    )


def image(live):
    """What the browser shows: the PNG bytes and the alt text of the img element."""
    (child,) = (child for child in live.children if isinstance(child, ipywidgets.HTML))
    # ipywidgets 8.1 fails in the browser on a tooltip without a description, and no Python test would see it.
    assert child.tooltip is None
    found = re.fullmatch(
        r'(?:<p .*</p>)?<img alt="([^"]*)" style="[^"]*" src="data:image/png;base64,([^"]*)">', child.value
    )
    alt, data = found.groups()
    return base64.b64decode(data), html.unescape(alt)


def control(live, kind):
    return next(child for child in live.children if isinstance(child, kind))


def test_moving_the_slider_computes_and_draws_anew(live):
    slider = control(live, ipywidgets.IntSlider)
    assert live.data == [0, 1, 4] and image(live)[0] == live.png == viz.png(bars([0, 1, 4]), "3 bars up to 4.")
    slider.value = 5
    assert live.data == [0, 1, 4, 9, 16]
    assert image(live)[0] == live.png == viz.png(bars([0, 1, 4, 9, 16]), "5 bars up to 16.")
    control(live, ipywidgets.Checkbox).value = True
    assert live.data == [0, 2, 8, 18, 32]
    slider.value = 3
    control(live, ipywidgets.Checkbox).value = False
    assert image(live)[0] == viz.png(bars([0, 1, 4]), "3 bars up to 4.")
    assert slider.continuous_update is False


def test_the_alt_text_follows_the_data_everywhere(live):
    control(live, ipywidgets.IntSlider).value = 4
    data, metadata = DisplayFormatter().format(live)
    assert live.alt == image(live)[1] == metadata["image/png"]["alt"] == "4 bars up to 9."
    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).info["Description"] == "4 bars up to 9."


def test_what_a_notebook_stores(live):
    assert repr(live) == "LiveFigure('squares', n=3, double=False)"
    bundle, _ = live._repr_mimebundle_()
    assert bundle["text/plain"] == repr(live)
    assert base64.b64decode(bundle["image/png"]) == live.png
    assert "application/vnd.jupyter.widget-view+json" in bundle
    control(live, ipywidgets.IntSlider).value = 2
    assert base64.b64decode(live._repr_mimebundle_()[0]["image/png"]) == viz.png(bars([0, 1]), "2 bars up to 1.")
    assert repr(live) == "LiveFigure('squares', n=2, double=False)"


def test_pictures_are_sharp_and_as_large_as_meant(live):
    """Twice the pixels, and the width that stands in the notebook is that of the page."""
    for _, metadata in (DisplayFormatter().format(viz.picture(bars([1]), "One bar.")), live._repr_mimebundle_()):
        assert metadata["image/png"]["width"] == 200  # a figure of 2 inches
    assert Image.open(io.BytesIO(live.png)).size == (400, 200)
    style = re.search('style="([^"]*)"', live.children[-1].value)[1]
    assert "max-width: min(100%, 200px)" in style and "max-height: calc(100vh - " in style


def test_a_value_that_cannot_be_shown_is_said():
    sliders = {name: ipywidgets.IntSlider(value=1, min=1, max=9, description=name.upper()) for name in ("n", "i")}
    live = viz.LiveFigure(
        "bounded",
        lambda n, i: {"i": min(i, n), "instead": {"i": n} if i > n else {}},
        lambda data: bars([data["i"]]),
        "x",
        **sliders,
    )
    assert "status" not in live.children[-1].value
    sliders["i"].value = 5
    assert '<p role="status">I = 5 is not there with these settings: 1 is shown</p>' in live.children[-1].value
    assert image(live)[1] == "x"
    sliders["n"].value = 7
    assert "status" not in live.children[-1].value and live.data["i"] == 5


def test_a_failing_draw_leaves_the_old_state_whole():
    def draw(data):
        if data > 2:
            raise RuntimeError("no such picture")
        return bars([data])

    slider = ipywidgets.IntSlider(value=1)
    live = viz.LiveFigure("fragile", lambda n: n, draw, "One bar.", n=slider)
    before = live.png
    with pytest.raises(RuntimeError, match="no such picture"):
        slider.value = 3
    assert (live.data, live.png, image(live)[0]) == (1, before, before)


@pytest.mark.parametrize(
    "draw, alt, control, error, named",
    [
        (bars, "", ipywidgets.IntSlider(), ValueError, "alt must describe"),
        (bars, lambda data: None, ipywidgets.IntSlider(), TypeError, "alt must be a str"),
        (lambda data: None, "x", ipywidgets.IntSlider(), TypeError, "figure must be a matplotlib Figure, got NoneType"),
        (bars, "x", 3, TypeError, "n must be an ipywidgets control with a value, got int"),
        (bars, "x", ipywidgets.VBox(), TypeError, "n must be an ipywidgets control with a value, got VBox"),
    ],
)
def test_live_figure_refuses(draw, alt, control, error, named):
    with pytest.raises(error, match=named):
        viz.LiveFigure("bad", lambda n: [n], draw, alt, n=control)


# ------------------------------------------------------------------------------------------------ selection over text


def test_layout_places_every_byte():
    places = viz.layout_of(b"ab\n\tc\nabcdefgh\ni\tj", 8)
    assert places[:3] == [(0, 0, 1), (1, 0, 1), (2, 0, 1)]  # the newline has a cell of its own
    assert places[3:6] == [(0, 1, 4), (4, 1, 1), (5, 1, 1)]  # a tab is four wide
    assert places[13] == (7, 2, 1) and places[14] == (8, 2, 1)  # a newline never wraps alone
    assert viz.layout_of(b"abcdefghi\n", 8)[8:] == [(0, 1, 1), (1, 1, 1)]
    assert viz.layout_of(b"abcdef\tg", 8)[6:] == [(0, 1, 4), (4, 1, 1)]  # a tab that does not fit wraps whole


def test_every_byte_is_written_where_it_belongs():
    figure = viz.selection_over_text(TEXT, 12, [0, 4])
    written = {}
    for text in figure.axes[0].texts:
        x, y = text.get_position()
        for i, glyph in enumerate(text.get_text()):
            if glyph != " ":
                assert (round(x) + i, int(y)) not in written
                written[round(x) + i, int(y)] = (glyph, text.get_color())
    places = viz.layout_of(TEXT, 80)
    expected = TEXT.decode("latin-1").replace("\xff", "·").replace("\x00", "·").replace("\n", "↵")
    for i, ((x, y, _), glyph) in enumerate(zip(places, expected, strict=True)):
        if glyph in " \t":
            assert (x, y) not in written
            continue
        assert written[x, y][0] == glyph
        if glyph != "↵":
            grey = i > 12
            assert (written[x, y][1] == viz.COLOURS["future"]) == grey


def test_selected_bytes_are_dark_and_only_they():
    text = b"        \n        \n"  # blank, so that only marks give ink
    position, selected = 12, [1, 5, 9, -1, 12]
    figure = viz.selection_over_text(text, position, selected)
    places = viz.layout_of(text, 80)
    for i, place in enumerate(places):
        if text[i] == 10:
            continue
        lightness = cell(figure, place)[:, 4:-4]  # clear of the query's frame
        inside, underline = lightness[4:-6], lightness[-4:-1]
        assert (inside.mean() < 0.5) if i in selected else (inside.min() == 1.0), i
        assert (underline.min() < 0.35) == (i in selected), i
    frames = [p for p in figure.axes[0].patches if p.get_edgecolor()[:3] == to_rgb(viz.COLOURS["query"])]
    assert [frame.get_center().round(1).tolist() for frame in frames] == [[3.5, 1.5]]  # byte 12 is column 3 of line 1


def test_more_weight_is_darker_even_in_grey():
    figure = viz.selection_over_text(b"    ", 3, [0, 1, 2, -1], weights=[4.0, 1.0, 0.0, 9.0])
    light = [cell(figure, (x, 0, 1))[4:-6, 3:-3].mean() for x in range(4)]
    assert light[0] + 0.15 < light[1] < light[2] - 0.15 and light[2] < light[3] == 1.0
    equal = viz.selection_over_text(b"    ", 3, [0, 1], weights=[0.0, 0.0])  # no largest weight to divide by
    assert cell(equal, (0, 0, 1)).mean() == cell(equal, (1, 0, 1)).mean()


def test_letters_keep_their_contrast_on_every_shade():
    def luminance(colour):
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    n = 40
    figure = viz.selection_over_text(b"M" * n, n - 1, range(n), weights=np.linspace(0, 1, n))
    faces = {round(p.get_x()): p.get_facecolor() for p in figure.axes[0].patches if p.get_fill()}
    inks = {}
    for text in figure.axes[0].texts:
        for i, glyph in enumerate(text.get_text()):
            if glyph == "M":
                inks[round(text.get_position()[0]) + i] = text.get_color()
    assert len(faces) == len(inks) == n
    for x, ink in inks.items():
        low, high = sorted((luminance(ink), luminance(faces[x])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, x


def test_the_legend_counts_and_names_every_mark():
    figure = viz.selection_over_text(TEXT, 12, [0, 4, -1], weights=[1, 2, 3])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "query",
        "selected (darker: more weight): 2 of 13 visible",
        "visible (black)",
        "future (grey)",
    ]


@pytest.mark.parametrize("columns, size", [(80, 700), (40, 120)])
def test_nothing_falls_off_the_picture(columns, size):
    text = (b"value = table[index]\t# x\n" * 40)[:size]
    figure = viz.selection_over_text(text, size - 1, [0, size - 1], columns=columns)
    renderer = viz.FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    width, height = figure.canvas.get_width_height()
    marks = [*figure.axes[0].texts, *figure.texts, *figure.legends[0].get_texts(), *figure.axes[0].get_yticklabels()]
    for mark in marks:
        box = mark.get_window_extent(renderer)
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height, mark
    rectangles = [p for p in figure.axes[0].patches if isinstance(p, Rectangle)]
    assert len(rectangles) == 3  # two selected, one frame


@pytest.mark.parametrize(
    "changed, error, named",
    [
        ({"text_bytes": "text"}, TypeError, "text_bytes must be bytes, got str"),
        ({"position": 4}, ValueError, r"position must be in \[0, 4\)"),
        ({"selected": [2, 3]}, ValueError, "selected must lie in .* position = 2, got 3"),
        ({"selected": [-2]}, ValueError, "selected must lie in .*got -2"),
        ({"weights": [1.0]}, ValueError, "weights must have one entry for each of the 2 selected, got 1"),
        ({"weights": [1.0, float("nan")]}, ValueError, "weights must be at least 0"),
        ({"columns": 3}, ValueError, "columns must be at least 4"),
    ],
)
def test_selection_over_text_refuses(changed, error, named):
    arguments = {"text_bytes": b"text", "position": 2, "selected": [0, 1], **changed}
    with pytest.raises(error, match=named):
        viz.selection_over_text(**arguments)


# ------------------------------------------------------------------------------------------------------------ curves


def test_recall_curves_show_the_values_and_differ_without_colour():
    ks = [1, 2, 8]
    curves = {f"name {i}": [0.1 * i, 0.5, 1.0] for i in range(len(viz.LINES))}
    axes = viz.recall_curves(ks, curves, title="Recall").axes[0]
    assert [line.get_label() for line in axes.lines] == list(curves)
    for line, values in zip(axes.lines, curves.values(), strict=True):
        assert line.get_xdata().tolist() == ks and line.get_ydata().tolist() == values
    assert len({line.get_marker() for line in axes.lines}) == len(curves)
    assert len({str(line._dash_pattern) for line in axes.lines}) == len(curves)
    assert axes.get_xlabel() == "k, keys selected for each query" and "share" in axes.get_ylabel()
    assert axes.lines[0].get_color() == viz.COLOURS["selected"]


@pytest.mark.parametrize(
    "ks, curves, named",
    [
        ([2, 2], {"a": [0, 1]}, "ks must increase"),
        ([0, 2], {"a": [0, 1]}, "ks must increase"),
        ([1, 2], {}, "curves must hold 1 to 6 names"),
        ([1, 2], {"a": [0, 1, 1]}, "curves must hold 2 values .* for 'a'"),
        ([1, 2], {"a": [0, 1.1]}, "curves must hold 2 values"),
        ([1, 2], {"a": [0, float("nan")]}, "curves must hold 2 values"),
    ],
)
def test_recall_curves_refuse(ks, curves, named):
    with pytest.raises(ValueError, match=named):
        viz.recall_curves(ks, curves)


# ----------------------------------------------------------------------------------------------------- good manners


def test_colours_have_one_meaning_each():
    assert set(viz.COLOURS) == {"query", "selected", "visible", "future", "attention"}
    assert len(set(viz.COLOURS.values())) == len(viz.COLOURS)


def test_imports_stay_light():
    """Only `viz` and the `live` modules draw, and they do it without pyplot."""
    code = (
        "import sys, dsa_ref, dsa_ref.cost, dsa_ref.testing\n"
        "import dsa_course.checks, dsa_course.environment, dsa_course.toy, dsa_course.traps.__main__\n"
        "assert not {'matplotlib', 'ipywidgets', 'IPython'} & set(sys.modules)\n"
        "import dsa_course.viz\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
