"""Notebook 13: what a scout selects while it learns, what it has learnt by when, and two ways to measure a guess."""

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .. import viz
from ..viz import COLOURS, LINES, LiveFigure

SHOWN = 8  # keys of attention that a picture names
GRID = {"color": "#dddddd", "linewidth": 0.6}
NAMES = {10: "↵", 32: "␣"}


def live_lesson(text, byte, seen, layer) -> LiveFigure:
    """One byte of a text: what the indexer selects for it, step by step, and the keys at which attention looks most.

    text: bytes; byte: the query; seen: what `lesson.Watch` gave at each step, for this byte; layer: where to start.
    `.data`: step, layer, selected and guess (of the selected keys), looked (the SHOWN keys with the largest weights),
    weights (theirs), found (bool for each of them), recall (of this query's whole attention).
    """
    steps = [one["step"] for one in seen]

    def compute(step, layer):
        now = seen[steps.index(step)]
        selected, attention = now["selected"][layer], now["attention"][layer]
        selected = selected[selected >= 0].long()
        weights, looked = attention.topk(SHOWN)
        return {
            "step": step,
            "layer": layer,
            "selected": selected.tolist(),
            "guess": now["guess"][layer][selected].tolist(),
            "looked": looked.tolist(),
            "weights": weights.tolist(),
            "found": [key in selected.tolist() for key in looked.tolist()],
            "recall": float(attention[selected].sum()),
        }

    def draw(data):
        marks = (byte, data["selected"], data["guess"])
        figure = viz.selection_over_text(text, *marks, columns=80, room=(2.5, 0), cell=0.085)
        cells, grid = viz.layout_of(text, 80), figure.axes[0]
        for key in data["looked"]:
            x, y, width = cells[key]
            frame = {"fill": False, "edgecolor": COLOURS["attention"], "linewidth": 1.6, "clip_on": False}
            grid.add_patch(Rectangle((x - 0.1, y), width + 0.2, 0.98, zorder=3, **frame))
        width, height = figure.get_size_inches()
        axes = figure.add_axes(((width - 1.7) / width, 1.0 / height, 1.1 / width, (height - 1.75) / height))
        axes.set_title(
            f"attention looks most at\n(green frames), layer {data['layer']}", fontsize=8, loc="left", x=-0.6
        )
        for row, (weight, found) in enumerate(zip(data["weights"], data["found"], strict=True)):
            face = COLOURS["attention"] if found else "none"
            axes.barh(row, weight, height=0.6, facecolor=face, edgecolor=COLOURS["attention"], linewidth=1.4)
            axes.text(weight + 0.01, row, f"{weight:.0%}" + ("" if found else " missed"), va="center", fontsize=8)
        labels = [f"{key} {NAMES.get(text[key]) or viz.glyph_of(text[key])}" for key in data["looked"]]
        axes.set_yticks(range(SHOWN), labels=labels, family="DejaVu Sans Mono", fontsize=8, parse_math=False)
        axes.set(ylim=(SHOWN - 0.4, -0.6), xticks=[], xlim=(0, max(0.2, 1.5 * data["weights"][0])))
        axes.tick_params(length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        words = f"after {data['step']} steps\nthe {len(data['selected'])} selected keys hold\n{data['recall']:.0%}"
        words += " of this byte's attention"
        figure.text((width - 2.35) / width, 0.78 / height, words, fontsize=9, va="top", linespacing=1.3)
        return figure

    def describe(data):
        found = sum(data["found"])
        return (
            f"Source text; byte {byte} is the query, in layer {data['layer']}. After {data['step']} steps the indexer "
            f"selects {len(data['selected'])} keys, which hold {data['recall']:.0%} of the attention; of the {SHOWN} "
            f"keys at which attention looks most, {found} are selected."
        )

    layers = len(seen[0]["recall"])
    controls = {
        "step": ipywidgets.SelectionSlider(options=steps, value=steps[0], description="step"),
        "layer": ipywidgets.IntSlider(layer, min=0, max=layers - 1, description="layer"),
    }
    return LiveFigure("lesson", compute, draw, describe, **controls)


def lesson_chart(seen, k, controls) -> Figure:
    """KL and recall against the step, on text that the indexer does not learn from; every layer, and their mean.

    seen: what `lesson.Watch` gave; k: keys; controls: {name: recall}, drawn as level lines.
    """
    steps = [one["step"] for one in seen]
    figure = Figure(figsize=(9, 3.5), layout="constrained", facecolor=COLOURS["visible"])
    left, right = figure.subplots(1, 2)
    for axes, name in ((left, "kl"), (right, "recall")):
        each = np.array([one[name] for one in seen])
        for layer, (_, line, marker) in zip(range(each.shape[1]), LINES[1:], strict=False):
            style = {"color": "#8a8a8a", "linewidth": 1.0, "markersize": 4}
            axes.plot(steps, each[:, layer], linestyle=line, marker=marker, label=f"layer {layer}", **style)
        axes.plot(steps, each.mean(axis=1), "o-", color=COLOURS["selected"], linewidth=2.2, label="mean")
        axes.set_xscale("symlog", base=2, linthresh=1)
        axes.set(xlabel="training steps, one window of bytes each", xlim=(-0.2, 1.2 * steps[-1]))
        axes.set_xticks(steps, labels=[str(step) for step in steps])
        axes.minorticks_off()
        axes.grid(**GRID)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(ylabel="KL (nats)", ylim=(0, None))
    right.set(ylabel=f"attention mass on {k} keys (share)", ylim=(0, 1))
    for name, value in controls.items():
        colour = COLOURS["attention"] if "most" in name else "#444444"
        right.axhline(value, color=colour, linewidth=1.0, linestyle=(0, (4, 2)))
        place = {"x": steps[-1], "ha": "right"} if value < 0.3 else {"x": -0.1, "ha": "left"}  # where no curve is
        right.text(y=value + 0.01, s=name, fontsize=8, va="bottom", color=colour, **place)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    return figure


KEYS = 32


def bumps(distance) -> np.ndarray:
    """A target with two peaks that far apart, equally high, over 32 keys, and a little everywhere else; sums to 1."""
    keys = np.arange(KEYS)
    centres = (KEYS - 1) / 2 + np.array([-distance, distance]) / 2
    p = np.exp(-0.5 * (keys[:, None] - centres) ** 2).sum(axis=1) + 1e-3
    return p / p.sum()


def one_bump(p) -> dict:
    """The guesses with a single peak that are nearest to p: {"KL(p || guess)": guess, "KL(guess || p)": guess}.

    A guess is the softmax of -(s - centre)² / (2 · width²); all centres and widths of a grid are tried.
    """
    keys, centres, widths = np.arange(KEYS), np.linspace(0, KEYS - 1, 63), np.geomspace(0.6, 16, 40)
    scores = -((keys - centres[:, None, None]) ** 2) / (2 * widths[:, None] ** 2)
    scores = scores.reshape(-1, KEYS)
    log_guess = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    guess = np.exp(log_guess)
    ways = {"KL(p || guess)": -(log_guess @ p), "KL(guess || p)": (guess * (log_guess - np.log(p))).sum(axis=1)}
    return {name: guess[cost.argmin()] for name, cost in ways.items()}


def live_directions(distance=8, k=12) -> LiveFigure:
    """A target with two peaks, and the best guess that has only one, by either KL. Slider: the peaks' distance.

    `.data`: distance, target [32], guesses (of `one_bump`), recall {name: share of the target on the k best keys}.
    """

    def compute(distance):
        target = bumps(distance)
        guesses = one_bump(target)
        recall = {name: float(target[np.argsort(-guess, kind="stable")[:k]].sum()) for name, guess in guesses.items()}
        return {"distance": distance, "target": target, "guesses": guesses, "recall": recall}

    def draw(data):
        figure = Figure(figsize=(8, 3.2), layout="constrained", facecolor=COLOURS["visible"])
        for axes, (name, guess) in zip(figure.subplots(1, 2, sharey=True), data["guesses"].items(), strict=True):
            chosen = np.argsort(-guess, kind="stable")[:k]
            axes.bar(range(KEYS), data["target"], color=COLOURS["attention"], alpha=0.55, label="target p")
            axes.plot(range(KEYS), guess, color=COLOURS["selected"], linewidth=2, label="guess")
            axes.plot(chosen, np.full(k, -0.012), "s", color=COLOURS["selected"], markersize=4, label=f"its {k} best")
            axes.set_title(f"least {name}: finds {data['recall'][name]:.0%}", fontsize=10)
            axes.set(xlabel="key")
            axes.grid(axis="y", **GRID)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("probability")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        return figure

    def describe(data):
        found = ", ".join(f"{name} finds {share:.0%}" for name, share in data["recall"].items())
        return (
            f"A target with two peaks {data['distance']} keys apart, and the best guesses with one peak. With the {k} "
            f"best keys of each, the guess of least {found} of the target."
        )

    slider = ipywidgets.IntSlider(distance, min=0, max=16, description="distance")
    return LiveFigure("directions", compute, draw, describe, distance=slider)
