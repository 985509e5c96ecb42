"""Notebook 06: pairs that turn, q·k against distance, and what a swapped layout does to a trained selection."""

import ipywidgets
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from dsa_ref.rope import rope

from ..viz import COLOURS, FAINT, LINES, LiveFigure, selection_over_text

LAYOUTS = ("interleaved", "half")
AFTER, BEFORE = LINES[0][0], LINES[2][0]  # turned, and as it was: also told apart by width and dash

# Soft edges of letters are more than half of a picture's bytes; this font is clear without them.
PLAIN = {"family": "DejaVu Sans Mono", "fontsize": 8.5, "antialiased": False}


def pairs_of(layout, R):
    """The dims that turn together, [(a, b)] for pair i = 0 ... R/2 - 1."""
    return [(2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + R // 2) for i in range(R // 2)]


def live_pairs(x, freqs, position=3, layout="interleaved") -> LiveFigure:
    """Eight (R/2) clock faces: the direction of each pair of x [R] before and after turning by position · frequency.

    `.data`: position, layout, pairs [(a, b)], angles in radians, before and after [R/2, 2].
    """
    R = 2 * len(freqs)

    def look(position, layout):
        pairs = pairs_of(layout, R)
        turned = rope(x[None, :R], torch.tensor([position]), freqs, layout)[0]
        before, after = (np.array([[float(v[a]), float(v[b])] for a, b in pairs]) for v in (x, turned))
        angles = [position * float(f) for f in freqs]
        return {
            "position": position, "layout": layout, "pairs": pairs, "angles": angles, "before": before, "after": after,
        }  # fmt: skip

    def draw(data):
        figure = Figure(figsize=(5.6, 3.3), facecolor=COLOURS["visible"])
        _strip(figure.add_axes((0.03, 0.82, 0.94, 0.17)), data["pairs"], R, data["layout"])
        columns = 4
        for i, (pair, angle) in enumerate(zip(data["pairs"], data["angles"], strict=True)):
            row, column = divmod(i, columns)
            axes = figure.add_axes((0.03 + 0.24 * column, 0.45 - 0.385 * row, 0.22, 0.29))
            axes.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal")
            axes.axis("off")
            axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor=FAINT))
            for vector, colour, line, width in (
                (data["before"][i], BEFORE, ":", 2.0),
                (data["after"][i], AFTER, "-", 2.4),
            ):
                tip = vector / np.linalg.norm(vector)
                axes.plot([0, tip[0]], [0, tip[1]], color=colour, linestyle=line, linewidth=width)
                axes.plot(*tip, color=colour, marker="o", markersize=5)
            axes.set_title(f"({pair[0]}, {pair[1]}) by {np.degrees(angle):.1f}°", pad=1, **PLAIN)
        legend = "dotted: before · solid: turned by position · frequency · all of length 1"
        figure.text(0.5, 0.015, legend, ha="center", **PLAIN)
        return figure

    def describe(data):
        return (
            f"Layout {data['layout']}, position {data['position']}: {len(data['pairs'])} circles, one for each pair. "
            f"The first pair, dims {data['pairs'][0]}, turned by {np.degrees(data['angles'][0]):.0f} degrees, "
            f"the last, dims {data['pairs'][-1]}, by {np.degrees(data['angles'][-1]):.1f}."
        )

    controls = {
        "position": ipywidgets.IntSlider(position, min=0, max=60, description="position"),
        "layout": ipywidgets.Dropdown(options=LAYOUTS, value=layout, description="layout"),
    }
    return LiveFigure("pairs", look, draw, describe, **controls)


def _strip(axes, pairs, R, layout):
    """The R dims as a row of cells, an arc between the two of each pair."""
    axes.set(xlim=(-0.2, R + 0.2), ylim=(-0.2, 2.3))
    axes.axis("off")
    for d in range(R):
        axes.plot([d, d + 1, d + 1, d, d], [0, 0, 0.8, 0.8, 0], color="#777777", linewidth=0.8)
        axes.text(d + 0.5, 0.36, str(d), ha="center", va="center", **PLAIN)
    for a, b in pairs:
        x = np.linspace(0, np.pi, 30)
        height = 0.5 if layout == "interleaved" else 1.2
        axes.plot((a + b + 1) / 2 - np.cos(x) * (b - a) / 2, 0.85 + height * np.sin(x), color=AFTER, linewidth=1.2)


