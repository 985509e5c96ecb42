"""Pictures for the course: still ones with alt text, live ones with sliders, and the two that recur.

Figures are built as objects, without pyplot, so that nothing is global: no backend, no list of open figures. Every
colour has one meaning throughout, and every picture also works in grey, since shape and lightness say the same.
"""

import base64
import html
import io
import re

import ipywidgets
import numpy as np
import PIL.Image
from IPython.display import Image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import NullLocator
from PIL.PngImagePlugin import PngInfo

from dsa_ref.training.evaluate import selected_weights

COLOURS = {
    "query": "#c1440e",  # the position that asks
    "selected": "#0b5394",  # what the indexer keeps for it
    "visible": "#ffffff",  # what it may keep
    "future": "#949494",  # what it may not
    "attention": "#2e7d4f",  # what dense attention looks at
}
LINES = (  # one (colour, line, marker) a curve, in order: the indexer first, its controls in greys
    (COLOURS["selected"], "-", "o"),
    ("#222222", "--", "s"),
    ("#777777", ":", "^"),
    ("#444444", "-.", "D"),
    ("#999999", (0, (6, 2)), "v"),
    ("#000000", (0, (1, 1)), "x"),
)
FAINT = "#d0d0d0"  # marks that mean nothing: newlines
DPI = 100  # of the page: a figure of 7 inches is 700 pixels of CSS wide
SHARP = 2  # pixels of the PNG for each of those, for screens that have them
ABOVE = 240  # pixels of a screen's height: JupyterLab's bars, and a row or two of controls above the picture
TAB = 4  # cells
MONO_ADVANCE = 0.602  # width of a DejaVu Sans Mono character, of its size


def png(figure, alt) -> bytes:
    """The figure as PNG bytes with `alt` as its description, in 256 colours; equal figures give equal bytes.

    Raises: TypeError unless figure is a matplotlib Figure and alt a str, ValueError for an empty alt.
    """
    if not isinstance(figure, Figure):
        raise TypeError(f"figure must be a matplotlib Figure, got {type(figure).__name__}")
    if not isinstance(alt, str):
        raise TypeError(f"alt must be a str that describes the picture, got {type(alt).__name__}")
    if not alt.strip():
        raise ValueError("alt must describe the picture in words, got an empty str")
    canvas, buffer, description = FigureCanvasAgg(figure), io.BytesIO(), PngInfo()
    description.add_itxt("Description", alt)
    figure.dpi = SHARP * DPI
    canvas.draw()
    pixels = PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # A third of the bytes of a picture in full colour, and as good: edges of letters are all that many colours serve.
    pixels.quantize(256, dither=PIL.Image.Dither.NONE).save(buffer, "PNG", compress_level=6, pnginfo=description)
    return buffer.getvalue()


def picture(figure, alt) -> Image:
    """A figure for a cell's last line: it shows as a PNG that carries its alt text. Errors as `png`."""
    data = png(figure, alt)
    return Image(data=data, format="png", alt=alt, width=width_of(data))


def width_of(data) -> int:
    """How wide a PNG made by `png` stands on a page, in CSS pixels."""
    return PIL.Image.open(io.BytesIO(data)).width // SHARP


class LiveFigure(ipywidgets.VBox):
    """A picture with controls above it: a moved control computes anew and draws anew. A PNG where no kernel runs.

    Controls stand side by side, and the picture shrinks until it fits the screen with them. Where `compute` cannot take
    a control's value, data is a dict whose "instead" has {the control's name: the value shown}, and the figure says so.

    name: str, for the repr. compute(**values) -> data; draw(data) -> matplotlib Figure. Kept apart so that a test can
    look at `.data` and never at pixels. alt: what the picture shows, a str or a function of data giving one.
    controls: one ipywidgets control for each argument of compute.

    `.data`, `.alt` and `.png` (bytes) are those of the state on show. Raises: TypeError or ValueError for a control
    without a value, a draw that gives no Figure, or an alt that is no text; what compute raises is passed on.
    """

    def __init__(self, name, compute, draw, alt, **controls):
        self._name, self._compute, self._draw, self._describe, self._controls = name, compute, draw, alt, controls
        for key, control in controls.items():
            if not isinstance(control, ipywidgets.Widget) or not control.has_trait("value"):
                raise TypeError(f"{key} must be an ipywidgets control with a value, got {type(control).__name__}")
        self._refresh()
        self._image = ipywidgets.HTML(self._img(), layout=ipywidgets.Layout(width="100%"))
        for control in controls.values():
            if control.has_trait("continuous_update"):
                control.continuous_update = False  # once a move, not once a pixel
            control.observe(self._show, "value")
        wrapped = ipywidgets.Layout(flex_flow="row wrap", width="100%")
        super().__init__([*controls.values(), self._image], layout=wrapped)

    def _refresh(self):
        data = self._compute(**{key: control.value for key, control in self._controls.items()})
        alt = self._describe(data) if callable(self._describe) else self._describe
        self.png = png(self._draw(data), alt)
        self.data, self.alt = data, alt  # after the drawing: a failed one leaves the old state whole

    def _show(self, _change):
        self._refresh()
        self._image.value = self._img()

    def _img(self):
        """An img element of our own: the Image widget knows no alt, and fails in the browser when given a tooltip."""
        data, width = base64.b64encode(self.png).decode(), width_of(self.png)
        fits = (
            f"max-width: min(100%, {width}px); max-height: calc(100vh - {ABOVE}px)"  # one of them rules; none distorts
        )
        return f'{self._note()}<img alt="{html.escape(self.alt)}" style="{fits}" src="data:image/png;base64,{data}">'

    def _note(self):
        """Which controls ask for something that is not there, and what is shown instead."""
        instead = self.data.get("instead", {}) if isinstance(self.data, dict) else {}
        notes = []
        for key, shown in instead.items():
            control = self._controls[key]
            notes.append(f"{control.description} = {control.value} is not there with these settings: {shown} is shown")
        return f'<p role="status">{html.escape("; ".join(notes))}</p>' if notes else ""

    def __repr__(self):
        state = "".join(f", {key}={control.value!r}" for key, control in self._controls.items())
        return f"LiveFigure({self._name!r}{state})"

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs)
        bundle["image/png"] = base64.b64encode(self.png).decode()
        return bundle, {"image/png": {"alt": self.alt, "width": width_of(self.png)}}


def selection_over_text(text_bytes, position, selected, weights=None, columns=80) -> Figure:
    """Source text as a grid, one cell a byte: the query's byte framed, the selected bytes shaded, the future in grey.

    text_bytes: bytes. position: the query's byte. selected: ints, bytes in [0, position], -1 ignored: a row of
    `select_topk`. weights: one number >= 0 for each entry of selected; the shade is the root of weight / largest.
    A newline ends a line and shows as ↵, a tab is four cells wide, a byte that is no printable ASCII is a middle dot.
    Longer lines wrap at `columns`. The numbers on the left are byte offsets. Some 700 bytes stay legible.

    Raises: TypeError for text that is no bytes; ValueError for bad columns, a position outside the text, a selected
    byte outside [0, position], or weights that do not fit selected.
    """
    shades = _shades(text_bytes, position, selected, weights, columns)
    cells = layout_of(text_bytes, columns)
    lines = cells[-1][1] + 1
    inch_a_column, inch_a_line, left, top = 0.1, 0.2, 0.45, 0.1
    legend_columns, bottom = (4, 0.6) if columns >= 72 else (2, 0.8)
    size = 72 * inch_a_column / MONO_ADVANCE  # so that a line of text falls into the cells by itself
    font = {"family": "DejaVu Sans Mono", "size": size, "parse_math": False}
    width, height = max(5.0, left + (columns + 1) * inch_a_column + 0.1), bottom + lines * inch_a_line + top
    figure = Figure(figsize=(width, height), facecolor=COLOURS["visible"])
    box = (left / width, bottom / height, (columns + 1) * inch_a_column / width, lines * inch_a_line / height)
    axes = figure.add_axes(box, xlim=(0, columns + 1), ylim=(lines, 0))
    axes.spines[:].set_visible(False)
    first_of_line = {y: i for i, (_, y, _) in reversed(list(enumerate(cells)))}
    axes.set_yticks([y + 0.5 for y in first_of_line], labels=[str(i) for i in first_of_line.values()], fontsize=7)
    axes.tick_params(length=0, colors="#555555")
    axes.set_xticks([])
    note = {"fontsize": 7, "color": "#555555", "va": "top"}
    figure.text(0.1 / width, (bottom - 0.06) / height, "↑ byte offset of each line's start", **note)
    scale = LinearSegmentedColormap.from_list("selected", [COLOURS["visible"], COLOURS["selected"]])
    layers = {}  # (line, ink) -> its characters, drawn in runs: one text object for each byte would take a second
    for i, ((x, y, w), byte) in enumerate(zip(cells, text_bytes, strict=True)):
        glyph, ink = glyph_of(byte), "black" if i <= position else COLOURS["future"]
        if i in shades:
            axes.add_patch(Rectangle((x, y), w, 0.96, facecolor=scale(0.2 + 0.8 * shades[i]), linewidth=0))
            # The mark lies above the glyph: below it would hide an underscore.
            axes.hlines(y + 0.08, x + 0.1, x + w - 0.1, color="black", linewidth=1.4)
            ink = "white" if shades[i] > 0.72 else "black"  # whichever has more contrast, at least 4.5 to 1
        elif glyph == "↵":
            ink = FAINT
        layers.setdefault((y, ink), [" "] * (columns + 1))[x] = glyph
    for (y, ink), line in layers.items():
        for run in re.finditer(r"\S+( \S+)*", "".join(line)):
            axes.text(run.start(), y + 0.72, run[0], color=ink, **font)
    x, y, w = cells[position]
    frame = {"fill": False, "edgecolor": COLOURS["query"], "linewidth": 2.0, "zorder": 4, "clip_on": False}
    axes.add_patch(Rectangle((x - 0.1, y - 0.02), w + 0.2, 1, **frame))
    shown = "selected" if weights is None else "selected (darker: more weight)"
    legend = [
        Patch(facecolor="none", edgecolor=COLOURS["query"], linewidth=2.0, label="query"),
        Patch(facecolor=scale(1.0), edgecolor="black", label=f"{shown}: {len(shades)} of {position + 1} visible"),
        Patch(facecolor=COLOURS["visible"], edgecolor="black", linewidth=0.5, label="visible (black)"),
        Patch(facecolor=COLOURS["future"], label="future (grey)"),
    ]
    figure.legend(handles=legend, loc="lower center", ncols=legend_columns, fontsize=8, frameon=False)
    return figure


def live_selection(text_bytes, steps, scale, byte, layer) -> LiveFigure:
    """`selection_over_text` with two sliders: the query's byte, and the layer whose selection and weights are shown.

    text_bytes: bytes, some 800 fit a screen. steps: what a sparse forward pass recorded, one dict a layer, for at least
    these bytes. scale: the softmax scale. byte, layer: where the sliders start. `.data`: byte, layer, chosen, weights.
    """

    def look(byte, layer):
        chosen, weights = steps[layer]["indices"][byte], selected_weights(steps[layer], byte, scale)
        return {"byte": byte, "layer": layer, "chosen": chosen.cpu(), "weights": weights.cpu()}

    def draw(data):
        return selection_over_text(text_bytes, data["byte"], data["chosen"], data["weights"])

    def describe(data):
        count = int((data["chosen"] >= 0).sum())
        return (
            f"{len(text_bytes)} bytes of text. For byte {data['byte']}, layer {data['layer']} selected {count} of them."
        )

    wide = ipywidgets.Layout(width="800px")  # a pixel of the slider is about a byte of the text
    sliders = {
        "byte": ipywidgets.IntSlider(byte, min=0, max=len(text_bytes) - 1, description="byte t", layout=wide),
        "layer": ipywidgets.IntSlider(layer, min=0, max=len(steps) - 1, description="layer"),
    }
    return LiveFigure("selection", look, draw, describe, **sliders)


