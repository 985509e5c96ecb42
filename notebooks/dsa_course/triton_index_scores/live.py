"""Notebook 08: which elements a program touches, and which tiles of the score plane are worth computing."""

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..viz import COLOURS, FAINT, LiveFigure

INK = "#222222"


def row_tiles() -> LiveFigure:
    """A row of n elements cut into blocks: what one program touches, and which of its lanes the mask switches off.

    `.data`: n, BLOCK, program, programs (the grid), touched and masked (lists of offsets).
    """

    def look(n, BLOCK, program):
        lanes = program * BLOCK + np.arange(BLOCK)
        return {
            "n": n,
            "BLOCK": BLOCK,
            "program": program,
            "programs": -(-n // BLOCK),
            "touched": lanes[lanes < n].tolist(),
            "masked": lanes[lanes >= n].tolist(),
        }

    def draw(data):
        n, BLOCK, program, programs = (data[name] for name in ("n", "BLOCK", "program", "programs"))
        end = max(programs, program + 1) * BLOCK
        figure = Figure(figsize=(7.4, 2.7), layout="constrained", facecolor=COLOURS["visible"])
        axes = figure.add_subplot(
            xlim=(-0.4, end + 0.4),
            ylim=(-0.25, 2.55),
            xlabel="offset from x_ptr (elements)",
            title=f"{n} elements in blocks of {BLOCK}: a grid of {programs}. Program {program} {_doing(data)}",
        )
        for i in range(n):
            mine = i in data["touched"]
            face = COLOURS["selected"] if mine else COLOURS["visible"]
            axes.add_patch(Rectangle((i, 1.4), 1, 0.8, facecolor=face, edgecolor=INK, linewidth=0.7))
        for p in range(end // BLOCK):
            own = p == program
            axes.add_patch(
                Rectangle(
                    (p * BLOCK + 0.1, 0.15), BLOCK - 0.2, 0.8, facecolor="none", zorder=3 if own else 1,
                    edgecolor=COLOURS["query"] if own else COLOURS["future"], linewidth=2.5 if own else 1.0,
                    linestyle="-" if p < programs else ":",
                )
            )  # fmt: skip
            axes.text(p * BLOCK + BLOCK / 2, 0.55, str(p), ha="center", va="center", fontsize=9, zorder=4)
        for i in data["masked"]:
            axes.add_patch(Rectangle((i, 1.4), 1, 0.8, facecolor=COLOURS["future"], edgecolor="white", hatch="///"))
        axes.axvline(n, 0.52, 0.98, color=INK, linewidth=2)
        axes.set_yticks([0.55, 1.8], labels=["program id", "memory"])
        axes.set_xticks([*range(0, end, BLOCK), end] if end // BLOCK <= 12 else range(0, end + 1, 4 * BLOCK))
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        legend = [
            Patch(facecolor=COLOURS["selected"], label="touched by this program"),
            Patch(facecolor=COLOURS["visible"], edgecolor=INK, label="the others' elements"),
            Patch(facecolor=COLOURS["future"], edgecolor="white", hatch="///", label="its lanes past the end: masked"),
        ]
        figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        return figure

    def describe(data):
        touched, masked = data["touched"], data["masked"]
        part = f"touches offsets {touched[0]} to {touched[-1]}" if touched else "touches nothing"
        return (
            f"A row of {data['n']} elements in blocks of {data['BLOCK']}, a grid of {data['programs']}. "
            f"Program {data['program']} {part}; {len(masked)} of its lanes are masked."
        )

    sliders = {
        "n": ipywidgets.IntSlider(21, min=1, max=40, description="n"),
        "BLOCK": ipywidgets.SelectionSlider(options=[4, 8, 16], value=8, description="BLOCK"),
        "program": ipywidgets.IntSlider(2, min=0, max=9, description="program id"),
    }
    return LiveFigure("row_tiles", look, draw, describe, **sliders)


def _doing(data):
    if not data["touched"]:
        return "is one too many"
    return f"masks {len(data['masked'])} lanes" if data["masked"] else "masks nothing"


def score_tiles() -> LiveFigure:
    """The plane of T queries by S keys in tiles of BQ by BK: whole, cut by the diagonal, or nothing but future.

    `.data`: T, S, BQ, BK, program, kind (int array, one a tile: 2 all visible, 1 cut, 0 only future), visible (pairs
    that count) and computed (pairs in tiles that are not skipped, with the lanes past the edges).
    """

    def look(T, S, BQ, BK, program):
        last = S - T + np.arange(T)  # the last key that row t sees
        rows, columns = -(-T // BQ), -(-S // BK)
        kind = np.zeros((rows, columns), dtype=int)
        for i in range(rows):
            own = last[i * BQ : (i + 1) * BQ]
            for j in range(columns):
                first_key, last_key = j * BK, min((j + 1) * BK, S) - 1
                kind[i, j] = 2 if last_key <= own[0] else 1 if first_key <= own[-1] else 0
        computed = int((kind > 0).sum()) * BQ * BK
        return {
            "T": T, "S": S, "BQ": BQ, "BK": BK, "program": min(program, rows - 1), "kind": kind,
            "instead": {"program": rows - 1} if program >= rows else {},
            "visible": int((last + 1).sum()), "computed": computed,
        }  # fmt: skip

    def draw(data):
        T, S, BQ, BK, kind = (data[name] for name in ("T", "S", "BQ", "BK", "kind"))
        rows, columns = kind.shape
        figure = Figure(figsize=(7.4, 4.4), layout="constrained", facecolor=COLOURS["visible"])
        share = data["visible"] / data["computed"]
        axes = figure.add_subplot(
            xlim=(-0.5, columns * BK + 0.5),
            ylim=(rows * BQ + 0.5, -0.5),
            xlabel="key s",
            ylabel="query t",
            title=f"{(kind > 0).sum()} of {kind.size} tiles computed; {share:.0%} of their places are visible pairs",
        )
        looks = {
            2: {"facecolor": COLOURS["visible"]},
            1: {"facecolor": COLOURS["visible"], "hatch": "///"},
            0: {"facecolor": COLOURS["future"]},
        }
        for i in range(rows):
            for j in range(columns):
                edge = {"edgecolor": INK, "linewidth": 0.8}
                axes.add_patch(Rectangle((j * BK, i * BQ), BK, BQ, **looks[int(kind[i, j])], **edge))
        past = {"facecolor": FAINT, "edgecolor": "white", "hatch": "...", "linewidth": 0}
        axes.add_patch(Rectangle((S, 0), columns * BK - S, rows * BQ, **past))
        axes.add_patch(Rectangle((0, T), S, rows * BQ - T, **past))
        axes.add_patch(
            Rectangle(
                (0, data["program"] * BQ), columns * BK, BQ, facecolor="none", edgecolor=COLOURS["query"],
                linewidth=3, zorder=4,
            )
        )  # fmt: skip
        axes.stairs(S - T + np.arange(T) + 1, np.arange(T + 1), orientation="horizontal", color=INK, linewidth=2.0)
        legend = [
            Patch(facecolor=COLOURS["visible"], edgecolor=INK, label="whole tile visible"),
            Patch(facecolor=COLOURS["visible"], edgecolor=INK, hatch="///", label="cut by the causal edge"),
            Patch(facecolor=COLOURS["future"], edgecolor=INK, label="only future: skipped"),
            Patch(**past, label="past T or S: masked"),
            Patch(
                facecolor="none", edgecolor=COLOURS["query"], linewidth=3, label=f"rows of program {data['program']}"
            ),
        ]
        figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        return figure

    def describe(data):
        kind = data["kind"]
        return (
            f"{data['T']} queries by {data['S']} keys in tiles of {data['BQ']} by {data['BK']}: {(kind == 2).sum()} "
            f"tiles wholly visible, {(kind == 1).sum()} cut by the causal edge, {(kind == 0).sum()} skipped."
        )

    sliders = {
        "T": ipywidgets.IntSlider(22, min=4, max=32, description="T"),
        "S": ipywidgets.IntSlider(43, min=32, max=64, description="S"),
        "BQ": ipywidgets.SelectionSlider(options=[1, 2, 4, 8], value=4, description="BQ"),
        "BK": ipywidgets.SelectionSlider(options=[4, 8, 16], value=8, description="BK"),
        "program": ipywidgets.IntSlider(2, min=0, max=7, description="program id"),
    }
    return LiveFigure("score_tiles", look, draw, describe, **sliders)
