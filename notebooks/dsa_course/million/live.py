"""Notebook 14: where a chunk's time goes, and what a million tokens cost at a position, predicted and recorded."""

import dataclasses

import ipywidgets
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from dsa_ref import V32, bill
from dsa_ref.cost import dollars_per_million

from ..viz import COLOURS, LiveFigure
from .record import points, step

CHUNK = 4096
GREEN, BLUE, GREY = COLOURS["attention"], COLOURS["selected"], "#777777"
PARTS = {  # of a chunk, from below: colour and hatch
    "products": ("#c8c8c8", None),
    "small": ("#8a8a8a", "..."),
    "scores and selection": ("#9dbbd9", None),
    "attention": (BLUE, "///"),
}
DENSE = {"prefill": "dense, heads kept", "decode": "dense"}  # the faster one of a prefill's two
FIRST, LAST = 11, 21  # positions are 2^11 to 2^21


def size(position):
    """A position as people say it: 4K, 128K, 1M."""
    return f"{position >> 20}M" if position >= 1 << 20 else f"{position >> 10}K"


def call_ms(phase, attention, position, batch=8, config=V32):
    """(ms, tokens) that the model predicts for one layer's call: a chunk that ends at position, or a decode step."""
    if phase == "decode":
        return 1e3 * sum(bill.decode_seconds(config, batch, position, attention).values()), batch
    tokens = min(CHUNK, position)
    return 1e3 * sum(bill.prefill_seconds(config, tokens, position, attention).values()), tokens


def per_1000(phase, attention, position, batch=8, config=V32, whole=False):
    """Predicted ms of one layer for 1000 tokens at a position; whole: for 1000 of a prompt's tokens up to there."""
    if whole:
        return 1e6 * bill.prompt_seconds(config, position, attention, CHUNK) / position
    ms, tokens = call_ms(phase, attention, position, batch, config)
    return 1e3 * ms / tokens


# ------------------------------------------------------------------------------------------------------------- parts


def live_parts(position=17) -> LiveFigure:
    """Where the time of one layer's chunk goes, DSA's and dense attention's, as the model predicts it.

    Slider: the position where the chunk ends, a power of two. `.data`: position, DSA and dense {part: ms}, share (of
    the indexer in DSA's time), recorded {attention: ms}.
    """

    def compute(position):
        S, T = 2**position, min(CHUNK, 2**position)
        parts = {
            name: {part: 1e3 * s for part, s in bill.prefill_seconds(V32, T, S, attention).items()}
            for name, attention in (("DSA", "DSA"), ("dense", DENSE["prefill"]))
        }
        recorded = {
            "DSA" if point["attention"] == "DSA" else "dense": point["ms"]
            for point in points("prefill")
            if point["position"] == S and point["attention"] in ("DSA", DENSE["prefill"]) and not point["extrapolated"]
        }
        share = parts["DSA"]["scores and selection"] / sum(parts["DSA"].values())
        return {"position": S, "tokens": T, **parts, "share": share, "recorded": recorded}

    def draw(data):
        figure = Figure(figsize=(8.6, 2.9), layout="constrained", facecolor=COLOURS["visible"])
        axes = figure.add_subplot(xlabel=f"ms of one layer for the {data['tokens']:,} tokens that end there")
        for y, name in enumerate(("dense", "DSA")):
            left = 0.0
            for part, (colour, hatch) in PARTS.items():
                ms = data[name].get(part, 0.0)
                colour = GREEN if (name, part) == ("dense", "attention") else colour
                axes.barh(y, ms, 0.6, left=left, color=colour, hatch=hatch, edgecolor="black", linewidth=0.8)
                left += ms
            if name in data["recorded"]:
                axes.plot(data["recorded"][name], y, "D", color="white", markeredgecolor="black", zorder=4)
        longest = max(sum(data[name].values()) for name in ("DSA", "dense"))
        axes.set(xlim=(0, 1.06 * longest), ylim=(-0.5, 1.5))
        axes.set_yticks((0, 1), labels=("dense", "DSA"))
        times = sum(data["dense"].values()) / sum(data["DSA"].values())
        axes.set_title(
            f"A chunk that ends at {size(data['position'])}: dense takes {times:.2f} times as long; "
            f"scores and selection are {data['share']:.0%} of DSA's time",
            fontsize=10,
        )
        axes.spines[["top", "right"]].set_visible(False)
        handles = [Patch(facecolor=c, hatch=h, edgecolor="black", label=part) for part, (c, h) in PARTS.items()]
        handles += [Patch(facecolor=GREEN, hatch="///", edgecolor="black", label="dense attention")]
        handles += [Line2D([], [], **_mark("D", "white"), label="recorded, whole chunk")]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        return figure

    def describe(data):
        said = [
            f"{name}: " + ", ".join(f"{part} {ms:.2f} ms" for part, ms in data[name].items())
            for name in ("DSA", "dense")
        ]
        return f"Two stacked bars for a chunk that ends at {data['position']} tokens. " + "; ".join(said) + "."

    slider = ipywidgets.IntSlider(position, min=FIRST, max=LAST, description="ends at 2^")
    return LiveFigure("parts", compute, draw, describe, position=slider)


