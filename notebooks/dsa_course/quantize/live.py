"""Notebook 07: the numbers that a format has, and what an outlier costs with and without the rotation."""

import ipywidgets
import numpy as np
import torch
from matplotlib.figure import Figure

from dsa_ref.hadamard import hadamard
from dsa_ref.index_scores import index_scores
from dsa_ref.quantize import POSITIVE_CODES
from dsa_ref.select_topk import select_topk
from dsa_ref.testing import overlap

from ..viz import COLOURS, LINES, LiveFigure

VALUES = {  # the numbers from 0 up that a format has; the negative ones mirror them
    "FP8 (e4m3)": POSITIVE_CODES,
    "INT8": np.arange(128.0),
    "FP4 (e2m1)": np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]),
}
PLACES = {"in k, made up for in q": -1, "in k": 0, "in k and q": 1}  # the power of the outlier's size that q gets
CHANNEL = 3
GRID = {"color": "#dddddd", "linewidth": 0.6}


def live_number_line() -> LiveFigure:
    """The numbers of a format and the gaps between them; the zoom halves the range shown.

    `.data`: format, upper (right end), values (shown), gaps (from each to the next one).
    """

    def compute(format, zoom):
        values = VALUES[format]
        upper = values[-1] / 2.0**zoom
        shown = values[values <= upper]
        gaps = np.diff(values)[: len(shown)]
        return {"format": format, "upper": upper, "values": shown, "gaps": gaps}

    def draw(data):
        figure = Figure(figsize=(7, 3.6), layout="constrained", facecolor=COLOURS["visible"])
        above, line = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        values, gaps, upper = data["values"], data["gaps"], data["upper"]
        edges = np.append(values, upper) if len(gaps) == len(values) else values
        above.stairs(gaps, edges[: len(gaps) + 1], color=COLOURS["selected"], linewidth=1.8, baseline=None)
        above.set(ylabel="gap to the next one", ylim=(0, 1.15 * gaps.max(initial=1e-9)))
        above.set_title(f"{data['format']}: {len(values)} numbers from 0 to {upper:g}", fontsize=10)
        above.grid(**GRID)
        above.set_axisbelow(True)
        line.vlines(values, 0, 1, color=LINES[1][0], linewidth=0.8)
        line.set(xlabel="number", xlim=(-0.01 * upper, 1.01 * upper), ylim=(0, 1.1), yticks=[])
        for axes in (above, line):
            axes.spines[["top", "right"]].set_visible(False)
        line.spines["left"].set_visible(False)
        return figure

    def describe(data):
        return (
            f"{data['format']}: the numbers from 0 to {data['upper']:g}, {len(data['values'])} of them, as ticks. "
            f"Above them the gap to the next one, from {data['gaps'].min():g} to {data['gaps'].max():g}."
        )

    controls = {
        "format": ipywidgets.Dropdown(options=list(VALUES), description="format"),
        "zoom": ipywidgets.IntSlider(0, min=0, max=12, description="halvings"),
    }
    return LiveFigure("number line", compute, draw, describe, **controls)


def flips_chart(results) -> Figure:
    """Changed keys without the rotation and with it, side by side for each k.

    results: {data: {format: {rotated, a bool: {k: share}}}}; every data has the same formats, every format the same ks.
    """
    formats = list(next(iter(results.values())))
    ks = list(next(iter(results.values()))[formats[0]][True])
    figure = Figure(figsize=(9, 0.9 + 0.62 * len(results)), layout="constrained", facecolor=COLOURS["visible"])
    rows = [(data, format) for data in results for format in formats]
    heights = [-(i + 0.8 * (i // len(formats))) for i in range(len(rows))]
    styles = {False: (LINES[1][0], "s", "none", "not rotated"), True: (LINES[0][0], "o", LINES[0][0], "rotated")}
    for axes, k in zip(figure.subplots(1, len(ks), sharey=True, sharex=True), ks, strict=True):
        shares = {rotated: [100 * results[data][f][rotated][k] for data, f in rows] for rotated in (False, True)}
        axes.hlines(heights, shares[False], shares[True], color="#999999", linewidth=1.0)
        for rotated, (colour, marker, face, label) in styles.items():
            axes.plot(shares[rotated], heights, marker, color=colour, markerfacecolor=face, markersize=5, label=label)
        axes.set_xscale("log")
        axes.set_xlim(0.03, 100)
        axes.set_xticks([0.1, 1, 10, 100], labels=["0.1", "1", "10", "100"])
        axes.set(title=f"k = {k} keys selected", xlabel="flips (% of the selected keys)")
        axes.grid(axis="x", **GRID)
        axes.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    labels = [f"{data}    {f}" if i % len(formats) == 0 else f for i, (data, f) in enumerate(rows)]
    first.set_yticks(heights, labels=labels, fontsize=8)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    return figure


def live_outlier(q, k, w, formats, format, ks=(8, 16, 32, 64, 128)) -> LiveFigure:
    """Make one channel of real vectors large, quantise, and see what one key and the selection become.

    q [T, Hi, Di], k [S, Di], w [T, Hi]: an indexer's vectors before the rotation, T <= S, the queries last. formats:
    {name: function that takes x [..., D] and gives what its eight or four bits hold of it}; format: where to start.
    Controls: size 2^n of channel 3; where it sits ("in k, made up for in q" divides q by it, so the exact scores stay);
    format; rotation. `.data`: the four, true and held [Di] (one key, the outlier's channel last), flips
    {"as set" or "the other way": one share for each of ks}.
    """
    key = int(k[:, CHANNEL].abs().argmax())
    order = [channel for channel in range(k.shape[1]) if channel != CHANNEL] + [CHANNEL]

    def changed(size, place):
        factor = torch.ones(k.shape[1])
        factor[CHANNEL] = 2.0**size
        return q * factor ** PLACES[place], k * factor

    def look(size, place, format, rotation):
        big_q, big_k = changed(size, place)
        exact = index_scores(big_q, big_k, w)
        wanted = [select_topk(exact, count) for count in ks]
        data = {"size": size, "place": place, "format": format, "rotation": rotation, "flips": {}}
        for name, rotated in (("as set", rotation), ("the other way", not rotation)):
            turn = hadamard if rotated else torch.clone
            held_q, held_k = (formats[format](turn(x)) for x in (big_q, big_k))
            scores = index_scores(held_q, held_k, w)
            shares = [1.0 - overlap(reference, select_topk(scores, len(reference[0]))) for reference in wanted]
            data["flips"][name] = shares
            if name == "as set":
                data["true"], data["held"] = big_k[key, order].numpy(), turn(held_k)[key, order].numpy()
        return data

    def draw(data):
        figure = Figure(figsize=(8, 3.9), layout="constrained", facecolor=COLOURS["visible"])
        left, right = figure.subplots(1, 2)
        true, held = data["true"][:-1], data["held"][:-1]
        reach = 1.2 * float(np.abs(k[key, order[:-1]].numpy()).max())
        left.axline((0, 0), slope=1, color="#999999", linewidth=0.8)
        colour = LINES[0][0] if data["rotation"] else LINES[1][0]  # blue is what is rotated, here and on the right
        left.plot(true, np.clip(held, -reach, reach), "o", color=colour, markersize=5, markerfacecolor="none")
        left.set(xlim=(-reach, reach), ylim=(-reach, reach), xlabel="true number", ylabel="number that the bits hold")
        left.set_title(f"key {key}, all channels but the outlier", fontsize=10)
        for name in data["flips"]:
            percent = [100.0 * share for share in data["flips"][name]]
            rotated = data["rotation"] == (name == "as set")
            (colour, line, marker), label = (LINES[0], "rotated") if rotated else (LINES[1], "not rotated")
            right.plot(ks, percent, color=colour, linestyle=line, marker=marker, markersize=5, label=label)
        right.set_xscale("log", base=2)
        right.set_xticks(ks, labels=[str(count) for count in ks])
        right.minorticks_off()
        top = max(10.0, 1.1 * max(100.0 * share for shares in data["flips"].values() for share in shares))
        right.set(xlabel="k, keys selected for each query", ylabel="selected keys that changed (%)", ylim=(0, top))
        right.set_title(f"{data['format']}, channel {CHANNEL} × {2 ** data['size']}, {data['place']}", fontsize=10)
        right.legend(loc="upper right", frameon=False)
        for axes in (left, right):
            axes.grid(**GRID)
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    def describe(data):
        middle = len(ks) // 2
        mine, other = (f"{100.0 * data['flips'][name][middle]:.1f} %" for name in ("as set", "the other way"))
        with_, without = ("with", "without") if data["rotation"] else ("without", "with")
        return (
            f"{data['format']}, channel {CHANNEL} {2 ** data['size']} times as large {data['place']}. Left, a key's "
            f"numbers as held against the true ones. Right, changed keys against k: at k = {ks[middle]}, "
            f"{mine} {with_} the rotation and {other} {without}."
        )

    controls = {
        "size": ipywidgets.IntSlider(5, min=0, max=8, description="size 2^n"),
        "place": ipywidgets.Dropdown(options=list(PLACES), description="where"),
        "format": ipywidgets.Dropdown(options=list(formats), value=format, description="format"),
        "rotation": ipywidgets.Checkbox(False, description="Hadamard rotation"),
    }
    return LiveFigure("outlier", look, draw, describe, **controls)
