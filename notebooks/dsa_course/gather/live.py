"""Notebook 04: which pairs of a real text are attended, and how their number grows with the text."""

import ipywidgets
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsa_ref.cost import causal_pairs
from dsa_ref.index_scores import index_scores
from dsa_ref.select_topk import select_topk

from ..viz import COLOURS, LiveFigure


def live_gather(steps, layer, k) -> LiveFigure:
    """The small model's selection, a row for each query, a column for each key: what is gathered, visible and future.

    steps: what a forward pass recorded, one dict a layer. layer, k: where the sliders start; the selection is made anew
    from the recorded indexer's scores. `.data`: layer, k, indices, and the pairs gathered, visible and square.
    """
    T = len(steps[0]["q"])

    def look(layer, k):
        step = steps[layer]
        indices = select_topk(index_scores(step["q_idx"], step["k_idx"], step["w"], step["k_scale"]), k).cpu()
        pairs = {"gathered": int((indices >= 0).sum()), "visible": causal_pairs(T, T), "square": T * T}
        return {"layer": layer, "k": k, "indices": indices, **pairs}

    def draw(data):
        state = np.triu(np.full((T, T), 2), 1)  # 0 visible, 1 gathered, 2 future
        rows, places = (data["indices"] >= 0).nonzero(as_tuple=True)
        state[rows, data["indices"][rows, places]] = 1
        colours = [COLOURS["visible"], COLOURS["selected"], COLOURS["future"]]
        figure = Figure(figsize=(7.4, 4.6), layout="constrained", facecolor=COLOURS["visible"])
        square, bars = figure.subplots(1, 2, width_ratios=(1.5, 1))
        square.imshow(state, cmap=ListedColormap(colours), vmin=0, vmax=2, interpolation="nearest")
        square.set(xlabel="key s (byte)", ylabel="query t (byte)", title=f"layer {data['layer']}, k = {data['k']}")
        labels = {"visible": "visible, left out", "selected": "gathered", "future": "future"}
        handles = [Patch(facecolor=COLOURS[key], edgecolor="black", label=label) for key, label in labels.items()]
        square.legend(handles=handles, loc="upper right", fontsize=8)
        counts = {
            "mask\ncomputes": data["square"],
            "of these\nvisible": data["visible"],
            "gathered": data["gathered"],
        }
        colours = [COLOURS["attention"], COLOURS["attention"], COLOURS["selected"]]
        drawn = bars.bar(list(counts), list(counts.values()), color=colours, edgecolor="black")
        drawn[0].set_hatch("///")
        bars.bar_label(drawn, [f"{count:,}" for count in counts.values()], fontsize=8, padding=2)
        bars.set(ylabel="(query, key) pairs", ylim=(0, 1.1 * T * T))
        bars.tick_params(axis="x", labelsize=8)
        bars.spines[["top", "right"]].set_visible(False)
        return figure

    def describe(data):
        return (
            f"A square of {T} queries by {T} keys, its upper right half the future. In layer {data['layer']} with "
            f"k = {data['k']} the gathered pairs are {data['gathered']} of {data['visible']} visible ones; a mask "
            f"computes all {data['square']}."
        )

    sliders = {
        "layer": ipywidgets.IntSlider(layer, min=0, max=len(steps) - 1, description="layer"),
        "k": ipywidgets.IntSlider(k, min=1, max=128, description="k"),
    }
    return LiveFigure("gather", look, draw, describe, **sliders)


def live_pairs(tokens=17, kept=11) -> LiveFigure:
    """How many pairs attention computes to read a text: masked, visible, gathered, up to four million tokens.

    tokens, kept: where the sliders start, powers of two. `.data`: tokens, k, contexts, the three curves over the
    contexts, and their values `here`, at the chosen length.
    """
    contexts = [2**i for i in range(6, 23)]

    def count(T, k):
        return {"masked": T * T, "visible": causal_pairs(T, T), "gathered": causal_pairs(T, T, k)}

    def compute(tokens, kept):
        rows = [count(T, 2**kept) for T in contexts]
        curves = {name: [row[name] for row in rows] for name in rows[0]}
        return {"tokens": 2**tokens, "k": 2**kept, "contexts": contexts, "here": count(2**tokens, 2**kept), **curves}

    def draw(data):
        figure = Figure(figsize=(7, 4.2), layout="constrained", facecolor=COLOURS["visible"])
        axes = figure.add_subplot(xlabel="T, tokens in the text", ylabel="(query, key) pairs, one head")
        styles = {
            "masked": ({"color": COLOURS["attention"], "linestyle": "--"}, "masked: T · T"),
            "visible": ({"color": COLOURS["attention"], "linestyle": ":"}, "visible: T (T + 1) / 2"),
            "gathered": ({"color": COLOURS["selected"], "linestyle": "-"}, f"gathered: up to T · {data['k']}"),
        }
        for name, (style, label) in styles.items():
            axes.plot(data["contexts"], data[name], linewidth=2.2, label=label, **style)
        axes.axvline(data["tokens"], color="#777777", linewidth=1)
        axes.plot([data["tokens"]] * 3, list(data["here"].values()), "o", color="#222222", markersize=5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ratio = data["here"]["masked"] / data["here"]["gathered"]
        axes.set_title(f"{data['tokens']:,} tokens: masked / gathered = {ratio:,.1f}", fontsize=10)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", frameon=False)
        return figure

    def describe(data):
        here = data["here"]
        return (
            f"Log-log plot of query-key pairs against the length of the text. At {data['tokens']} tokens and k = "
            f"{data['k']} a mask computes {here['masked']:.2e} pairs, {here['visible']:.2e} of them visible; gathering "
            f"computes {here['gathered']:.2e}. Below k tokens gathered and visible are one line."
        )

    sliders = {
        "tokens": ipywidgets.IntSlider(tokens, min=6, max=22, description="tokens 2^"),
        "kept": ipywidgets.IntSlider(kept, min=3, max=14, description="k = 2^"),
    }
    return LiveFigure("pairs", compute, draw, describe, **sliders)
