"""Notebook 12: a page and a row byte by byte, a page table at work, and the bytes that a decode step reads."""

import dataclasses

import ipywidgets
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter

from dsa_ref import V32
from dsa_ref.cost import break_even_decode_bytes, decode_bytes, decode_bytes_ceiling
from dsa_ref.page_table import PageTable

from ..viz import COLOURS, LiveFigure

Di, SCALE, PAGE = V32.index_head_dim, 4, 64  # bytes of a key's values, bytes of its scale, tokens a page
LAYOUTS = ("all values, then all scales", "token by token (wrong)")
TINTS = {"A": "#c6dbef", "B": "#fdd9a0", "C": "#b5dfb0"}  # three sequences; the letter in a cell says the same
SHARED = "#e6d5ee"  # a page that two sequences hold
POOL = 48  # places of the small pool, whatever the page size
START = {"A": 10, "B": 7, "C": 13}  # lengths; C is a fork of A with three tokens more


# ------------------------------------------------------------------------------------------------------------- bytes


def page_bytes(token, layout):
    """(first byte of the token's values, first byte of its scale) in a page."""
    if layout == LAYOUTS[0]:
        return token * Di, PAGE * Di + token * SCALE
    return token * (Di + SCALE), token * (Di + SCALE) + Di


def live_page(token=5) -> LiveFigure:
    """A page of the index cache, a byte a cell, 128 to the line. Slider: the token; menu: the layout.

    `.data`: token, layout, values and scale (each its first byte), kind [66, 128] (0 values, 1 scales, 2 the token's
    values, 3 its scale).
    """

    def compute(token, layout):
        kind = np.zeros(PAGE * (Di + SCALE), dtype=int)
        for i in range(PAGE):
            _, scale = page_bytes(i, layout)
            kind[scale : scale + SCALE] = 1
        values, scale = page_bytes(token, layout)
        kind[values : values + Di], kind[scale : scale + SCALE] = 2, 3
        return {"token": token, "layout": layout, "values": values, "scale": scale, "kind": kind.reshape(-1, Di)}

    def draw(data):
        figure = Figure(figsize=(8.6, 3.9), layout="constrained", facecolor=COLOURS["visible"])
        axes = figure.add_subplot(xlabel="byte of the line (128 to a line)", ylabel="line of the page")
        colours = ["#dbe7f3", "#8a8a8a", COLOURS["selected"], "#000000"]
        axes.imshow(data["kind"], cmap=ListedColormap(colours), vmin=0, vmax=3, aspect="auto", interpolation="nearest")
        axes.set_xticks([*range(0, Di, 16), Di - 1])
        axes.set_yticks([*range(0, 64, 8), 65])
        axes.set_title(
            f"token {data['token']}: values in bytes {data['values']:,} to {data['values'] + Di - 1:,}, "
            f"scale in bytes {data['scale']:,} to {data['scale'] + SCALE - 1:,} of 8,448",
            fontsize=10,
        )
        labels = ("values of the others", "scales of the others", "this token's 128 values", "this token's scale")
        handles = [Patch(facecolor=c, edgecolor="black", label=text) for c, text in zip(colours, labels, strict=True)]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        return figure

    def describe(data):
        return (
            f"A page of 8,448 bytes as 66 lines of 128, laid out {data['layout']}. The values of token {data['token']} "
            f"begin at byte {data['values']}, its scale at byte {data['scale']}."
        )

    controls = {
        "token": ipywidgets.IntSlider(token, min=0, max=PAGE - 1, description="token"),
        "layout": ipywidgets.Dropdown(value=LAYOUTS[0], options=LAYOUTS, description="layout"),
    }
    return LiveFigure("page", compute, draw, describe, **controls)


