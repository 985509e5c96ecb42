"""Notebook 03: what k selected bytes catch, for the indexer and its controls, and where the threshold of a row lies."""

import functools

import ipywidgets
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from dsa_ref.index_scores import index_scores
from dsa_ref.select_topk import select_topk
from dsa_ref.training.evaluate import attention_weights

from .. import viz

METHODS = ("indexer", "attention itself", "window", "random")  # in the order of viz.LINES
LARGEST_K = 256
EDGE = "#222222"


def all_scores(step):
    """The indexer's scores [T, T] of a recorded step."""
    return index_scores(step["q_idx"], step["k_idx"], step["w"], step["k_scale"])


# ------------------------------------------------------------------------------------------------------------ recall


def live_recall(steps, scale, k, byte, layer) -> viz.LiveFigure:
    """Recall against k in one layer, and which bytes each method keeps for one query.

    steps: what a *dense* forward pass recorded, one dict a layer. scale: the softmax scale. k, byte, layer: where the
    sliders start. `.data`: k, byte, layer, curves {method: recall at k = 1, 2, ...}, chosen {method: the query's keys},
    mass {method: what those catch}. The mean goes over the rows that see more than k keys.
    """
    T = len(steps[0]["q_idx"])

    @functools.cache
    def ranked(layer):
        """weights [T, T] and, for each method, all keys of each row, best first."""
        weights = attention_weights(steps[layer], scale).cpu()
        position = torch.arange(T, dtype=torch.float32)
        drawn = torch.from_numpy(np.random.default_rng(layer).random((T, T))).float()
        later = torch.ones(T, T, dtype=torch.bool).triu(1)
        ranks = (all_scores(steps[layer]).cpu(), weights, position.expand(T, T), drawn)
        return weights, {
            name: rank.masked_fill(later, -torch.inf).sort(dim=1, descending=True, stable=True).indices
            for name, rank in zip(METHODS, ranks, strict=True)
        }

    @functools.cache
    def curves(layer):
        weights, order = ranked(layer)
        caught = {name: weights.gather(1, keys).double().cumsum(dim=1) for name, keys in order.items()}
        return {name: [float(c[k:, k - 1].mean()) for k in range(1, LARGEST_K + 1)] for name, c in caught.items()}

    def look(k, byte, layer):
        weights, order = ranked(layer)
        chosen = {name: keys[byte, : min(k, byte + 1)] for name, keys in order.items()}
        mass = {name: float(weights[byte, keys].sum()) for name, keys in chosen.items()}
        return {"k": k, "byte": byte, "layer": layer, "curves": curves(layer), "chosen": chosen, "mass": mass}

    def describe(data):
        at_k = ", ".join(f"{name} {values[data['k'] - 1]:.2f}" for name, values in data["curves"].items())
        return (
            f"Layer {data['layer']}: attention mass on k selected bytes against k. At k = {data['k']}: {at_k}. Below, "
            f"which of the bytes 0 to {data['byte']} each method keeps for byte {data['byte']}."
        )

    wide = ipywidgets.Layout(width="600px")
    sliders = {
        "k": ipywidgets.IntSlider(k, min=1, max=LARGEST_K, description="k", layout=wide),
        "byte": ipywidgets.IntSlider(byte, min=0, max=T - 1, description="byte t", layout=wide),
        "layer": ipywidgets.IntSlider(layer, min=0, max=len(steps) - 1, description="layer"),
    }
    return viz.LiveFigure("recall", look, _draw_recall, describe, **sliders)


def _draw_recall(data):
    k, t = data["k"], data["byte"]
    figure = Figure(figsize=(6.8, 4.7), layout="constrained", facecolor=viz.COLOURS["visible"])
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    marks = [0, 1, 3, 7, 15, 31, 63, 127, 255]
    for (name, values), (colour, line, marker) in zip(data["curves"].items(), viz.LINES, strict=False):
        look = {"color": colour, "linestyle": line, "marker": marker, "markersize": 5, "linewidth": 1.6}
        label = f"{name}: {values[k - 1]:.2f} at k = {k}"
        above.plot(range(1, len(values) + 1), values, markevery=marks, label=label, **look)
    above.axvline(k, color=EDGE, linewidth=0.9)
    above.set_xscale("log", base=2)
    above.set_xticks([m + 1 for m in marks], labels=[str(m + 1) for m in marks])
    above.xaxis.set_minor_locator(NullLocator())
    above.set(
        ylim=(0, 1.04), xlabel="k, keys selected for each query", ylabel="attention mass caught\n(share, mean of rows)"
    )
    above.legend(loc="best", frameon=False, fontsize=8)
    for row, (keys, (colour, *_)) in enumerate(zip(data["chosen"].values(), viz.LINES, strict=False)):
        below.vlines(keys.tolist(), row - 0.4, row + 0.4, color=colour, linewidth=1.2)
    below.axvline(t, color=viz.COLOURS["query"], linewidth=2.0)
    labels = [f"{name} ({mass:.2f})" for name, mass in data["mass"].items()]
    below.set_yticks(range(len(labels)), labels=labels, fontsize=8)
    below.set(xlim=(-2, t + 2), ylim=(len(labels) - 0.4, -0.6))
    below.set_xlabel(f"byte s kept for query t = {t}; in brackets, the mass that they catch", fontsize=9)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# --------------------------------------------------------------------------------------------------------- threshold


