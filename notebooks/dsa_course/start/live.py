"""Notebooks 00 and 04b: what was selected over text, and beside it what the model then holds to come next."""

import ipywidgets

from dsa_ref.training.evaluate import selected_weights

from .. import viz
from .guesses import SHOWN, reader

WIDE = ipywidgets.Layout(width="700px")  # a pixel of the slider is about a byte of the text
NAMES = {10: "↵", 32: "␣", 9: "⇥"}  # bytes that leave no ink
WAYS = (("dense", "all", "attention"), ("sparse", "chosen", "selected"))  # way, its word, the colour of its bars


def beside(text_bytes, seen):
    """The text with what was chosen, and to its right both guesses: fits a laptop's screen."""
    marks = (seen["byte"], seen["chosen"], seen["weights"])
    figure = viz.selection_over_text(text_bytes, *marks, columns=72, room=(2.6, 0), cell=0.085)
    width, height = figure.get_size_inches()
    for place, way in enumerate(WAYS):
        _guesses(figure, (width - 2.3, height - 1.55 - 1.9 * place), seen, way)
    return figure


def above(text_bytes, seen, written):
    """The text with what was chosen, and above it both guesses and what the model writes: fits a phone.

    written: {way: str}, what `write_on` gave.
    """
    marks = (seen["byte"], seen["chosen"], seen["weights"])
    figure = viz.selection_over_text(text_bytes, *marks, columns=50, room=(0, 2.1))
    width, height = figure.get_size_inches()
    for place, way in enumerate(WAYS):
        left = 0.4 + place * width / 2
        _guesses(figure, (left, height - 1.5), seen, way)
        writes = {"family": "DejaVu Sans Mono", "size": 12, "weight": "bold", "color": viz.COLOURS[way[2]]}
        words = f"{_glyph(text_bytes[seen['byte']])} → {written[way[0]]}"
        figure.text(left / width, 1 - 1.83 / height, words, parse_math=False, **writes)
    return figure


def describe(seen):
    """The picture in words: what was looked at, and both guesses."""
    count = int((seen["chosen"] >= 0).sum())
    best = {way: ", ".join(f"{_glyph(byte)} {p:.0%}" for byte, p in seen[way][:2]) for way in ("dense", "sparse")}
    return (
        f"Source text; byte {seen['byte']} is the query; {count} of the {seen['byte'] + 1} bytes so far are chosen. "
        f"Next byte from all of them: {best['dense']}. From the chosen ones: {best['sparse']}."
    )


def live_next_byte(tokens, byte, k, shown) -> viz.LiveFigure:
    """Two sliders, the query's byte and k: what is looked at, and the next bytes that the model holds likeliest.

    tokens: int64 [T], of which the first `shown` are on the picture. byte, k: where the sliders start.
    """
    look, text = reader(tokens), bytes(tokens[:shown].tolist())
    sliders = {
        "byte": ipywidgets.IntSlider(byte, min=0, max=shown - 1, description="byte t", layout=WIDE),
        "k": ipywidgets.SelectionSlider(options=(4, 16, 64, 256), value=k, description="k"),
    }
    return viz.LiveFigure("next byte", look, lambda seen: beside(text, seen), describe, **sliders)


def live_selection(text_bytes, steps, scale, byte, layer) -> viz.LiveFigure:
    """Text with two sliders: the query's byte, and the layer whose selection and weights are shown.

    text_bytes: bytes, some 700 fit a screen. steps: what a sparse forward pass recorded, one dict a layer, for at least
    these bytes. scale: the softmax scale. byte, layer: where the sliders start. `.data`: byte, layer, chosen, weights.
    """

    def look(byte, layer):
        chosen, weights = steps[layer]["indices"][byte], selected_weights(steps[layer], byte, scale)
        return {"byte": byte, "layer": layer, "chosen": chosen.cpu(), "weights": weights.cpu()}

    def draw(data):
        marks = (data["byte"], data["chosen"], data["weights"])
        return viz.selection_over_text(text_bytes, *marks, cell=0.085)

    def say(data):
        count = int((data["chosen"] >= 0).sum())
        return (
            f"{len(text_bytes)} bytes of text. For byte {data['byte']}, layer {data['layer']} selected {count} of them."
        )

    sliders = {
        "byte": ipywidgets.IntSlider(byte, min=0, max=len(text_bytes) - 1, description="byte t", layout=WIDE),
        "layer": ipywidgets.IntSlider(layer, min=0, max=len(steps) - 1, description="layer"),
    }
    return viz.LiveFigure("selection", look, draw, say, **sliders)


def _guesses(figure, corner, seen, way):
    """One panel, 1.1 inches high, with its lower left corner there: the likeliest next bytes as bars."""
    (width, height), (name, word, colour) = figure.get_size_inches(), way
    axes = figure.add_axes((corner[0] / width, corner[1] / height, 1.35 / width, 1.1 / height))
    visible, count = seen["byte"] + 1, int((seen["chosen"] >= 0).sum())
    bytes_used = f"all {visible} bytes" if word == "all" else f"{count} of {visible} bytes"
    axes.set_title(f"next byte, from {bytes_used}", fontsize=9, loc="left")
    for row, (byte, probability) in enumerate(seen[name]):
        axes.barh(row, probability, height=0.6, color=viz.COLOURS[colour])
        mark = "  ← in the text" if byte == seen["next"] else ""
        axes.text(probability + 0.03, row, f"{probability:.0%}{mark}", va="center", fontsize=8, clip_on=False)
    labels = [_glyph(byte) for byte, _ in seen[name]]
    axes.set_yticks(range(SHOWN), labels=labels, family="DejaVu Sans Mono", fontsize=12, parse_math=False)
    axes.set(xlim=(0, 1.25), ylim=(SHOWN - 0.4, -0.6), xticks=[])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _glyph(byte):
    return NAMES.get(byte) or viz.glyph_of(byte)
