"""Notebook 14's figure of how many keys hold most of the attention."""

import ipywidgets
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..viz import COLOURS, LINES, LiveFigure
from .keys import ROWS, attention_of


def live_needed(share=90, count=1024) -> LiveFigure:
    """How many keys hold a share of the attention, against the position, a curve a layer. Slider: the share in %.

    `.data`: share, positions, needed {layer: [keys at each position]}.
    """
    positions = [2**i for i in range(6, count.bit_length())]
    ordered = [weights.double().sort(descending=True).values.cumsum(1) for weights in attention_of(count)]

    def compute(share):
        found = {
            layer: [float((sums[p - ROWS : p] < share / 100).sum(1).double().mean()) + 1 for p in positions]
            for layer, sums in enumerate(ordered)
        }
        return {"share": share, "positions": positions, "needed": found}

    def draw(data):
        figure = Figure(figsize=(8.6, 3.6), layout="constrained", facecolor=COLOURS["visible"])
        axes = figure.add_subplot(
            xlabel="position, bytes read so far", ylabel=f"keys that hold {data['share']} %\nof the attention"
        )
        for (layer, keys), (_, line, marker) in zip(data["needed"].items(), LINES, strict=False):
            axes.plot(
                data["positions"],
                keys,
                color=COLOURS["attention"],
                linestyle=line,
                marker=marker,
                label=f"layer {layer}",
            )
        axes.plot(data["positions"], data["positions"], color="#bbbbbb", linewidth=1, label="every key")
        axes.axhline(64, color=COLOURS["selected"], linewidth=1.4, linestyle=(0, (4, 2)), label="k of this model, 64")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.set_xticks(data["positions"], labels=data["positions"])
        axes.set_yticks([2**i for i in range(0, 11, 2)], labels=[2**i for i in range(0, 11, 2)])
        axes.set_ylim(0.8, 1500)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        return figure

    def describe(data):
        ends = ", ".join(f"layer {layer}: {keys[0]:.0f} to {keys[-1]:.0f}" for layer, keys in data["needed"].items())
        first, last = data["positions"][0], data["positions"][-1]
        return f"Keys that hold {data['share']} % of the attention, from position {first} to {last}: {ends}."

    slider = ipywidgets.IntSlider(share, min=50, max=95, step=5, description="share, %")
    return LiveFigure("needed", compute, draw, describe, share=slider)
