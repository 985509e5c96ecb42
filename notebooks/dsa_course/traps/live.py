"""Notebook 15: what a planted model selects, byte by byte, and what each trap costs."""

import functools

import ipywidgets
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from dsa_ref.nn.model import load_small_model
from dsa_ref.testing import overlap

from .. import viz
from . import table
from .check import patient
from .runs import read

ADDED = "#aac4e0"  # the colour of "selected" at a third: selected, but wrongly


def live_traps(text_bytes, tokens, layer, trap, byte) -> viz.LiveFigure:
    """Text with the selection of one byte: what the planted model keeps of the right one's, loses and adds.

    text_bytes: bytes, some 700 fit a screen. tokens: int64 [len(text_bytes) + 1], the same and the next. layer: whose
    selection is shown. trap: a name; byte: the query. `.data`: trap, way, byte, and the sorted kept, lost, added.
    """

    @functools.cache
    def selection(name):
        """(way, indices): of the right model for None, else of the planted one in the way in which it shows."""
        found = table.trap(name)
        try:
            with table.planted(found):
                return found.shows_in, read(tokens, found.shows_in)[0][layer]
        except ValueError:  # it cannot be run where it shows
            with table.planted(found):
                return "one pass", read(tokens)[0][layer]

    @functools.cache
    def right(way):
        return read(tokens, way)[0][layer]

    def compute(trap, byte):
        way, wrong = selection(trap)
        mine, other = (set(chosen[byte].tolist()) - {-1} for chosen in (right(way), wrong))
        sets = {"kept": mine & other, "lost": mine - other, "added": other - mine}
        return {"trap": trap, "way": way, "byte": byte, **{key: sorted(found) for key, found in sets.items()}}

    def draw(data):
        # A key of the future may be added: drawn here, since selection_over_text refuses it.
        figure = viz.selection_over_text(text_bytes, data["byte"], data["kept"])
        axes, places = figure.axes[0], viz.layout_of(text_bytes, 80)
        for key in data["added"]:
            x, y, width = places[key]
            axes.add_patch(Rectangle((x, y), width, 0.96, facecolor=ADDED, linewidth=0, zorder=0.5))
            axes.hlines(y + viz.UNDERLINE, x + 0.1, x + width - 0.1, color="black", linewidth=1.4)
        for key in data["lost"]:
            x, y, width = places[key]
            axes.hlines(y + viz.UNDERLINE, x + 0.1, x + width - 0.1, **LOST)
        figure.legends.clear()
        counts = {key: len(data[key]) for key in ("kept", "added", "lost")}
        marks = [
            Patch(facecolor="none", edgecolor=viz.COLOURS["query"], linewidth=2.0, label="query"),
            Patch(facecolor=viz.COLOURS["selected"], edgecolor="black", label=f"right, kept: {counts['kept']}"),
            Patch(facecolor=ADDED, edgecolor="black", label=f"wrong, added: {counts['added']}"),
            Line2D([], [], label=f"right, lost: {counts['lost']}", **LOST),
            Patch(facecolor=viz.COLOURS["future"], label="future (grey)"),
        ]
        figure.legend(handles=marks, loc="lower right", ncols=5, fontsize=8, frameon=False)
        return figure

    def describe(data):
        counts = ", ".join(f"{len(data[key])} {key}" for key in ("kept", "lost", "added"))
        return (
            f"Source text with the selection of byte {data['byte']} under the trap {data['trap']!r} ({data['way']}), "
            f"against the right selection: {counts}."
        )

    wide = ipywidgets.Layout(width="800px")  # a pixel of the slider is about a byte of the text
    names = [found.name for found in table.TRAPS]
    controls = {
        "trap": ipywidgets.Dropdown(options=names, value=trap, description="trap"),
        "byte": ipywidgets.IntSlider(byte, min=0, max=len(text_bytes) - 1, description="byte t", layout=wide),
    }
    return viz.LiveFigure("traps", compute, draw, describe, **controls)


LOST = {
    "color": viz.COLOURS["selected"],
    "linestyle": (0, (0.7, 0.7)),
    "linewidth": 2.4,
}  # a line, since frames hide letters


# ------------------------------------------------------------------------------------------- the recorded effects


def effects(record) -> list:
    """figures/traps.json as rows, most keys lost first: (trap, way in which it shows, what was measured there)."""
    rows = [(found, found.shows_in, record["traps"][found.name][found.shows_in]) for found in table.TRAPS]
    return sorted(rows, key=lambda row: row[2].get("overlap", -1.0))


