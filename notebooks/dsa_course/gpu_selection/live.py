"""Notebook 10: two pictures of how group maxima and radix passes close in on the k-th largest score."""

import ipywidgets
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from ..viz import COLOURS, FAINT, LINES, LiveFigure
from .thresholds import NEIGHBOURS, SPREAD, group_maxima, lower_bound, ordered_bits, radix_passes


def live_bound(scores, k, group) -> LiveFigure:
    """Histogram of a row's scores [S] with the k-th largest, the bound by group maxima, and the candidates between.

    `.data`: k, group, arrangement, scores, maxima, bound, kth, candidates (how many scores reach the bound).
    """
    scores = scores.detach().cpu()

    def look(k, group, arrangement):
        bound = lower_bound(scores, k, group, arrangement)
        return {
            "k": k, "group": group, "arrangement": arrangement, "scores": scores.numpy(),
            "maxima": group_maxima(scores, group, arrangement).numpy(), "bound": bound,
            "kth": float(scores.topk(k).values[-1]), "candidates": int((scores >= bound).sum()),
        }  # fmt: skip

    sliders = {
        "k": ipywidgets.IntSlider(k, min=1, max=min(128, len(scores)), description="k"),
        "group": ipywidgets.IntSlider(group, min=1, max=32, description="group size"),
        "arrangement": ipywidgets.Dropdown(options=(NEIGHBOURS, SPREAD), description="groups of"),
    }
    return LiveFigure("bound", look, _draw_bound, _describe_bound, **sliders)