def live_distance(q, k, freqs, position=40, q_layout="half", k_layout="interleaved") -> LiveFigure:
    """q·k against the distance between them, for a key at position 0 and for one at the slider's position.

    q, k: [D] each, before RoPE. `.data`: distance, at_zero, at_position, difference (the largest), and the controls.
    """
    distance = torch.arange(64)

    def dots(position, q_layout, k_layout):
        T = len(distance)
        queries = rope(q.expand(T, -1), distance + position, freqs, q_layout)
        keys = rope(k.expand(T, -1), torch.full((T,), position), freqs, k_layout)
        return (queries * keys).sum(dim=-1).numpy()

    def look(position, q_layout, k_layout):
        at_zero, at_position = (dots(p, q_layout, k_layout) for p in (0, position))
        return {
            "position": position,
            "layouts": (q_layout, k_layout),
            "distance": distance.numpy(),
            "at_zero": at_zero,
            "at_position": at_position,
            "difference": float(np.abs(at_zero - at_position).max()),
        }

    def holds(data):
        return data["difference"] < 1e-3 * np.abs(data["at_zero"]).max()

    def draw(data):
        figure = Figure(figsize=(5.6, 2.8), layout="constrained", facecolor=COLOURS["visible"])
        word = "one curve, the distance decides" if holds(data) else "two curves, the place matters"
        axes = figure.add_subplot(
            xlabel="distance from key to query (tokens)",
            ylabel="q·k (no unit)",
        )
        axes.set_title(f"query {data['layouts'][0]}, key {data['layouts'][1]}: {word}", fontsize=10)
        axes.plot(
            data["distance"], data["at_position"], color=AFTER, linewidth=2.8,
            label=f"key at position {data['position']}",
        )  # fmt: skip
        axes.plot(data["distance"], data["at_zero"], color=LINES[1][0], linestyle="--", label="key at position 0")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=9)
        return figure

    def describe(data):
        word = "coincide" if holds(data) else "differ"
        return (
            f"q·k against distance 0 to 63, query layout {data['layouts'][0]}, key layout {data['layouts'][1]}. "
            f"The curves for a key at position 0 and at {data['position']} {word}."
        )

    controls = {
        "position": ipywidgets.IntSlider(position, min=1, max=500, description="key at"),
        "q_layout": ipywidgets.Dropdown(options=LAYOUTS, value=q_layout, description="query"),
        "k_layout": ipywidgets.Dropdown(options=LAYOUTS, value=k_layout, description="key"),
    }
    return LiveFigure("distance", look, draw, describe, **controls)


def live_layouts(text_bytes, selections, byte, layer, layout) -> LiveFigure:
    """`selection_over_text` with a choice of layout: what the trained indexer keeps if its vectors are turned wrongly.

    text_bytes: bytes. selections: {name of a layout: one int32 [T, k] a layer}, the trained one first. byte, layer,
    layout: where the controls start. `.data`: byte, layer, layout, chosen, shared (how many the trained one keeps too).
    """
    names = list(selections)

    def look(byte, layer, layout):
        chosen, trained = (selections[name][layer][byte] for name in (layout, names[0]))
        shared = len((set(chosen.tolist()) & set(trained.tolist())) - {-1})
        return {"byte": byte, "layer": layer, "layout": layout, "chosen": chosen, "shared": shared}

    def draw(data):
        figure = selection_over_text(text_bytes, data["byte"], data["chosen"])
        width, height = figure.get_size_inches()
        title = f"layer {data['layer']}, {data['layout']}: {data['shared']} of {_kept(data)} as trained"
        grown = height + 0.3
        for axes in figure.axes:
            box = axes.get_position()
            axes.set_position((box.x0, box.y0 * height / grown, box.width, box.height * height / grown))
        for text in figure.texts:
            text.set_y(text.get_position()[1] * height / grown)
        figure.set_size_inches(width, grown)
        figure.text(0.5, 1 - 0.08 / grown, title, ha="center", va="top", fontsize=10)
        for glyphs in figure.axes[0].texts:
            glyphs.set_antialiased(PLAIN["antialiased"])
        return figure

    def describe(data):
        return (
            f"Text with the bytes that layer {data['layer']} selects for byte {data['byte']}, indexer RoPE "
            f"{data['layout']}: {data['shared']} of {_kept(data)} are those of the trained layout."
        )

    wide = ipywidgets.Layout(width="800px")
    controls = {
        "byte": ipywidgets.IntSlider(byte, min=0, max=len(text_bytes) - 1, description="byte t", layout=wide),
        "layer": ipywidgets.IntSlider(layer, min=0, max=len(selections[names[0]]) - 1, description="layer"),
        "layout": ipywidgets.Dropdown(options=names, value=layout, description="layout"),
    }
    return LiveFigure("layouts", look, draw, describe, **controls)


def _kept(data):
    return int((data["chosen"] >= 0).sum())


def overlap_bars(shares, chance) -> Figure:
    """Share of the trained selection that each variant keeps, a group of bars a layer; a line at chance.

    shares: {name: [one share a layer]}; chance: the same for k random keys.
    """
    figure = Figure(figsize=(6.2, 3.2), layout="constrained", facecolor=COLOURS["visible"])
    axes = figure.add_subplot(xlabel="layer", ylabel="share of the trained set kept", ylim=(0, 1.04))
    layers = np.arange(len(next(iter(shares.values()))))
    looks = ((COLOURS["selected"], ""), (LINES[2][0], "//"), (COLOURS["visible"], ".."))
    for i, ((name, values), (colour, hatch)) in enumerate(zip(shares.items(), looks, strict=True)):
        place = {"width": 0.25, "color": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
        axes.bar(layers + (i - 1) * 0.27, values, label=name, **place)
    axes.axhline(chance, color="black", linestyle="--", linewidth=1.4, label="64 random bytes")
    axes.set_xticks(layers)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def byte_bars(sizes) -> Figure:
    """Bytes a token and layer as horizontal bars, to scale. sizes: {name: bytes}."""
    figure = Figure(figsize=(6.2, 1.6), layout="constrained", facecolor=COLOURS["visible"])
    axes = figure.add_subplot(xlabel="cache, bytes a token and layer", xlim=(0, 96_000))
    colours = (LINES[2][0], COLOURS["selected"], COLOURS["selected"])
    axes.barh(list(sizes), list(sizes.values()), color=colours[: len(sizes)], height=0.6)
    for y, value in enumerate(sizes.values()):
        axes.text(value + 900, y, f"{value:,}", va="center", fontsize=10)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    return figure
