"""Notebook 02: equation 1 by hand on the toy, the same with other weights, and a trained indexer's scores over text."""

import ipywidgets
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from dsa_ref.index_scores import index_scores
from dsa_ref.select_topk import select_topk

from .. import viz
from ..toy import toy

HEADS = ({"facecolor": "#f0f0f0", "hatch": ""}, {"facecolor": "#b8b8b8", "hatch": "///"})  # one look a head
EDGE = "#222222"


def _scored(x, t, w):
    """What equation 1 does for the toy's token t with head weights w: whole pieces, then the score and the winners."""
    dots = torch.einsum("hd,sd->hs", x.q_idx[t], x.k_idx)
    scores = index_scores(x.q_idx, x.k_idx, w)[t]
    chosen = select_topk(scores[None, : t + 1], x.k)[0]
    parts = dots.relu() * w[t][:, None] + 0.0  # + 0.0: a relu'd match times a negative weight would print as -0
    return {"t": t, "dots": dots, "w": w[t], "parts": parts, "scores": scores, "chosen": chosen[chosen >= 0].tolist()}


# ----------------------------------------------------------------------------------------------------------- by hand


def live_by_hand(t=7) -> viz.LiveFigure:
    """Every number of equation 1 for one token of the toy. `.data`: t, dots, w, parts, scores, chosen."""
    x = toy()

    def look(t):
        return _scored(x, t, x.w)

    def draw(data):
        return _draw_by_hand(x, data)

    def describe(data):
        scores = ", ".join(f"{score:g}" for score in data["scores"][: data["t"] + 1])
        return (
            f"Equation 1 for token {data['t']} of the toy, from dot products over relu and weights to the scores "
            f"{scores}. It keeps tokens {', '.join(map(str, data['chosen']))}."
        )

    slider = ipywidgets.IntSlider(t, min=0, max=len(x.k_idx) - 1, description="token t")
    return viz.LiveFigure("by hand", look, draw, describe, t=slider)


def _draw_by_hand(x, data):
    t, S = data["t"], len(x.k_idx)
    figure = Figure(figsize=(7.4, 5.6), facecolor=viz.COLOURS["visible"])
    axes = figure.add_axes((0.01, 0.06, 0.98, 0.93), xlim=(-6.6, S + 0.1), ylim=(13.3, -0.9))
    axes.axis("off")

    def cells(left, top, numbers, hidden=lambda column: False):
        for i, row in enumerate(numbers):
            for j, number in enumerate(row):
                grey = hidden(j)
                face = viz.COLOURS["future"] if grey else viz.COLOURS["visible"]
                axes.add_patch(Rectangle((left + j, top + i), 1, 1, facecolor=face, edgecolor=EDGE, linewidth=0.6))
                if not grey:
                    axes.text(left + j + 0.5, top + i + 0.53, f"{number:g}", ha="center", va="center", fontsize=10)

    def note(left, top, text):
        axes.text(left, top, text, fontsize=9, va="center")

    def later(s):
        return s > t

    for s in range(S):
        axes.text(s + 0.5, -0.35, f"s={s}", ha="center", va="center", fontsize=8, color="#555555")
    cells(0, 0, x.k_idx.T.tolist())
    note(-6.5, 0.6, "k_idx: a column is\na key of 4 numbers d")
    cells(-4.6, 4.8, x.q_idx[t].tolist())
    note(-6.5, 4.3, f"q_idx[{t}]: a row is a head")
    for h, weight in enumerate(data["w"].tolist()):
        top = 4.8 + h
        axes.text(-4.75, top + 0.53, f"h={h}", ha="right", va="center", fontsize=8, color="#555555")
        axes.text(-4.75, top + 3.73, f"h={h}", ha="right", va="center", fontsize=8, color="#555555")
        axes.text(-1.55, top + 3.73, f"times w = {weight:g}", ha="center", va="center", fontsize=9)
    cells(0, 4.8, data["dots"].tolist(), later)
    note(0, 4.4, "dot products q·k")
    cells(0, 8.0, data["parts"].tolist(), later)
    note(0, 7.6, "below 0 becomes 0 (relu), then times the head's weight")
    cells(0, 11.2, [data["scores"].tolist()], later)
    note(0, 10.8, "sum over heads: the score I")
    axes.text(-0.2, 11.73, f"I[{t}, s]", ha="right", va="center", fontsize=9)
    frame = {"fill": False, "edgecolor": viz.COLOURS["selected"], "linewidth": 3.0, "zorder": 3}
    for s in data["chosen"]:
        axes.add_patch(Rectangle((s + 0.05, 11.25), 0.9, 0.9, **frame))
    legend = [
        Patch(facecolor="none", edgecolor=viz.COLOURS["selected"], linewidth=3.0, label="selected, k = 3"),
        Patch(facecolor=viz.COLOURS["future"], edgecolor=EDGE, label="future, not scored"),
    ]
    figure.legend(handles=legend, loc="lower center", ncols=2, fontsize=9, frameon=False)
    return figure


# -------------------------------------------------------------------------------------------------- your own weights


def live_toy_scores(t=7) -> viz.LiveFigure:
    """Each head's part of every score of the toy, under weights of your own. `.data` as in `live_by_hand`.

    The weight sliders start at token t's own weights, and keep their values when t moves.
    """
    x = toy()

    def look(t, w_0, w_1):
        w = x.w.clone()
        w[t] = torch.tensor([w_0, w_1])
        return _scored(x, t, w)

    def describe(data):
        return (
            f"For token {data['t']} with head weights {data['w'][0]:g} and {data['w'][1]:g}: each visible key's parts "
            f"of two heads as stacked bars, their sum marked. Kept are tokens {', '.join(map(str, data['chosen']))}."
        )

    sliders = {"t": ipywidgets.IntSlider(t, min=0, max=len(x.k_idx) - 1, description="token t")}
    for h, weight in enumerate(x.w[t].tolist()):
        sliders[f"w_{h}"] = ipywidgets.FloatSlider(weight, min=-2, max=2, step=0.5, description=f"w of head {h}")
    return viz.LiveFigure("toy scores", look, _draw_parts, describe, **sliders)


def _draw_parts(data):
    t, S = data["t"], len(data["scores"])
    figure = Figure(figsize=(7, 4), layout="constrained", facecolor=viz.COLOURS["visible"])
    axes = figure.add_subplot(xlabel="key s (token)", ylabel=f"score I[{t}, s] and its parts (no unit)")
    axes.axhline(0, color=EDGE, linewidth=0.8)
    seen = range(t + 1)
    above, below = [0.0] * S, [0.0] * S
    for look, part in zip(HEADS, data["parts"].tolist(), strict=True):
        for s in (s for s in seen if part[s]):
            base = above if part[s] > 0 else below  # positive parts pile up, negative ones pile down
            axes.bar(s, part[s], bottom=base[s], width=0.6, edgecolor=EDGE, linewidth=0.8, **look)
            base[s] += part[s]
    for s in seen:
        kept = s in data["chosen"]
        face = viz.COLOURS["selected"] if kept else viz.COLOURS["visible"]
        axes.plot(s, data["scores"][s], "D", markersize=9, markerfacecolor=face, markeredgecolor=EDGE, zorder=3)
    if t + 1 < S:
        axes.axvspan(t + 0.5, S - 0.5, color=viz.COLOURS["future"], alpha=0.5, linewidth=0)
    axes.set_xlim(-0.5, S - 0.5)
    axes.margins(y=0.1)
    axes.set_xticks(range(S))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    weights = [f"{weight:g}" for weight in data["w"].tolist()]
    legend = [Patch(edgecolor=EDGE, label=f"head {h}, w = {weights[h]}", **HEADS[h]) for h in range(len(HEADS))]
    for colour, label in (("selected", "sum, selected"), ("visible", "sum, left out")):
        marker = {"marker": "D", "markersize": 9, "markeredgecolor": EDGE, "linestyle": ""}
        legend.append(Line2D([], [], markerfacecolor=viz.COLOURS[colour], label=label, **marker))
    legend.append(Patch(facecolor=viz.COLOURS["future"], alpha=0.5, label="future"))
    figure.legend(handles=legend, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


# -------------------------------------------------------------------------------------------------- a trained indexer


def live_text_scores(text_bytes, steps, k, byte, layer, shown=64) -> viz.LiveFigure:
    """A trained indexer's scores of one byte: over all that it sees, and letter by letter over the last `shown`.

    text_bytes: bytes. steps: what a forward pass over at least these bytes recorded, one dict a layer. k: keys kept.
    byte, layer: where the sliders start. `.data`: byte, layer, scores [byte + 1], chosen, threshold, text.
    """

    def look(byte, layer):
        step, seen = steps[layer], slice(0, byte + 1)
        row = step["q_idx"][byte : byte + 1], step["k_idx"][seen], step["w"][byte : byte + 1], step["k_scale"][seen]
        scores = index_scores(*row).cpu()
        chosen = select_topk(scores, k)[0]
        chosen = chosen[chosen >= 0]
        threshold = float(scores[0][chosen.long()].min())
        return {
            "byte": byte, "layer": layer, "scores": scores[0], "chosen": chosen, "threshold": threshold,
            "text": text_bytes[seen],
        }  # fmt: skip

    def describe(data):
        return (
            f"Layer {data['layer']}, byte {data['byte']}: the indexer's scores of the {data['byte'] + 1} bytes that it "
            f"sees. {len(data['chosen'])} are selected, those with a score of {data['threshold']:.2f} or more."
        )

    wide = ipywidgets.Layout(width="600px")
    sliders = {
        "byte": ipywidgets.IntSlider(byte, min=0, max=len(text_bytes) - 1, description="byte t", layout=wide),
        "layer": ipywidgets.IntSlider(layer, min=0, max=len(steps) - 1, description="layer"),
    }
    return viz.LiveFigure("text scores", look, lambda data: _draw_text(data, shown), describe, **sliders)


def _draw_text(data, shown):
    t, scores, kept = data["byte"], data["scores"], set(data["chosen"].tolist())
    figure = Figure(figsize=(7.4, 4.4), layout="constrained", facecolor=viz.COLOURS["visible"])
    whole, near = figure.subplots(2, 1)
    for axes, first, size in ((whole, 0, 3), (near, max(0, t + 1 - shown), 7)):
        for is_kept, colour, mark in ((False, viz.LINES[2][0], "o"), (True, viz.COLOURS["selected"], "D")):
            s = [i for i in range(first, t + 1) if (i in kept) == is_kept]
            face = colour if is_kept or axes is whole else viz.COLOURS["visible"]  # many points: plain dots
            if is_kept or axes is near:
                axes.vlines(s, data["threshold"], scores[s], color=colour, linewidth=0.8, zorder=1)
            tiny = axes is whole and not is_kept
            axes.plot(
                s, scores[s], mark, color=colour, markerfacecolor=face, markersize=1.5 if tiny else size, zorder=2
            )
        axes.axhline(data["threshold"], color=EDGE, linestyle="--", linewidth=1.0)
        axes.set_ylabel("score I[t, s] (no unit)", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    whole.set_xlabel(f"byte s, from 0 to t = {t}")
    first = max(0, t + 1 - shown)
    near.set_xticks(range(first, t + 1), labels=[viz.glyph_of(b) for b in data["text"][first:]])
    near.tick_params(axis="x", length=0, labelsize=9)
    near.set_xlim(first - 0.7, t + 0.7)
    for label in near.get_xticklabels():
        label.set_fontfamily("DejaVu Sans Mono")
        label.set_parse_math(False)
    near.get_xticklabels()[-1].set_color(viz.COLOURS["query"])
    near.get_xticklabels()[-1].set_fontweight("bold")
    near.set_xlabel(f"the last {t + 1 - first} of them as text; the query t is the last one")
    line = {"linestyle": "", "markersize": 7}
    blue, grey, white = viz.COLOURS["selected"], viz.LINES[2][0], viz.COLOURS["visible"]
    legend = [
        Line2D([], [], marker="D", color=blue, label=f"selected: {len(kept)} of {t + 1}", **line),
        Line2D([], [], marker="o", color=grey, markerfacecolor=white, label="left out", **line),
        Line2D([], [], color=EDGE, linestyle="--", linewidth=1.0, label="threshold: the smallest selected score"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure
