"""Notebook 17: two ranks with one text, step by step: which rows each holds, what arrives, what each does with it."""

import itertools
import re

import ipywidgets
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dsa_ref import sparse_attention
from dsa_ref.nn import load_small_model
from dsa_ref.parallel import Zigzag

from ..viz import COLOURS, MONO_ADVANCE, LiveFigure, glyph_of
from .lesson import TEXT, read_alone, select_among

COLUMNS = 64
K = 64
SHADES = {  # of a cell, by what the rank has of that byte
    "blank": "#dddddd",
    "own": "#f7dccf",
    "there": "#ffffff",
    "candidate": "#b5cde4",
    "kept": COLOURS["selected"],
    "future": COLOURS["future"],  # its letter, on white
}
WORDS = {
    "blank": "not here",
    "own": "query and key here",
    "there": "key here",
    "candidate": "candidate",
    "kept": "selected",
    "future": "future (grey letters)",
}
STEPS = {
    "gathered keys": (
        "each rank has the queries and keys of its own two chunks",
        "all-gather: the keys of all have arrived, in the order of ranks",
        "put in order: every rank now has all keys, and still its own queries alone",
        "select: each query among all keys before it, as one rank alone would",
        "attend: each query to its selected keys, all of which are here",
    ),
    "sharded keys": (
        "each rank has its own keys, and both have the same query",
        "each rank selects among its own keys: its candidates, up to k of them",
        "all-gather: both ranks have the candidates of both, with scores and places",
        "the k best of all candidates are selected, the same on both ranks",
        "each rank attends to the selected keys that it holds; then both parts are merged",
    ),
}


def live_walk(plan="gathered keys", layer=2) -> LiveFigure:
    """Two ranks, and what each has of the text, in five steps. Controls: the plan, the step from 1 to 5.

    `.data`: plan, step, told (what the step does), and ranks: for each rank a dict of order (the place in the text of
    each cell), state (the word of WORDS of each cell), query (a place, or None), words (what the rank has).
    """
    record = read_alone()[layer]
    scale = load_small_model().config.attention.softmax_scale

    def compute(plan, step):
        ranks = [
            gathered(record, rank, step) if plan == "gathered keys" else sharded(record, scale, rank, step)
            for rank in (0, 1)
        ]
        return {"plan": plan, "step": step, "told": STEPS[plan][step - 1], "ranks": ranks}

    def describe(data):
        each = "; ".join(f"rank {rank}: {one['words']}" for rank, one in enumerate(data["ranks"]))
        told = data["told"].capitalize()
        return f"Plan {data['plan']}, step {data['step']} of 5. {told}. Of {len(TEXT)} bytes of text, {each}."

    controls = {
        "plan": ipywidgets.ToggleButtons(options=list(STEPS), value=plan),
        "step": ipywidgets.IntSlider(1, min=1, max=5, description="step"),
    }
    return LiveFigure("walk", compute, draw, describe, **controls)


def gathered(record, rank, step):
    """What a rank has after a step of the plan in which queries stay and keys travel."""
    shares, own = Zigzag(len(TEXT), 2), Zigzag(len(TEXT), 2).rows(rank).tolist()
    order, query = list(range(len(TEXT))), None
    words = f"{len(own)} queries and {len(own)} keys of {len(TEXT)}"
    if step == 2:
        order = [s for each in (0, 1) for s in shares.rows(each).tolist()]
    state = ["own" if s in own else "blank" if step == 1 else "there" for s in order]
    if step > 1:
        words = f"{len(own)} queries and all {len(TEXT)} keys, {'as they came' if step == 2 else 'in order'}"
    if step > 3:
        query = own[-1]
        kept = {s for s in record["indices"][query].tolist() if s >= 0}
        state = ["kept" if s in kept else "there" if s <= query else "future" for s in order]
        words = f"byte {query} selects {len(kept)} of {query + 1} keys"
    if step == 5:
        words = f"byte {query} attends to {len(kept)} keys, which hold 100% of the weight"
    return {"order": order, "state": state, "query": query, "words": words}