def as_table(record) -> str:
    """The museum as a Markdown table."""
    lines = [
        "| trap | what is wrong | shows in | right keys left | change of loss | caught by |",
        "|---|---|---|---:|---:|---|",
    ]
    for found, way, measured in effects(record):
        if "raises" in measured:
            left, loss = "", f"`{measured['raises']}`"
        else:
            left = f"{100 * measured['overlap']:.1f} %"
            loss = f"{measured['loss']:+.4f} ± {measured['error']:.4f}".replace("-", "−")
            loss += " (KL)" if way == "indexer loss" else ""
        test = found.caught_by.removeprefix("tests/").split("[")[0].replace("::", "<br>")
        lines.append(f"| **{found.name}** | {found.what} | {way} | {left} | {loss} | {test} |")
    return "\n".join(lines)


def harm(record) -> Figure:
    """Two bars a trap: the right keys that it loses, and its change of the loss with twice its standard error."""
    rows = [row for row in effects(record) if "overlap" in row[2] and row[1] != "indexer loss"][::-1]
    figure = Figure(figsize=(8.0, 5.3), layout="constrained", facecolor=viz.COLOURS["visible"])
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    lost = [100 * (1 - measured["overlap"]) for _, _, measured in rows]
    left.barh(places, lost, color=viz.COLOURS["selected"], height=0.7)
    left.set_yticks(places, labels=[found.name + ("" if way == "one pass" else f" ({way})") for found, way, _ in rows])
    left.set_xlabel("right keys lost (%)")
    changes = [measured["loss"] for _, _, measured in rows]
    errors = [2 * measured["error"] for _, _, measured in rows]
    right.errorbar(changes, places, xerr=errors, fmt="o", color="#222222", markersize=4, capsize=3)
    right.set_xscale("symlog", linthresh=0.01, linscale=0.6)
    right.set_xticks([-0.1, -0.01, 0, 0.01, 0.1, 1], labels=["−0.1", "−0.01", "0", "0.01", "0.1", "1"])
    right.axvline(0, color=viz.COLOURS["future"], linewidth=0.8)
    right.set_xlabel("loss change (nats a byte), ± 2 std. errors")
    for axes in (left, right):
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


# ------------------------------------------------------------------------------------------------- the patients

CHANGED = 40  # the byte that is changed in the test of causality


def patient_files(tokens, letters) -> dict:
    """What is seen from outside of each patient of exercise 15.3: {letter: {finding: str}}. tokens: int64 [n + 1]."""
    model = load_small_model()
    healthy, files = _observe(model, tokens), {}
    for letter in letters:
        with patient(letter):
            files[letter] = _describe(_observe(model, tokens), healthy)
    return files


def as_columns(files) -> str:
    """The files as a Markdown table, one column a patient."""
    names = list(next(iter(files.values())))
    rows = [f"| {name} | " + " | ".join(found[name] for found in files.values()) + " |" for name in names]
    return "\n".join(["| | " + " | ".join(files) + " |", "|---" * (len(files) + 1) + "|", *rows])


@torch.no_grad()
def _observe(model, tokens):
    steps, changed = [], tokens[: CHANGED + 8].clone()
    changed[CHANGED] += 1
    moved = (model(tokens[: len(changed)]) != model(changed))[:CHANGED].any(dim=1)
    model(tokens[:-1], record=steps)
    seen = {way: read(tokens, way)[0] for way in ("chunks", "merge", "bf16 scores")}
    return {"one pass": [step["indices"] for step in steps], "w": steps[0]["w"], "moved": int(moved.sum()), **seen}


def _describe(found, healthy):
    n, k = healthy["chunks"][0].shape
    own, lines = torch.arange(n)[:, None], {}
    for way in ("one pass", "chunks", "merge"):
        kept = [overlap(a[k:], b[k:]) for a, b in zip(healthy[way], found[way], strict=True)]
        lines[f"right keys, {way}"] = "all" if sum(kept) > 0.999 * len(kept) else "not all"
    for way in ("chunks", "bf16 scores"):
        mine, other = (sum(int((chosen == own)[k:].sum()) for chosen in who[way]) for who in (healthy, found))
        lines[f"own key, {way}"] = "never" if other == 0 else "rarer" if other < 0.96 * mine else "as ever"
    lines["earlier rows moved"] = str(found["moved"])
    lines["size of w"] = f"x {float(found['w'].abs().mean() / healthy['w'].abs().mean()):.0f}"
    lines["row 2 selects"] = " ".join(map(str, found["one pass"][0][2, :6].tolist()))
    return lines
