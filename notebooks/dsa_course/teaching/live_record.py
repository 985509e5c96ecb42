"""Notebook 13's figure of the recorded training runs: what each regime comes to, by position, distance and step."""

import statistics

import ipywidgets
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dsa_ref.training.measures import paired_ratio
from dsa_ref.training.results import CONTROL, PRECISIONS, share

from ..viz import COLOURS, LINES, LiveFigure

GROUPS = {  # what stands beside DSA
    "other selections": ("oracle", "window", "random"),
    "other lessons": ("no warm-up", "own warm-up", "attached"),
    "other indexers": ("one head", "no relu"),
    "eight bits": PRECISIONS,
}
GRID = {"color": "#dddddd", "linewidth": 0.6}


def entry_of(run, name) -> dict:
    """What a run has of a regime, or of DSA in another precision."""
    return run["regimes"]["DSA"]["precision"][name] if name in PRECISIONS else run["regimes"][name]


def above_of(runs, name) -> list[list[float]]:
    """The loss of each run over its control's, less 1, in %: [parts][runs]."""
    control = [run["regimes"][CONTROL]["loss"] for run in runs]
    ratios = [paired_ratio(entry_of(run, name)["loss"], dense) for run, dense in zip(runs, control, strict=True)]
    return [[100.0 * (ratio - 1.0) for ratio, _ in part] for part in zip(*ratios, strict=True)]


def found_of(runs, name) -> list[float]:
    """The share of all runs' needles that are found, by distance; the first part, up to k, has none."""
    needles = [entry_of(run, name)["needles"] for run in runs]
    asked, found = (
        [sum(part) for part in zip(*(n[what] for n in needles), strict=True)] for what in ("asked", "found")
    )
    return [hits / count for hits, count in zip(found, asked, strict=True)]


def kept_of(runs, name) -> dict:
    """The mass that the selection keeps over the most that k keys could, mean over the runs: {step of the warm-up, or
    "end" for after the last stage: share}. Empty where nothing was looked at."""
    looks = []
    for run in runs:
        entry = entry_of(run, name)
        points = [point for stage in entry.get("stages", ()) for point in stage["curve"] if "kept" in point]
        after = entry.get("recall", {}).get("after")
        looks.append({point["step"]: share(point) for point in points} | ({"end": share(after)} if after else {}))
    return {step: statistics.fmean(one[step] for one in looks) for step in looks[0]}


def live_regimes(runs, group="other selections") -> LiveFigure:
    """Loss, needles and recall of DSA and of the regimes beside it. Dropdown: which regimes.

    runs: what `results.read_runs` gave. `.data`: group, ends (of the window's parts; the first is k), above, found and
    kept: {regime: what `above_of`, `found_of` and `kept_of` give}; found has the control, too.
    """
    ends = runs[0]["edges"][1:]

    def compute(group):
        names = ["DSA", *GROUPS[group]]
        return {
            "group": group,
            "ends": ends,
            "above": {name: above_of(runs, name) for name in names},
            "found": {name: found_of(runs, name) for name in (*names, CONTROL)},
            "kept": {name: kept_of(runs, name) for name in names},
        }

    def draw(data):
        figure = Figure(figsize=(10, 3.7), layout="constrained", facecolor=COLOURS["visible"])
        left, middle, right = figure.subplots(1, 3)
        styles = dict(zip(data["above"], LINES, strict=False)) | {CONTROL: ("#bbbbbb", "-", None)}
        if "oracle" in styles:
            styles["oracle"] = (COLOURS["attention"], *styles["oracle"][1:])
        for name, parts in data["above"].items():
            colour, line, marker = styles[name]
            means = [statistics.fmean(part) for part in parts]
            reach = [[mean - min(part) for mean, part in zip(means, parts, strict=True)]]
            reach += [[max(part) - mean for mean, part in zip(means, parts, strict=True)]]
            style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 4, "capsize": 2}
            left.errorbar(data["ends"], means, reach, elinewidth=0.9, **style)
        for name, values in data["found"].items():
            colour, line, marker = styles[name]
            style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 5, "label": name}
            middle.plot(data["ends"][1:], values, **style)
        for axes, at in ((left, data["ends"]), (middle, data["ends"][1:])):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(at, labels=[str(end) if end < 1024 else f"{end // 1024}K" for end in at], fontsize=8)
        largest = max(max(part) for parts in data["above"].values() for part in parts)
        if largest > 10:
            left.set_yscale("symlog", linthresh=1)
            left.set_yticks([-1, 0, 1, 10, 100], labels=["-1", "0", "1", "10", "100"])
            left.minorticks_off()
        left.axhline(0, color="#bbbbbb", linewidth=1.5)
        left.set(xlabel="position, up to (bytes)", title="loss above dense's, %")
        middle.set(xlabel="distance back, up to (bytes)", title="needles found, share", ylim=(-0.03, 1.03))
        last = max(step for kept in data["kept"].values() for step in kept if step != "end")
        for name, kept in data["kept"].items():
            colour, line, marker = styles[name]
            taught = {step: value for step, value in kept.items() if step != "end"}
            right.plot(list(taught), list(taught.values()), color=colour, linestyle=line)
            if "end" in kept:
                right.plot(1.25 * last, kept["end"], marker, color=colour, markersize=6, clip_on=False)
        lowest = min(kept["end"] for kept in data["kept"].values() if "end" in kept)
        right.set(xlabel="step of the warm-up, and the end", title="mass kept, share of the most")
        least, apart = (0.0, 0.2) if lowest < 0.8 else (0.8, 0.05)
        right.set(ylim=(least, 1.01), yticks=np.arange(least, 1.001, apart))
        right.set_xticks([1, last, 1.25 * last], labels=["1", str(last), "end"], fontsize=8)
        for axes in (left, middle, right):
            axes.title.set_size(10)
            axes.grid(**GRID)
            axes.spines[["top", "right"]].set_visible(False)
        handles, labels = middle.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
        return figure

    def describe(data):
        last = ", ".join(f"{name} {statistics.fmean(parts[-1]):+.1f} %" for name, parts in data["above"].items())
        needles = ", ".join(f"{name} {values[-1]:.0%}" for name, values in data["found"].items())
        kept = ", ".join(f"{name} {steps['end']:.0%}" for name, steps in data["kept"].items() if steps)
        return (
            "Three charts: loss above dense attention's by position, needles found by distance, attention mass kept as "
            f"the warm-up goes on. Up to {data['ends'][-1]:,}: {last}. Of the farthest needles: {needles}. Mass at the "
            f"end: {kept}."
        )

    dropdown = ipywidgets.Dropdown(options=list(GROUPS), value=group, description="beside DSA")
    return LiveFigure("regimes", compute, draw, describe, group=dropdown)