def _mark(marker, colour):
    return {"marker": marker, "color": colour, "markeredgecolor": "black", "linestyle": "none"}


# -------------------------------------------------------------------------------------------------------------- cost


def curves(phase, config=V32, batch=8, whole=False) -> dict:
    """A phase's predicted cost at each power of two, ms of one layer for 1000 tokens, and where DSA pays.

    Keys: positions, dsa, dense; equal and half: the least position at which DSA costs no more than dense attention, and
    at most half of it, or None; points: those of the record that belong to the curves.
    """
    positions = [2**i for i in range(FIRST, LAST + 1)]
    dense = DENSE[phase]

    def cost_of(attention):
        return lambda position: per_1000(phase, attention, position, batch, config, whole)

    reached = {
        name: bill.pays_from(cost_of("DSA"), cost_of(dense), times, positions[-1])
        for name, times in (("equal", 1.0), ("half", 2.0))
    }
    found = recorded(phase, batch, whole) if config == V32 else []
    return {
        "phase": phase, "batch": batch, "whole": whole, "k": config.index_topk, "positions": positions,
        "dsa": list(map(cost_of("DSA"), positions)), "dense": list(map(cost_of(dense), positions)),
        **reached, "points": found,
    }  # fmt: skip


def recorded(phase, batch=8, whole=False) -> list[dict]:
    """The record's points for `curves`: position, attention, per_1000 (ms of one layer), extrapolated."""
    if whole:
        return [
            {
                "position": row["position"], "attention": attention, "per_1000": row[f"prompt_{kind}_ms"],
                "extrapolated": row["extrapolated"] and kind == "dense",
            }
            for row in step("bill")["prefill"]
            for kind, attention in (("dsa", "DSA"), ("dense", DENSE[phase]))
        ]  # fmt: skip
    return [
        point | {"per_1000": 1e3 * point["ms"] / point["tokens"]}
        for point in points(phase)
        if point["attention"] in ("DSA", DENSE[phase]) and (phase == "prefill" or point["tokens"] == batch)
    ]


def draw_curves(axes, data, scale=1.0):
    """Both curves and the record's points on log-log axes; every cost is multiplied by `scale`."""
    axes.plot(data["positions"], [scale * y for y in data["dense"]], color=GREEN, linestyle="--", linewidth=2)
    axes.plot(data["positions"], [scale * y for y in data["dsa"]], color=BLUE, linewidth=2)
    axes.plot(data["positions"], [scale * y / 2 for y in data["dense"]], color=GREY, linestyle=":", linewidth=1.2)
    for point in data["points"]:
        colour, marker = (BLUE, "o") if point["attention"] == "DSA" else (GREEN, "s")
        face = "white" if point["extrapolated"] else colour
        style = {"markerfacecolor": face, "markeredgecolor": "black" if face != "white" else colour, "markersize": 6}
        axes.plot(point["position"], scale * point["per_1000"], marker, linestyle="none", zorder=4, **style)
    for name, line in (("equal", (0, (2, 2))), ("half", "-")):
        if data[name] and data[name] >= data["positions"][0]:
            axes.axvline(data[name], color="black", linewidth=0.9, linestyle=line)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(data["positions"], labels=[size(p) for p in data["positions"]], fontsize=8)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def handles(data):
    """The legend of `draw_curves`."""
    made_up = any(point["extrapolated"] for point in data["points"])
    return [
        Line2D([], [], color=GREEN, linestyle="--", linewidth=2, label="dense, predicted"),
        Line2D([], [], color=BLUE, linewidth=2, label="DSA, predicted"),
        Line2D([], [], color=GREY, linestyle=":", label="half of dense"),
        Line2D([], [], **_mark("s", GREEN), label="dense, recorded"),
        Line2D([], [], **_mark("o", BLUE), label="DSA, recorded"),
        *([Line2D([], [], **_mark("s", "white"), label="dense, extrapolated")] if made_up else []),
        Line2D([], [], color="black", linestyle=(0, (2, 2)), linewidth=0.9, label="equal"),
        Line2D([], [], color="black", linewidth=0.9, label="half the cost"),
    ]