def sharded(record, scale, rank, step):
    """What a rank has after a step of the plan in which keys stay: the query is the text's last byte."""
    query, shares = len(TEXT) - 1, Zigzag(len(TEXT), 2)
    own = shares.rows(rank).tolist()
    brought = [select_among(record, query, shares.rows(each), K)[0].tolist() for each in (0, 1)]
    winners = [s for s in record["indices"][query].tolist() if s >= 0]
    state = ["there" if s in own else "blank" for s in range(len(TEXT))]
    shown = [[], brought[rank], brought[0] + brought[1], winners, [s for s in winners if s in own]][step - 1]
    for s in shown:
        state[s] = "candidate" if step < 4 else "kept"
    words = f"{len(own)} keys, {len(shown)} {'selected' if step > 3 else 'candidates'}"
    if step == 1:
        words = f"{len(own)} keys of {len(TEXT)}, and the query of byte {query}"
    if step == 4:
        words = f"{len(shown)} selected, {len(set(shown) & set(own))} of them here"
    if step == 5:
        share = share_of(record, scale, query, shown, winners)
        words = f"attends to {len(shown)} keys, which hold {share:.0%} of the weight"
    return {"order": list(range(len(TEXT))), "state": state, "query": query, "words": words}


def share_of(record, scale, query, some, of) -> float:
    """The share of attention's weight that `some` of the selected keys hold, the mean over heads."""
    lses = [
        sparse_attention(record["q"][query, None], record["kv"], torch.tensor([keys], dtype=torch.int32), scale, 64)[1]
        for keys in (some, of)
    ]
    return float((lses[0] - lses[1]).exp().mean())


def draw(data):
    """Two panels, one below the other, a cell a byte."""
    lines = -(-len(TEXT) // COLUMNS)
    cell, line, left, panel = 0.105, 0.21, 0.1, 0.21 * lines + 0.4
    width, height = 2 * left + COLUMNS * cell, 2 * panel + 0.75
    figure = Figure(figsize=(width, height), facecolor=COLOURS["visible"])
    figure.text(left / width, 1 - 0.2 / height, f"{data['step']} · {data['told']}", fontsize=9, weight="bold")
    for rank, one in enumerate(data["ranks"]):
        bottom = height - 0.3 - (rank + 1) * panel
        box = (left / width, bottom / height, COLUMNS * cell / width, line * lines / height)
        axes = figure.add_axes(box, xlim=(0, COLUMNS), ylim=(lines, 0))
        axes.set_axis_off()
        axes.set_title(f"rank {rank}: {one['words']}", loc="left", fontsize=9, pad=3)
        draw_cells(axes, one, 72 * cell / MONO_ADVANCE)
    shown = {state for one in data["ranks"] for state in one["state"]}
    legend = [
        Patch(facecolor=shade, edgecolor="black", linewidth=0.5, label=WORDS[state])
        for state, shade in SHADES.items()
        if state in shown
    ]
    if any(one["query"] is not None for one in data["ranks"]):
        legend.append(Patch(facecolor="none", edgecolor=COLOURS["query"], linewidth=2.0, label="query"))
    figure.legend(handles=legend, loc="lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def draw_cells(axes, one, size):
    """A rank's cells, drawn in runs of one state, and their letters in runs of one ink: few objects, drawn quickly."""
    cells = list(zip(one["order"], one["state"], strict=True))
    for y in range(0, len(cells), COLUMNS):
        x, letters = 0, {}
        for state, run in itertools.groupby(cells[y : y + COLUMNS], key=lambda cell: cell[1]):
            run = [s for s, _ in run]
            face = SHADES["there"] if state == "future" else SHADES[state]
            axes.add_patch(Rectangle((x, y // COLUMNS + 0.03), len(run), 0.94, facecolor=face, linewidth=0))
            ink = {"kept": "white", "future": COLOURS["future"]}.get(state, "black")
            for s in run:
                letters.setdefault(ink, [" "] * COLUMNS)[x] = " " if state == "blank" else glyph_of(TEXT[s])
                if s == one["query"]:
                    frame = {"edgecolor": COLOURS["query"], "linewidth": 2.0, "clip_on": False, "zorder": 4}
                    axes.add_patch(Rectangle((x - 0.05, y // COLUMNS), 1.1, 1, fill=False, **frame))
                x += 1
        for ink, row in letters.items():
            for run in re.finditer(r"\S+( \S+)*", "".join(row)):
                font = {"family": "DejaVu Sans Mono", "size": size, "parse_math": False}
                axes.text(run.start(), y // COLUMNS + 0.74, run[0], color=ink, **font)