def _draw_bound(data):
    scores, maxima, bound, kth = data["scores"], data["maxima"], data["bound"], data["kth"]
    edges = np.linspace(scores.min(), scores.max(), 49)
    figure = Figure(figsize=(7, 4), layout="constrained", facecolor=COLOURS["visible"])
    axes = figure.add_subplot(xlabel="index score (no unit)", ylabel="keys in this bin (number)")
    parts = (scores[scores >= kth], scores[(scores < kth) & (scores >= bound)], scores[scores < bound])
    below = np.zeros(48)
    for part, look in zip(
        parts,
        (
            {"facecolor": COLOURS["selected"], "edgecolor": "black"},
            {"facecolor": COLOURS["visible"], "edgecolor": "black", "hatch": "////"},
            {"facecolor": FAINT, "edgecolor": "#777777"},
        ),
        strict=True,
    ):
        counts, _ = np.histogram(part, edges)
        axes.bar(edges[:-1], counts, np.diff(edges), below, align="edge", linewidth=0.6, **look)
        below += counts
    counts, _ = np.histogram(maxima[np.isfinite(maxima)], edges)
    axes.stairs(counts, edges, color="black", linewidth=1.6)
    axes.axvline(kth, color=COLOURS["selected"], linewidth=1.8)
    if np.isfinite(bound):
        axes.axvline(bound, color=LINES[1][0], linestyle="--", linewidth=1.8)
    axes.set_title(_sentence(data), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    extra = data["candidates"] - len(parts[0])
    legend = [
        Patch(facecolor=COLOURS["selected"], edgecolor="black", label=f"at least the k-th largest: {len(parts[0])}"),
        Patch(facecolor="white", edgecolor="black", hatch="////", label=f"candidates that will lose: {extra}"),
        Patch(facecolor=FAINT, edgecolor="#777777", label=f"below the bound: {len(parts[2])}"),
        Line2D([], [], color="black", linewidth=1.6, label=f"group maxima: {len(maxima)}"),
        Line2D([], [], color=COLOURS["selected"], linewidth=1.8, label="k-th largest score"),
        Line2D([], [], color=LINES[1][0], linestyle="--", linewidth=1.8, label="bound: k-th largest maximum"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _sentence(data):
    many = "1 score" if data["group"] == 1 else f"{data['group']} {data['arrangement']}"
    head = f"k = {data['k']}, {len(data['maxima'])} groups of {many}"
    if not np.isfinite(data["bound"]):
        return f"{head}: fewer groups than k, so no bound, candidates: {data['candidates']}"
    return f"{head}: bound {data['bound']:.2f}, k-th largest {data['kth']:.2f}, candidates: {data['candidates']}"


def _describe_bound(data):
    return f"Histogram of {len(data['scores'])} index scores of one query. {_sentence(data)}."


def live_radix(scores, k, step) -> LiveFigure:
    """Radix select on a row's scores [S], one byte a step: the interval that holds the k-th largest, and the counters.

    `.data`: k, step, the row's `scores` still in the game, `wanted` (the rank among them), counts [256], byte, and the
    `interval` (lowest, highest fp32 value) that is left after this step.
    """
    scores = scores.detach().cpu()
    keys = ordered_bits(scores)

    def look(k, step):
        passes = radix_passes(keys, k)
        found = passes[step - 1]
        known = sum(p["byte"] << shift for p, shift in zip(passes[:step], (24, 16, 8, 0), strict=False))
        inside = torch.isin(keys, found["keys"])
        ends = torch.tensor([known, known + (1 << (32 - 8 * step)) - 1])
        return {
            "k": k, "step": step, "scores": scores[inside].numpy(), "wanted": found["wanted"],
            "counts": found["counts"].numpy(), "byte": found["byte"], "interval": _as_floats(ends).tolist(),
        }  # fmt: skip

    sliders = {
        "k": ipywidgets.IntSlider(k, min=1, max=min(128, len(scores)), description="k"),
        "step": ipywidgets.IntSlider(step, min=1, max=4, description="byte no."),
    }
    return LiveFigure("radix", look, _draw_radix, _describe_radix, **sliders)


def _as_floats(keys):
    """The fp32 numbers with these ordered bits."""
    bits = torch.where(keys >= 2**31, keys - 2**31, ~keys)
    return bits.to(torch.int32).view(torch.float32)


def _draw_radix(data):
    scores, counts, byte, (low, high) = data["scores"], data["counts"], data["byte"], data["interval"]
    looks = (  # keys above the byte, with it, below it: selected, open as the candidates of the bound are, dropped
        {"facecolor": COLOURS["selected"], "edgecolor": "black"},
        {"facecolor": COLOURS["visible"], "edgecolor": "black", "hatch": "////"},
        {"facecolor": FAINT, "edgecolor": "#777777"},
    )
    figure = Figure(figsize=(7, 4), layout="constrained", facecolor=COLOURS["visible"])
    line, bars = figure.subplots(2, 1, height_ratios=(1, 2.2))
    pad = 0.03 * (scores.max() - scores.min()) or 0.03 * max(abs(float(scores.max())), 1e-6)
    line.set(xlim=(scores.min() - pad, scores.max() + pad), ylim=(0, 1), yticks=[])
    line.set_xlabel("index score (no unit), one stroke a key; the frame is what this byte leaves", fontsize=9)
    for part, colour, width in (
        (scores[scores < low], "#999999", 0.8),
        (scores[(scores >= low) & (scores <= high)], "black", 1.2),
        (scores[scores > high], COLOURS["selected"], 0.8),
    ):
        line.vlines(part, 0.2, 0.8, color=colour, linewidth=width)
    left, right = (min(max(end, line.get_xlim()[0]), line.get_xlim()[1]) for end in (low, high))
    frame = {"fill": False, "edgecolor": "black", "linewidth": 1.4, "clip_on": False}
    line.add_patch(Rectangle((left, 0.06), right - left, 0.88, **frame))
    line.spines[["top", "left", "right"]].set_visible(False)
    line.set_title(_step_sentence(data), fontsize=9)
    used = counts.nonzero()[0]
    shares = (used > byte, used == byte, used < byte)
    for share, look in zip(shares, looks, strict=True):
        bars.bar(share.nonzero()[0], counts[used[share]], 0.8, linewidth=0.5, **look)
    apart = -(-len(used) // 16)
    bars.set_xticks(range(0, len(used), apart), labels=[str(i) for i in used[::apart]])
    bars.set(xlim=(-0.8, len(used) - 0.2), ylabel="keys with this byte\n(number, log scale)")
    bars.set_yscale("symlog", linthresh=1)
    bars.set_ylim(0, 1.4 * counts.max())
    bars.yaxis.set_major_formatter("{x:g}")
    bars.set_xlabel(f"value of byte {data['step']} of the ordered integer (only values that occur)")
    bars.spines[["top", "right"]].set_visible(False)
    words = ("selected for certain", f"byte {byte}, looked at next", "too small")
    legend = [
        Patch(label=f"{word}: {int(counts[used[share]].sum())}", **look)
        for word, share, look in zip(words, shares, looks, strict=True)
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _step_sentence(data):
    left = int(data["counts"][data["byte"]])
    return (
        f"k = {data['k']}, byte {data['step']} of 4. Keys that share the bytes before: {len(data['scores'])}, "
        f"rank sought: {data['wanted']}, left: {left}"
    )


def _describe_radix(data):
    low, high = data["interval"]
    return f"Strokes for scores and bars for bytes. {_step_sentence(data)}, between {low:.6g} and {high:.6g}."