def reached(data):
    """Where DSA stops losing and where half is reached, in words."""
    said = [
        f"{name} from {data[key]:,} tokens" if data[key] else f"{name} never up to {size(data['positions'][-1])}"
        for name, key in (("equal", "equal"), ("half", "half"))
    ]
    return ", ".join(said)


def _live_bill(name, compute, what, **controls):
    """A figure of `curves` in dollars for a million tokens; compute gets the controls' values and returns the data."""

    def draw(data):
        figure = Figure(figsize=(8.6, 4.4), layout="constrained", facecolor=COLOURS["visible"])
        axes = figure.add_subplot(
            xlabel="position, tokens in the context",
            ylabel=f"dollars for 1M tokens,\n{data['layers']} layers' attention",
        )
        draw_curves(axes, data, dollars_per_million(1.0, data["layers"], data["price"]))
        axes.set_title(f"{what(data)}: {reached(data)}", fontsize=10)
        figure.legend(handles=handles(data), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        return figure

    def describe(data):
        scale = dollars_per_million(1.0, data["layers"], data["price"])
        last, dsa, dense = data["positions"][-2], scale * data["dsa"][-2], scale * data["dense"][-2]
        return (
            f"Dollars for a million tokens against the position, log-log. {what(data)}: {reached(data)}. "
            f"At {size(last)} DSA costs {dsa:.3g} and dense attention {dense:.3g}. "
            f"{len(data['points'])} recorded points lie on the curves."
        )

    return LiveFigure(name, compute, draw, describe, **controls)


def _controls(price, layers, kept):
    wide = {"layout": ipywidgets.Layout(width="440px"), "style": {"description_width": "130px"}}
    return {
        "price": ipywidgets.FloatSlider(price, min=0.25, max=8, step=0.25, description="$ a GPU-hour", **wide),
        "layers": ipywidgets.IntSlider(layers, min=1, max=100, description="layers", **wide),
        "kept": ipywidgets.IntSlider(kept, min=8, max=14, description="k = 2^", **wide),
    }


def live_prefill(price=2.0, layers=61, kept=11, whole=False) -> LiveFigure:
    """A prefill's bill against the position. Controls: the price of a GPU-hour, layers, k, and whether the cost is that
    of the tokens at the position or of a whole prompt up to there. The record's points show where k is V3.2's.

    `.data`: as `curves`, and price and layers.
    """

    def compute(price, layers, kept, whole):
        config = dataclasses.replace(V32, index_topk=2**kept)
        return curves("prefill", config, whole=whole) | {"price": price, "layers": layers}

    def what(data):
        return ("A whole prompt" if data["whole"] else "Reading the tokens there") + f", k = {data['k']:,}"

    box = ipywidgets.Checkbox(value=whole, description="the whole prompt up to there", indent=False)
    return _live_bill("prefill", compute, what, **_controls(price, layers, kept), whole=box)


def live_decode(price=2.0, layers=61, kept=11, batch=3) -> LiveFigure:
    """A decode step's bill against the position. Controls: the price of a GPU-hour, layers, k, and the sequences in a
    batch as a power of two. The record's points show where k is V3.2's, in batches that were recorded.

    `.data`: as `curves`, and price and layers.
    """

    def compute(price, layers, kept, batch):
        config = dataclasses.replace(V32, index_topk=2**kept)
        return curves("decode", config, 2**batch) | {"price": price, "layers": layers}

    def what(data):
        texts = "1 text" if data["batch"] == 1 else f"{data['batch']} texts at once"
        return f"Writing {texts}, k = {data['k']:,}"

    slider = ipywidgets.IntSlider(
        batch, min=0, max=6, description="batch 2^", layout=ipywidgets.Layout(width="440px"),
        style={"description_width": "130px"},
    )  # fmt: skip
    return _live_bill("decode", compute, what, **_controls(price, layers, kept), batch=slider)


def still_curves() -> tuple[Figure, str]:
    """The README's picture and its alt text: both phases, ms of one layer for 1000 tokens, predicted and recorded."""
    figure = Figure(figsize=(10, 4.6), layout="constrained", facecolor=COLOURS["visible"])
    said = []
    found = (("prefill, chunks of 4096", curves("prefill")), ("decode, 8 sequences at once", curves("decode")))
    for axes, (name, data) in zip(figure.subplots(1, 2), found, strict=True):
        draw_curves(axes, data)
        axes.set_title(f"{name}\n{reached(data)}", fontsize=9)
        axes.set(xlabel="position, tokens in the context", ylabel="ms of one layer for 1000 tokens")
        axes.tick_params(axis="x", labelrotation=45)
        said.append(f"{name}: {reached(data)}")
    figure.legend(handles=handles(found[0][1]), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure, "Cost of a layer against the position, DSA and dense attention, log-log. " + "; ".join(said)
