"""Notebook 11: two warpgroups that share tensor cores, as the kernel book draws them, for any times."""

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..viz import COLOURS, LiveFigure

HALF = 256  # clocks of the product of 64 keys with two queries of 64 heads: 64 · 128 · 128 multiply-adds, 4096 a clock
TILES = 4  # for each warpgroup
SCHEDULES = {  # name: (warpgroups, pieces of a tile: each is multiplied, then weighed)
    "one warpgroup": (1, 1),
    "two, whole tiles": (2, 1),
    "two, in halves": (2, 2),
}
TINTS = ("#5b8db8", "#b8c9da")  # warpgroups A and B; the letter says the same


def schedule(groups, pieces, weigh, tiles=TILES) -> dict:
    """Who is busy when, in clocks. weigh: a thread's clocks for one half; a tile is two halves for each warpgroup.

    A warpgroup asks for all products of its tile at once, the tensor cores serve who asked first, and it weighs a piece
    when that piece is multiplied. Weighing begins when the piece before is weighed; a tile is asked for when the
    tile before is weighed.

    Returns {"tensor": [(begin, end, group, tile)], "weigh": the same}. Raises: ValueError for weigh below 0.
    """
    if weigh < 0:
        raise ValueError(f"weigh must be at least 0, got {weigh}")
    product, weighing = 2 * HALF // pieces, 2 * weigh // pieces
    tensor, weighed, free = [], [], 0
    asks = [(0, group, 0) for group in range(groups)]  # (clock, group, tile)
    while asks:
        asks.sort()
        clock, group, tile = asks.pop(0)
        done = clock
        for _ in range(pieces):
            begin = max(clock, free)
            free = begin + product
            tensor.append((begin, free, group, tile))
            begin = max(free, done)
            done = begin + weighing
            weighed.append((begin, done, group, tile))
        if tile + 1 < tiles:
            asks.append((done, group, tile + 1))
    return {"tensor": tensor, "weigh": weighed}


def busy(spans) -> float:
    """The share of the time, from the first product to the last, in which the tensor cores multiply."""
    tensor = spans["tensor"]
    return sum(end - begin for begin, end, _, _ in tensor) / (max(t[1] for t in tensor) - tensor[0][0])


def live_warpgroups(kind="one warpgroup", weigh=192) -> LiveFigure:
    """Products and what follows them, side by side. Controls: the arrangement; clocks to weigh a half.

    `.data`: kind, weigh, spans (as `schedule`), busy (share of the time in which the tensor cores multiply).
    """

    def compute(kind, weigh):
        spans = schedule(*SCHEDULES[kind], weigh)
        return {"kind": kind, "weigh": weigh, "spans": spans, "busy": busy(spans)}

    def draw(data):
        figure = Figure(figsize=(8.6, 2.9), layout="constrained", facecolor=COLOURS["visible"])
        axes = figure.add_subplot(xlabel="clocks")
        groups = SCHEDULES[data["kind"]][0]
        for name, lines in (("tensor", None), ("weigh", 1)):
            for begin, end, group, tile in data["spans"][name]:
                y = 0 if lines is None else 1 + group
                hatch = None if name == "tensor" else "///"
                box = {"facecolor": TINTS[group], "edgecolor": "black", "hatch": hatch}
                axes.add_patch(Rectangle((begin, y + 0.12), end - begin, 0.76, **box))
                if end - begin >= 96:
                    back = {"facecolor": TINTS[group], "edgecolor": "none", "pad": 0.8}
                    axes.text(
                        (begin + end) / 2,
                        y + 0.5,
                        f"{'AB'[group]}{tile}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        bbox=back,
                    )
        labels = ["tensor cores", "A weighs", "B weighs"][: 1 + groups]
        axes.set_yticks(np.arange(len(labels)) + 0.5, labels=labels)
        end = max(span[1] for name in ("tensor", "weigh") for span in data["spans"][name])
        axes.set(xlim=(0, max(4800, end)), ylim=(3, 0))
        axes.set_title(f"{data['kind']}: the tensor cores are busy {data['busy']:.0%} of the time", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        handles = [
            Patch(facecolor=TINTS[0], edgecolor="black", label="product"),
            Patch(facecolor=TINTS[0], edgecolor="black", hatch="///", label="relu, weight, sum (weighing)"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        return figure

    def describe(data):
        return (
            f"A timeline of tensor cores and warpgroups, {data['kind']}, {data['weigh']} clocks to weigh a half. The "
            f"tensor cores are busy {data['busy']:.0%} of the time between their first product and their last."
        )

    wide, style = ipywidgets.Layout(width="460px"), {"description_width": "150px"}
    controls = {
        "kind": ipywidgets.Dropdown(value=kind, options=tuple(SCHEDULES), description="arrangement", style=style),
        "weigh": ipywidgets.IntSlider(
            weigh, min=0, max=512, step=32, description="clocks to weigh a half", layout=wide, style=style
        ),
    }
    return LiveFigure("warpgroups", compute, draw, describe, **controls)
