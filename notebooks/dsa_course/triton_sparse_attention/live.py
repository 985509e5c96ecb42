"""Notebook 09: which rows of kv one tile of the attention kernel gathers, and what m and l are after it."""

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ..online_softmax.live import online_update
from ..viz import COLOURS, LiveFigure

TILES = (16, 32, 64, 128)  # BK, powers of two as Triton wants them
EARLIER, MASKED = "#8fb3d9", "#777777"


def live_gather(step, scale, byte, tile=1, BK=16, head=0) -> LiveFigure:
    """One query's walk over its tiles of selected rows. Sliders: the query's byte, the tile, BK, the head.

    step: what a sparse forward pass recorded for a layer. `.data`: byte, head, BK, tile, S, places (the tile's j), rows
    (s for each, -1 where masked), indices [k], m and l (after each tile, one number a tile), lse.
    """
    q, kv = (step[name].detach().cpu().double().numpy() for name in ("q", "kv"))
    indices = step["indices"].cpu().numpy()
    k = indices.shape[1]

    def walk(byte, tile, BK, head):
        row, ms, ls = indices[byte], [], []
        padded = np.append(row, np.full(-k % BK, -1))  # what the kernel's masked load gives past k
        logits = np.where(padded >= 0, kv[padded] @ q[byte, head] * scale, -np.inf)
        m, l, acc = np.full(1, -np.inf), np.zeros(1), np.zeros((1, 1))  # noqa: E741 (l is the field's name for it)
        for j0 in range(0, k, BK):
            m, l, acc = online_update(m, l, acc, logits[None, j0 : j0 + BK], np.zeros((BK, 1)))  # noqa: E741
            ms.append(float(m[0]))
            ls.append(float(l[0]))
        instead = {"tile": len(ms) - 1} if tile >= len(ms) else {}
        tile = min(tile, len(ms) - 1)
        places = np.arange(tile * BK, tile * BK + BK)
        return {
            "byte": byte, "head": head, "BK": BK, "tile": tile, "S": kv.shape[0], "places": places,
            "instead": instead, "rows": padded[places], "indices": row,
            "m": ms, "l": ls, "lse": ms[-1] + float(np.log(ls[-1])),
        }  # fmt: skip

    wide = ipywidgets.Layout(width="600px")
    sliders = {
        "byte": ipywidgets.IntSlider(byte, min=0, max=len(q) - 1, description="byte t", layout=wide),
        "tile": ipywidgets.IntSlider(tile, min=0, max=-(-k // min(TILES)) - 1, description="tile"),
        "BK": ipywidgets.SelectionSlider(value=BK, options=TILES, description="BK"),
        "head": ipywidgets.IntSlider(head, min=0, max=q.shape[1] - 1, description="head"),
    }
    return LiveFigure("gather", walk, _draw, _describe, **sliders)


def _draw(data):
    figure = Figure(figsize=(7.2, 4.8), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
    _draw_gather(figure.add_subplot(grid[0, :]), data)
    for column, name in enumerate(("m", "l")):
        axes = figure.add_subplot(grid[1, column])
        values, tile = np.array(data[name]), data["tile"]
        tiles = np.arange(len(values))
        seen = np.isfinite(values)
        after = tiles > tile
        axes.plot(tiles[seen], values[seen], color="#777777", linewidth=1, linestyle=":", zorder=1)
        axes.plot(tiles[seen & ~after], values[seen & ~after], "o", color=EARLIER, markeredgecolor="#555555")
        axes.plot(tiles[seen & after], values[seen & after], "o", color="white", markeredgecolor="#777777")
        axes.plot(tile, values[tile], "o", color=COLOURS["selected"], markersize=9)
        axes.margins(0, 0.25)
        axes.set_xlim(-0.4, len(values) - 0.6)
        axes.set_xticks(tiles)
        axes.set_xlabel("tile")
        axes.set_ylabel(f"{name} (no unit)")
        axes.set_title(f"{name} = {values[tile]:.2f} after tile {tile}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [
        Patch(facecolor=COLOURS["selected"], label="this tile's rows"),
        Patch(facecolor=EARLIER, edgecolor="#555555", label="earlier tiles"),
        Patch(facecolor="white", edgecolor="#777777", label="later tiles"),
        Line2D([], [], linestyle="", marker="x", color=MASKED, label="masked lane: nothing is read"),
        Line2D([], [], color=COLOURS["query"], label="row t, the query's own"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7.5, frameon=False)
    return figure


def _draw_gather(axes, data):
    indices, places, rows, S = data["indices"], data["places"], data["rows"], data["S"]
    j = np.arange(len(indices))
    real = indices >= 0
    below = -0.07 * S  # where lanes without a row are marked
    axes.axvspan(places[0] - 0.5, places[-1] + 0.5, color="black", alpha=0.07, linewidth=0)
    axes.axhline(data["byte"], color=COLOURS["query"], linewidth=1.5)
    for when, face, edge in (
        (real & (j < places[0]), EARLIER, "#555555"),
        (real & (j > places[-1]), "white", "#777777"),
    ):
        axes.plot(j[when], indices[when], "s", markersize=4.5, color=face, markeredgecolor=edge, markeredgewidth=0.6)
    there = rows >= 0
    axes.plot(places[there], rows[there], "s", markersize=5, color=COLOURS["selected"])
    axes.plot(places[~there], np.full((~there).sum(), below), "x", markersize=5, color=MASKED)
    axes.set_xlim(-1, max(len(indices), places[-1] + 1))
    axes.set_ylim(1.05 * S, 1.9 * below)
    axes.set_xlabel("place j in the query's list of indices")
    axes.set_ylabel("row s of kv")
    axes.set_title(
        f"byte {data['byte']}, head {data['head']}: tile {data['tile']} gathers {there.sum()} of {S} rows "
        f"({(~there).sum()} of its {data['BK']} lanes masked)",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)


def _describe(data):
    there = int((data["rows"] >= 0).sum())
    return (
        f"For byte {data['byte']}, tile {data['tile']} of {data['BK']} lanes gathers {there} of {data['S']} rows of "
        f"kv, and {data['BK'] - there} lanes are masked. After it, head {data['head']} has "
        f"m = {data['m'][data['tile']]:.2f} and l = {data['l'][data['tile']]:.2f}."
    )