def _shades(text_bytes, position, selected, weights, columns):
    """The checked arguments as {selected byte: shade in [0, 1]}."""
    if not isinstance(text_bytes, (bytes, bytearray)):
        raise TypeError(f"text_bytes must be bytes, got {type(text_bytes).__name__}")
    if columns < TAB:
        raise ValueError(f"columns must be at least {TAB}, got {columns}")
    if not 0 <= position < len(text_bytes):
        raise ValueError(f"position must be in [0, {len(text_bytes)}), the bytes of the text, got {position}")
    selected = np.asarray(selected).reshape(-1)
    weights = np.ones(len(selected)) if weights is None else np.asarray(weights, dtype=float).reshape(-1)
    if len(weights) != len(selected):
        raise ValueError(f"weights must have one entry for each of the {len(selected)} selected, got {len(weights)}")
    used = selected != -1
    selected, weights = selected[used], weights[used]
    for i in selected:
        if not 0 <= i <= position:
            raise ValueError(f"selected must lie in [0, position] with position = {position}, got {i}")
    if not (weights >= 0).all():
        raise ValueError("weights must be at least 0 and not NaN")
    largest = weights.max(initial=0.0) or 1.0
    return {int(i): float(weight / largest) ** 0.5 for i, weight in zip(selected, weights, strict=True)}


def layout_of(text_bytes, columns):
    """The place of every byte: [(column, line, width in cells)]. A newline may stand one past the last column."""
    places, x, y = [], 0, 0
    for byte in text_bytes:
        width = TAB if byte == 9 else 1
        if byte != 10 and x + width > columns:
            x, y = 0, y + 1
        places.append((x, y, width))
        x, y = (0, y + 1) if byte == 10 else (x + width, y)
    return places


def glyph_of(byte):
    """The character that stands for a byte in the grid."""
    if byte == 10:
        return "↵"
    if byte == 9:
        return " "
    return chr(byte) if 32 <= byte < 127 else "·"


def recall_curves(ks, curves, title="", ylabel="attention mass on the selected keys (share)") -> Figure:
    """How much is caught by k keys: one line a name, told apart by marker and dash as well as colour.

    ks: increasing ints >= 1. curves: {name: one value in [0, 1] for each k}, the indexer first, then its controls.

    Raises: ValueError for ks that do not increase, values outside [0, 1] or too few for ks, no curve or too many.
    """
    ks = np.asarray(ks)
    if ks.ndim != 1 or len(ks) == 0 or ks[0] < 1 or not (np.diff(ks) > 0).all():
        raise ValueError(f"ks must increase from at least 1, got {ks.tolist()}")
    if not 1 <= len(curves) <= len(LINES):
        raise ValueError(f"curves must hold 1 to {len(LINES)} names, got {len(curves)}")
    figure = Figure(figsize=(7, 4), layout="constrained", facecolor=COLOURS["visible"])
    axes = figure.add_subplot(xlabel="k, keys selected for each query", ylabel=ylabel, ylim=(0, 1.04), title=title)
    for (name, values), (colour, line, marker) in zip(curves.items(), LINES, strict=False):
        values = np.asarray(values, dtype=float)
        if values.shape != ks.shape or not ((values >= 0) & (values <= 1 + 1e-6)).all():
            raise ValueError(f"curves must hold {len(ks)} values in [0, 1] each, got {values.tolist()} for {name!r}")
        axes.plot(ks, values, color=colour, linestyle=line, marker=marker, markersize=6, linewidth=1.8, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, labels=[str(k) for k in ks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False)
    return figure
