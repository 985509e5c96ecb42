"""Notebook 11: the ladder of each step, the roofline with its versions, and a ring of stages against the clock."""

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from ..viz import COLOURS, LiveFigure
from .record import STEPS, ceilings, least_work, row, versions
from .ring import timeline, waiting

OURS, OTHERS, DROPPED = COLOURS["selected"], "#777777", "#c9d6e5"
SHAPES = {"index_scores": (4096, 131_072, "fp8"), "sparse_attention": (4096, 32_768, "bf16")}  # T, S, arithmetic


def _figure(height):
    return Figure(figsize=(8.6, height), layout="constrained", facecolor=COLOURS["visible"])


# ------------------------------------------------------------------------------------------------------------ ladder


def live_ladder(step="index_scores", measured=True) -> LiveFigure:
    """The versions of one step, top to bottom: what was predicted, what was measured, and the public kernel beside it.

    Controls: the step; whether measured times are shown. `.data`: step, shown, versions (as `record.versions`).
    """

    def compute(step, measured):
        return {"step": step, "shown": measured, "versions": versions(step)}

    def draw(data):
        found, shown = data["versions"], data["shown"]
        figure = _figure(1.7 + 0.42 * len(found))
        axes = figure.add_subplot(xlabel="ms of one call on the H200 of the record (left is faster)")
        widest = max(max(v["high"], v["predicted"]) for v in found)
        for y, v in enumerate(found):
            if shown:
                hatch = None if v["kept"] else "///"
                axes.barh(y, v["ms"], 0.62, color=OURS if v["kept"] else DROPPED, edgecolor="black", hatch=hatch)
                axes.plot((v["low"], v["high"]), (y, y), color="black", linewidth=3, solid_capstyle="butt")
                axes.text(1.19 * widest, y, f"{v['ms']:.2f} ms", va="center", ha="right", fontsize=9)
            frame = {"marker": "D", "markersize": 8, "markeredgecolor": "black", "zorder": 4}
            axes.plot(v["predicted"], y, color=COLOURS["query"], linestyle="none", **frame)
        axes.set(xlim=(0, 1.2 * widest), ylim=(len(found) - 0.4, -0.6))
        axes.set_yticks(range(len(found)), labels=[v["version"] for v in found], fontsize=9)
        handles = [
            Line2D(
                [], [], color=COLOURS["query"], marker="D", markeredgecolor="black", linestyle="none", label="predicted"
            )
        ]
        if shown:
            dropped = Patch(facecolor=DROPPED, edgecolor="black", hatch="///", label="measured, dropped")
            peer_ms = float(np.median([v["peer_ms"] for v in found]))
            axes.axvline(peer_ms, color=OTHERS, linestyle="--", linewidth=1.6)
            handles += [
                Patch(facecolor=OURS, edgecolor="black", label="measured, kept"),
                *([dropped] if not all(v["kept"] for v in found) else []),
                Line2D([], [], color="black", linewidth=3, label="10th to 90th percentile"),
                Line2D([], [], color=OTHERS, linestyle="--", label=f"{found[0]['peer']}, {peer_ms:.2f} ms"),
            ]
        axes.set_title(f"{data['step']}, {found[0]['case']}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        return figure

    def describe(data):
        parts = []
        for v in data["versions"]:
            measured = f", measured {v['ms']:.2f}" if data["shown"] else ""
            parts.append(f"{v['version']}: predicted {v['predicted']:.2f} ms{measured}")
        return f"The versions of {data['step']} as bars, top to bottom in the order they were made. " + "; ".join(parts)

    controls = {
        "step": ipywidgets.Dropdown(value=step, options=STEPS, description="step"),
        "measured": ipywidgets.Checkbox(value=measured, description="show what was measured"),
    }
    return LiveFigure("ladder", compute, draw, describe, **controls)


# ---------------------------------------------------------------------------------------------------------- roofline


def live_roofline(step="index_scores", queries=12) -> LiveFigure:
    """The card's roof, log-log, with a step's versions as points, and the same step for fewer queries on the roof.

    Controls: the step; T as a power of two. `.data`: step, T, S, flops, bytes, intensity, roof (the most FLOPs a second
    at this intensity), bound, ridge, points [(version, intensity, FLOPs a second, kept)].
    """

    def compute(step, queries):
        T, S, kind = SHAPES[step]
        peak, copy = ceilings()[kind], ceilings()["copy"]
        full = row(step, versions(step)[0]["case"])["work"]
        _, full_bytes = least_work(step, T, S)
        points = [
            (v["version"], full / full_bytes, 1e3 * full / v["ms"], v["kept"]) for v in versions(step)
        ]  # all do the same work
        flops, size = least_work(step, 2**queries, S)
        ridge = peak / copy
        return {
            "step": step, "T": 2**queries, "S": S, "flops": flops, "bytes": size, "intensity": flops / size,
            "peak": peak, "copy": copy, "ridge": ridge, "roof": min(peak, copy * flops / size),
            "bound": "computing" if flops / size > ridge else "memory", "points": points,
        }  # fmt: skip

    def draw(data):
        figure = _figure(4.5)
        axes, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
        axes.set(xlabel="FLOPs for each byte of memory", ylabel="TFLOP/s")
        x = np.geomspace(4, 4e4, 400)
        roof = np.minimum(data["peak"], data["copy"] * x) / 1e12
        axes.plot(x, roof, color="black", linewidth=2)
        axes.axvline(data["ridge"], color=OTHERS, linestyle=":", linewidth=1.2)
        axes.text(data["ridge"] / 1.1, 12, f"the ridge:\n{data['ridge']:,.0f} FLOPs a byte", fontsize=8, ha="right")
        for i, (_, intensity, rate, kept) in enumerate(data["points"]):
            face, label = OURS if kept else DROPPED, None if i else "the versions"
            axes.plot(intensity, rate / 1e12, "o", color=face, markeredgecolor="black", markersize=7, label=label)
        here = {
            "markersize": 14,
            "markeredgecolor": "black",
            "color": COLOURS["query"],
            "linestyle": "none",
            "zorder": 5,
        }
        axes.plot(data["intensity"], data["roof"] / 1e12, marker="*", label=f"the roof for T = {data['T']:,}", **here)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set(xlim=(4, 4e4), ylim=(8, 3000))
        axes.grid(color="#dddddd", linewidth=0.6, which="both")
        title = f"T = {data['T']:,}, {data['S']:,} keys: {data['bound']} bounds it,\nat most "
        axes.set_title(title + f"{data['roof'] / 1e12:,.0f} TFLOP/s", fontsize=9)
        axes.legend(loc="upper left", fontsize=8, frameon=False)
        for y, (_, _, rate, kept) in enumerate(data["points"]):
            face, hatch = (OURS, None) if kept else (DROPPED, "///")
            right.barh(y, rate / data["peak"], 0.62, color=face, edgecolor="black", hatch=hatch)
            right.text(1.19, y, f"{rate / data['peak']:.0%}", va="center", ha="right", fontsize=9)
        right.axvline(1, color="black", linewidth=2)
        right.set(xlim=(0, 1.2), ylim=(len(data["points"]) - 0.4, -0.6), xlabel="share of the flat roof")
        right.set_yticks(range(len(data["points"])), labels=[name for name, *_ in data["points"]], fontsize=8)
        right.set_title("the points, enlarged", fontsize=9)
        for each in (axes, right):
            each.spines[["top", "right"]].set_visible(False)
        return figure

    def describe(data):
        points = ", ".join(f"{name} {rate / 1e12:.0f}" for name, _, rate, _ in data["points"])
        return (
            f"A roofline, log-log: a slope of {data['copy'] / 1e12:.2f} TB/s up to {data['ridge']:.0f} FLOPs a byte, "
            f"then flat at {data['peak'] / 1e12:.0f} TFLOP/s. Versions of {data['step']}, in TFLOP/s: {points}. "
            f"With T = {data['T']} there are {data['intensity']:.0f} FLOPs a byte: {data['bound']} bounds the step."
        )

    controls = {
        "step": ipywidgets.Dropdown(value=step, options=tuple(SHAPES), description="step"),
        "queries": ipywidgets.IntSlider(queries, min=0, max=12, description="T = 2^"),
    }
    return LiveFigure("roofline", compute, draw, describe, **controls)


# -------------------------------------------------------------------------------------------------------------- ring

TILES = 9  # drawn


def live_ring(places=1, latency=2800, use=1024) -> LiveFigure:
    """Tiles through a ring of stages against the clock: on their way, waiting, used. And when the tensor cores rest.

    Controls: places of the ring; clocks until a tile has come; clocks in which it is used. `.data`: spans (as
    `ring.timeline`), idle (clocks without a tile in use, after the first), busy (share of the time since then).
    """

    def compute(places, latency, use):
        spans = timeline(places, latency, use, TILES)
        idle = waiting(spans)
        total = spans[-1][3] - spans[0][2]
        return {
            "places": places,
            "latency": latency,
            "use": use,
            "spans": spans,
            "idle": idle,
            "busy": 1 - idle / total,
        }

    def draw(data):
        figure = _figure(4.0)
        axes = figure.add_subplot(xlabel="clocks", ylabel="tile")
        for i, (asked, came, begun, done) in enumerate(data["spans"]):
            axes.add_patch(
                Rectangle((asked, i + 0.15), came - asked, 0.7, facecolor="#e6e6e6", edgecolor="black", hatch="...")
            )
            axes.add_patch(Rectangle((came, i + 0.15), begun - came, 0.7, facecolor="white", edgecolor="black"))
            axes.add_patch(Rectangle((begun, i + 0.15), done - begun, 0.7, facecolor=OURS, edgecolor="black"))
            axes.text(
                begun + (done - begun) / 2,
                i + 0.5,
                str(i % data["places"]),
                color="white",
                ha="center",
                va="center",
                fontsize=8,
            )
        end = data["spans"][-1][3]
        axes.set(xlim=(0, max(12_000, 1.02 * end)), ylim=(len(data["spans"]), 0))
        axes.set_yticks(np.arange(TILES) + 0.5, labels=range(TILES))
        axes.set_title(
            f"places: {data['places']}. After the first tile the tensor cores rest {data['idle']:,} clocks, "
            f"busy {data['busy']:.0%}",
            fontsize=10,
        )
        handles = [
            Patch(facecolor="#e6e6e6", edgecolor="black", hatch="...", label="on its way (latency)"),
            Patch(facecolor="white", edgecolor="black", label="has come, waits"),
            Patch(facecolor=OURS, edgecolor="black", label="used (the number is its place)"),
        ]
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        return figure

    def describe(data):
        return (
            f"{TILES} tiles in a ring of {data['places']} places, each {data['latency']} clocks on its way and used "
            f"for {data['use']}. After the first the tensor cores rest {data['idle']} clocks and are busy "
            f"{data['busy']:.0%}."
        )

    wide = ipywidgets.Layout(width="460px")
    style = {"description_width": "130px"}
    controls = {
        "places": ipywidgets.IntSlider(places, min=1, max=6, description="places", layout=wide, style=style),
        "latency": ipywidgets.IntSlider(
            latency, min=200, max=4000, step=200, description="clocks on its way", layout=wide, style=style
        ),
        "use": ipywidgets.IntSlider(
            use, min=256, max=2048, step=256, description="clocks in use", layout=wide, style=style
        ),
    }
    return LiveFigure("ring", compute, draw, describe, **controls)