def row_chart() -> Figure:
    """The 656 bytes of one row of the KV cache, to scale: four tiles, four scales, the rope part."""
    parts = [(f"tile {i}: 128 e4m3 values", 128, "#cfe3d6" if i % 2 else "#b3d3bf") for i in range(4)]
    parts += [("", 16, "#000000"), ("64 bf16 rope values", 128, "#e8e8e8")]
    figure = Figure(figsize=(8.6, 1.75), layout="constrained", facecolor=COLOURS["visible"])
    axes = figure.add_subplot(xlabel="byte of the row", xlim=(-4, 660), ylim=(-0.25, 1.45), yticks=[])
    first, edges = 0, [0]
    for text, width, colour in parts:
        axes.add_patch(Rectangle((first, 0), width, 1, facecolor=colour, edgecolor="black", linewidth=0.8))
        axes.text(first + width / 2, 0.5, text, ha="center", va="center", fontsize=8)
        first += width
        edges.append(first)
    axes.annotate("4 fp32 scales", (520, 1), (520, 1.2), ha="center", fontsize=8)
    axes.set_xticks(edges, labels=[str(edge) for edge in edges], fontsize=8)
    for label, edge in zip(axes.get_xticklabels(), edges, strict=True):
        label.set_ha("right" if edge == 512 else "left" if edge == 528 else "center")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def pages_chart(positions, length, page_size=64) -> Figure:
    """Where one query's selected keys lie: a page a line, a place in it a column."""
    pages = -(-length // page_size)
    state = np.full(pages * page_size, 2)
    state[:length] = 0
    state[np.asarray(positions)] = 1
    colours = [COLOURS["visible"], COLOURS["selected"], COLOURS["future"]]
    figure = Figure(figsize=(8.6, 1.1 + 0.17 * pages), layout="constrained", facecolor=COLOURS["visible"])
    axes = figure.add_subplot(xlabel="place in the page", ylabel="page of the sequence")
    lines = {"edgecolors": "#dddddd", "linewidth": 0.3}
    axes.pcolormesh(state.reshape(pages, page_size), cmap=ListedColormap(colours), vmin=0, vmax=2, **lines)
    axes.invert_yaxis()
    touched = len({int(position) // page_size for position in positions})
    axes.set_title(f"{len(positions)} selected keys lie in {touched} of {pages} pages", fontsize=10)
    axes.set_yticks(np.arange(0, pages, 2) + 0.5, labels=range(0, pages, 2), fontsize=8)
    labels = ("cached, not selected", "selected", "behind the end: garbage")
    handles = [Patch(facecolor=c, edgecolor="black", label=text) for c, text in zip(colours, labels, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


# -------------------------------------------------------------------------------------------------------- page table


def small_pool(page_size, **lengths):
    """A PageTable in which A and B grew by turns, C was forked from A, and each then was brought to its length.

    Returns (table, {"A": number of the sequence, ...}).
    """
    table = PageTable(POOL // page_size, 3, POOL, page_size)
    number = {"A": table.new(), "B": table.new()}

    def grow(name, tokens):
        table.reserve(number[name], tokens)
        table.advance([number[name]], tokens)

    for name, tokens in (("A", 4), ("B", 4), ("A", 6), ("B", 3)):
        grow(name, tokens)
    number["C"] = table.fork(number["A"])
    grow("C", START["C"] - START["A"])
    for name, length in lengths.items():
        if length < table.length(number[name]):
            table.truncate(number[name], length)
        else:
            grow(name, length - table.length(number[name]))
    return table, number


def live_table(sequence="A", length=10, page_size=4) -> LiveFigure:
    """Three sequences in a pool of 48 places. Controls: which one, how long it is to be, and the page size.

    `.data`: sequence, lengths {name: tokens}, page_size, pages {name: its pages in order}, places (for each place of
    the pool "A3", "AC3" where two share it, or ""), free (pages).
    """

    def compute(sequence, length, page_size):
        table, number = small_pool(page_size, **{sequence: length})
        places = [""] * POOL
        pages, lengths = {}, {}
        for name, i in number.items():
            lengths[name] = table.length(i)
            pages[name] = [p for p in table.table[i].tolist() if p >= 0]
            for position, slot in enumerate(table.slots(i, 0, lengths[name]).tolist()):
                owner = places[slot].rstrip("0123456789")
                places[slot] = f"{owner}{name}{position}"
        return {
            "sequence": sequence, "lengths": lengths, "page_size": page_size, "pages": pages, "places": places,
            "free": table.free_pages,
        }  # fmt: skip

    def describe(data):
        pages = "; ".join(f"{name} has pages {', '.join(map(str, p)) or 'none'}" for name, p in data["pages"].items())
        shared = sorted(_shared(data))
        return (
            f"A pool of {POOL // data['page_size']} pages of {data['page_size']} places. {pages}. "
            f"Shared pages: {', '.join(map(str, shared)) or 'none'}. Free pages: {data['free']}."
        )

    controls = {
        "sequence": ipywidgets.ToggleButtons(value=sequence, options=("A", "B", "C"), description="sequence"),
        "length": ipywidgets.IntSlider(length, min=0, max=16, description="its length"),
        "page_size": ipywidgets.SelectionSlider(value=page_size, options=(2, 4, 8), description="page size"),
    }
    controls["sequence"].style.button_width = "60px"
    return LiveFigure("page table", compute, _draw_table, describe, **controls)


def _shared(data):
    """The pages that more than one sequence holds."""
    every = [page for pages in data["pages"].values() for page in pages]
    return {page for page in every if every.count(page) > 1}


def _draw_table(data):
    size, shared = data["page_size"], _shared(data)
    figure = Figure(figsize=(8.6, 4.7), layout="constrained", facecolor=COLOURS["visible"])
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 4))

    widest = max(8, *(len(pages) for pages in data["pages"].values()))
    for y, (name, pages) in enumerate(data["pages"].items()):
        mark = "▶ " if name == data["sequence"] else ""
        top.text(-0.2, y + 0.45, f"{mark}{name}, {data['lengths'][name]} tokens", ha="right", va="center", fontsize=9)
        for x in range(widest):
            there = x < len(pages)
            colour = COLOURS["visible"] if not there else SHARED if pages[x] in shared else TINTS[name]
            hatch = "///" if there and pages[x] in shared else None
            box = {"facecolor": colour, "edgecolor": "#555555", "hatch": hatch, "linewidth": 0.8}
            top.add_patch(Rectangle((x, y + 0.05), 1, 0.8, **box))
            back = {"facecolor": colour, "edgecolor": "none", "pad": 1.0} if there else None
            text = str(pages[x]) if there else "-1"
            ink = {"fontsize": 10, "weight": "bold"} if there else {"fontsize": 8, "color": "#777777"}
            top.text(x + 0.5, y + 0.45, text, ha="center", va="center", bbox=back, **ink)
    top.set(xlim=(-2.3 * widest / 8, widest + 0.05), ylim=(3, 0), xticks=[], yticks=[])
    top.set_title("page tables: the sequence's order, left to right (numbers are pages of the pool)", fontsize=9)

    columns = 24  # places in a line of the pool
    for slot, text in enumerate(data["places"]):
        x, y, page = slot % columns, slot // columns, slot // size
        name = text.rstrip("0123456789")
        held = [owner for owner, pages in data["pages"].items() if page in pages]
        colour = COLOURS["visible"] if not text else SHARED if len(name) > 1 else TINTS[name]
        box = {"facecolor": colour, "edgecolor": "#bbbbbb", "linewidth": 0.6}
        bottom.add_patch(Rectangle((x, y), 1, 0.7, **box))
        if text:
            label = text if len(name) == 1 else f"{name}\n{text[len(name) :]}"
            bottom.text(x + 0.5, y + 0.35, label, ha="center", va="center", fontsize=7, linespacing=0.9)
        if slot % size == 0:
            chosen = data["sequence"] in held
            frame = {"fill": False, "edgecolor": COLOURS["query"] if chosen else "#555555", "clip_on": False}
            frame |= {"linewidth": 2.4 if chosen else 0.8, "zorder": 4 if chosen else 3}
            bottom.add_patch(Rectangle((x + 0.04, y), size - 0.08, 0.7, **frame))
            state = "free" if not held else " ".join(held)
            note = f"{page}: {state}" if size > 2 else f"{page}{'' if held else ' free'}"
            bottom.text(x + size / 2, y + 0.84, note, ha="center", va="center", fontsize=8)
    bottom.set(xlim=(-0.1, columns + 0.1), ylim=(2.05, -0.05), xticks=[], yticks=[])
    title = f"the pool: {POOL // size} pages of {size} places; below each its number and who holds it"
    bottom.set_title(title, fontsize=9)
    for axes in (top, bottom):
        axes.spines[:].set_visible(False)
    handles = [Patch(facecolor=colour, edgecolor="#555555", label=name) for name, colour in TINTS.items()]
    handles.append(Patch(facecolor=SHARED, edgecolor="#555555", hatch="///", label="shared by two"))
    chosen = f"pages of {data['sequence']}, the chosen one"
    handles.append(Patch(fill=False, edgecolor=COLOURS["query"], linewidth=2.4, label=chosen))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


# -------------------------------------------------------------------------------------------------------------- bill


def live_bill(tokens=17, kept=11) -> LiveFigure:
    """Bytes that one decode step of one layer reads against the context, dense and DSA, V3.2's sizes.

    tokens, kept: where the sliders start, powers of two. `.data`: L, k, contexts, dense, index, selected, dsa (each a
    list over the contexts), here (a DecodeBytes), ratio, break_even, ceiling.
    """
    contexts = [2**i for i in range(8, 23)]

    def compute(tokens, kept):
        config = dataclasses.replace(V32, index_topk=2**kept)
        every, here = [decode_bytes(config, L) for L in contexts], decode_bytes(config, 2**tokens)
        return {
            "L": 2**tokens, "k": 2**kept, "contexts": contexts, "here": here, "ratio": here.dense / here.dsa,
            "break_even": break_even_decode_bytes(config), "ceiling": decode_bytes_ceiling(config),
            **{name: [getattr(b, name) for b in every] for name in ("dense", "index", "selected", "dsa")},
        }  # fmt: skip

    def draw(data):
        figure = Figure(figsize=(8.6, 4.2), layout="constrained", facecolor=COLOURS["visible"])
        left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
        left.set(xlabel="L, tokens in the context", ylabel="bytes read by one step of one layer")
        green, blue = COLOURS["attention"], COLOURS["selected"]
        left.plot(contexts, data["dense"], color=green, linestyle="--", linewidth=2.2, label="dense: 656 · L")
        left.plot(contexts, data["dsa"], color=blue, linewidth=2.2, label=f"DSA: 132 · L + 656 · min(L, {data['k']:,})")
        left.plot(contexts, data["index"], color=blue, linewidth=1.2, linestyle=":", label="of it the index cache")
        left.axvline(data["L"], color="#777777", linewidth=1)
        left.axvline(data["break_even"], color="black", linewidth=1, linestyle=(0, (2, 2)))
        left.text(data["break_even"] / 1.12, 5e8, f"equal at\n{data['break_even']:,.0f}", fontsize=8, ha="right")
        left.set_xscale("log", base=2)
        left.set_yscale("log")
        left.legend(loc="lower right", fontsize=8, framealpha=1.0, edgecolor="none")
        left.grid(color="#dddddd", linewidth=0.6)
        here = data["here"]
        right.bar(["dense", "DSA"], [here.dense, here.index], color=[green, "#9dbbd9"], edgecolor="black", width=0.6)
        right.bar(["DSA"], [here.selected], bottom=[here.index], color=blue, edgecolor="black", width=0.6)
        right.patches[0].set_hatch("///")
        right.set(ylabel="bytes", ylim=(0, 1.3 * max(here.dense, here.dsa)))
        right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _size(y)))
        right.text(0, here.dense, _size(here.dense), ha="center", va="bottom", fontsize=8)
        right.text(1, here.dsa, _size(here.dsa), ha="center", va="bottom", fontsize=8)
        handles = [
            Patch(facecolor=green, edgecolor="black", hatch="///", label="all rows"),
            Patch(facecolor=blue, edgecolor="black", label="selected rows"),
            Patch(facecolor="#9dbbd9", edgecolor="black", label="index cache"),
        ]
        right.legend(handles=handles, loc="upper right", fontsize=8, frameon=False)
        side = "fewer" if data["ratio"] >= 1 else "more"
        times = data["ratio"] if data["ratio"] >= 1 else 1 / data["ratio"]
        title = f"{data['L']:,} tokens: DSA reads\n{times:.2f} times {side} (ceiling {data['ceiling']:.2f})"
        right.set_title(title, fontsize=9)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    def describe(data):
        here = data["here"]
        return (
            f"Bytes of one decode step against the context, log-log. At {data['L']} tokens and k = {data['k']} dense "
            f"attention reads {_size(here.dense)}, DSA {_size(here.dsa)}, {_size(here.index)} of it index cache. "
            f"The two are equal at {data['break_even']:.0f} tokens; the ratio never passes {data['ceiling']:.2f}."
        )

    sliders = {
        "tokens": ipywidgets.IntSlider(tokens, min=8, max=22, description="tokens 2^"),
        "kept": ipywidgets.IntSlider(kept, min=8, max=14, description="k = 2^"),
    }
    return LiveFigure("bill", compute, draw, describe, **sliders)


def _size(count):
    """Bytes as people say them."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count:,.0f} B"