def live_threshold(steps, k, byte, layer, around=16) -> viz.LiveFigure:
    """The scores of one row, sorted, and the threshold at k: all of them, and those around it.

    steps: what a forward pass recorded, one dict a layer. k, byte, layer: where the sliders start. A box rounds the
    scores to bf16. `.data`: k, byte, layer, bf16, sorted (descending), threshold, above and tied (counts), room.
    """
    T = len(steps[0]["q_idx"])

    def look(k, byte, layer, bf16):
        step, seen = steps[layer], slice(0, byte + 1)
        row = step["q_idx"][byte : byte + 1], step["k_idx"][seen], step["w"][byte : byte + 1], step["k_scale"][seen]
        scores = index_scores(*row)[0].cpu()
        scores = scores.bfloat16().float() if bf16 else scores
        kept = select_topk(scores[None], k)[0]
        threshold = scores[kept[kept >= 0].long()].min()
        above = int((scores > threshold).sum())
        return {
            "k": k, "byte": byte, "layer": layer, "bf16": bf16, "sorted": scores.sort(descending=True).values,
            "threshold": float(threshold), "above": above, "tied": int((scores == threshold).sum()),
            "room": min(k, byte + 1) - above,
        }  # fmt: skip

    def describe(data):
        return (
            f"Layer {data['layer']}, byte {data['byte']}: its {data['byte'] + 1} scores in descending order"
            f"{', rounded to bf16' if data['bf16'] else ''}. {data['above']} lie above the threshold "
            f"{data['threshold']:.2f} at k = {data['k']}, {data['tied']} on it, and {data['room']} of these are kept."
        )

    wide = ipywidgets.Layout(width="600px")
    controls = {
        "k": ipywidgets.IntSlider(k, min=1, max=LARGEST_K, description="k", layout=wide),
        "byte": ipywidgets.IntSlider(byte, min=0, max=T - 1, description="byte t", layout=wide),
        "layer": ipywidgets.IntSlider(layer, min=0, max=len(steps) - 1, description="layer"),
        "bf16": ipywidgets.Checkbox(False, description="scores rounded to bf16"),
    }
    return viz.LiveFigure("threshold", look, lambda data: _draw_threshold(data, around), describe, **controls)


def _draw_threshold(data, around):
    scores, n = data["sorted"].tolist(), min(data["k"], len(data["sorted"]))
    figure = Figure(figsize=(7.4, 4.2), layout="constrained", facecolor=viz.COLOURS["visible"])
    whole, near = figure.subplots(1, 2)
    blue, grey, white = viz.COLOURS["selected"], viz.LINES[2][0], viz.COLOURS["visible"]
    window = (max(0, n - around), min(len(scores), n + around))
    for axes, (first, last), size in ((whole, (0, len(scores)), 4), (near, window, 7)):
        kept, left = range(first, min(n, last)), range(n, last)
        axes.plot([i + 1 for i in kept], scores[first:n], "D", color=blue, markersize=size)
        axes.plot([i + 1 for i in left], scores[n:last], "o", color=grey, markerfacecolor=white, markersize=size)
        axes.axhline(data["threshold"], color=EDGE, linestyle="--", linewidth=1.0)
        axes.axvline(n + 0.5, color=EDGE, linewidth=0.8)
        axes.set_xlabel("rank by score")
        axes.spines[["top", "right"]].set_visible(False)
    whole.set_ylabel("score I (no unit)")
    whole.set_title(f"all {len(scores)} keys of byte {data['byte']}", fontsize=10)
    near.set_title(f"{data['above']} above the threshold, {data['tied']} on it, room for {data['room']}", fontsize=10)
    marks = {"linestyle": "", "markersize": 7}
    legend = [
        Line2D([], [], marker="D", color=blue, label=f"selected: {n}", **marks),
        Line2D([], [], marker="o", color=grey, markerfacecolor=white, label="left out", **marks),
        Line2D([], [], color=EDGE, linestyle="--", linewidth=1.0, label=f"threshold {data['threshold']:.2f}"),
        Line2D([], [], color=EDGE, linewidth=0.8, label=f"the cut, after {n} keys"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure
