"""Notebook 05: the online softmax, watched block by block on one row of logits, and the course's own update."""

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..viz import COLOURS, LiveFigure

SIZES = (1, 4, 8, 16, 32, 64)  # keys a block


def online_update(m, l, acc, logits, values):  # noqa: E741 (l is the field's name for it)
    """One block more: m, l [H], acc [H, V], logits [H, B] (-inf: no key there), values [B, V] -> new (m, l, acc)."""
    new_m = np.maximum(m, logits.max(axis=1))
    finite_m = np.where(new_m == -np.inf, 0.0, new_m)
    rescale = np.exp(m - finite_m)
    p = np.exp(logits - finite_m[:, None])
    return new_m, l * rescale + p.sum(axis=1), acc * rescale[:, None] + p @ values


def live_online_softmax(logits, blocks=3, size=16, head=0) -> LiveFigure:
    """One row's logits read block by block. Sliders: how many blocks have been read, the block's size, the head.

    logits: [H, k] numbers, all finite. `.data`: head, size, read (keys read so far), block (the slice read last),
    logits [k], m, l, rescale (of the last block), weights [k] so far, final [k] (the two-pass softmax).
    """
    logits = np.asarray(logits, dtype=float)
    H, k = logits.shape

    def read(blocks, size, head):
        there = -(-k // size)
        row, done = logits[head], min(blocks * size, k)
        m, l, acc = np.full(1, -np.inf), np.zeros(1), np.zeros((1, k))  # noqa: E741
        rescale, last = 1.0, slice(0, 0)
        for j0 in range(0, done, size):
            last = slice(j0, min(j0 + size, k))
            old = m
            # The values are the unit vectors here, so acc is every key's own weight.
            m, l, acc = online_update(m, l, acc, row[None, last], np.eye(k)[last])  # noqa: E741
            rescale = float(np.exp(old - m)[0])
        final = np.exp(row - row.max())
        return {
            "head": head, "size": size, "read": done, "block": last, "logits": row, "m": float(m[0]), "l": float(l[0]),
            "instead": {"blocks": there} if blocks > there else {},
            "rescale": rescale, "weights": acc[0] / max(float(l[0]), 1e-300), "final": final / final.sum(),
        }  # fmt: skip

    largest = -(-k // min(SIZES))  # with larger blocks there are fewer, and the figure says so
    sliders = {
        "blocks": ipywidgets.IntSlider(blocks, min=0, max=largest, description="blocks read"),
        "size": ipywidgets.SelectionSlider(value=size, options=SIZES, description="block size"),
        "head": ipywidgets.IntSlider(head, min=0, max=H - 1, description="head"),
    }
    return LiveFigure("online softmax", read, _draw, _describe, **sliders)


def _draw(data):
    row, final, last = data["logits"], data["final"], data["block"]
    k, j = len(row), np.arange(len(row))
    unread, earlier = j >= data["read"], j < last.start
    colours = np.array([COLOURS["selected"]] * k, dtype=object)
    colours[earlier], colours[unread] = "#8fb3d9", COLOURS["visible"]
    figure = Figure(figsize=(7.2, 4.6), layout="constrained", facecolor="white")
    top, bottom = figure.subplots(2, 1, sharex=True)

    floor = min(row.min(), 0.0) - 1.0
    top.bar(j, row - floor, bottom=floor, color=colours, edgecolor="#777777", linewidth=0.4, width=0.9)
    top.set_ylabel("logit (no unit)")
    top.set_ylim(floor, row.max() + 1.5)
    if data["read"]:
        top.hlines(data["m"], -0.5, data["read"] - 0.5, color="black", linestyle="--", linewidth=1.4)
        label = {"textcoords": "offset points", "fontsize": 9, "va": "bottom"}
        back = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        top.annotate(f"m = {data['m']:.2f}", (-0.5, data["m"]), (2, 3), bbox=back, **label)
        top.axvspan(last.start - 0.5, last.stop - 0.5, color="#000000", alpha=0.07, linewidth=0)
        bottom.axvspan(last.start - 0.5, last.stop - 0.5, color="#000000", alpha=0.07, linewidth=0)
        numbers = f"m = {data['m']:.2f}   l = {data['l']:.2f}   rescale = {data['rescale']:.2f}"
    else:
        numbers = "m = -inf   l = 0"
    top.set_title(
        f"head {data['head']}: {data['read']} of {k} keys read, {data['size']} a block   {numbers}", fontsize=9
    )

    bottom.bar(j, data["weights"], color=colours, edgecolor="#777777", linewidth=0.4, width=0.9)
    bottom.plot(j, final, linestyle="none", marker="_", markersize=7, color="black", markeredgewidth=1.6)
    bottom.set_ylabel("weight so far (share)")
    bottom.set_xlabel("place j in the row of selected keys, oldest key first")
    bottom.set_xlim(-1, k)
    bottom.set_ylim(0, 1.08 * max(final.max(), data["weights"].max()))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Patch(facecolor=COLOURS["selected"], edgecolor="#777777", label="this block"),
        Patch(facecolor="#8fb3d9", edgecolor="#777777", label="earlier blocks"),
        Patch(facecolor=COLOURS["visible"], edgecolor="#777777", label="not read yet"),
        *bottom.lines,
    ]
    labels = [handle.get_label() for handle in handles[:3]] + ["two-pass softmax of all keys"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _describe(data):
    if not data["read"]:
        return f"Logits of {len(data['logits'])} selected keys for head {data['head']}; none has been read yet."
    equal = "equal to" if data["read"] == len(data["logits"]) else "not yet"
    return (
        f"Bars of {len(data['logits'])} logits for head {data['head']}, {data['read']} of them read in blocks of "
        f"{data['size']}. The running maximum m is {data['m']:.2f}, the running sum l is {data['l']:.2f}; the weights "
        f"so far are {equal} the softmax of all keys."
    )
