"""Notebook 17: seconds of computing against seconds of travel, of both plans, at DeepSeek-V3.2's sizes."""

import functools

import ipywidgets
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from dsa_ref import V32, cost
from dsa_ref.bill import H200, prefill_seconds

from ..viz import COLOURS, LiveFigure

LINKS = {"Ethernet, 100 Gbit/s": 12.5e9, "InfiniBand, 400 Gbit/s": 50e9, "NVLink, 450 GB/s": 450e9}  # bytes/s, one way
LENGTHS = [2**i for i in range(12, 24)]


def received(config, L, queries, size) -> dict:
    """{plan: bytes} that reach each rank in one layer: L tokens, of which `queries` have to be computed."""
    return {
        "gathered": cost.gathered_bytes(config, L, size),
        "sharded": sum(cost.sharded_bytes(config, queries, L, size).values()),
    }


@functools.cache
def one_gpu_seconds(phase, L) -> float:
    """Computing on one H200, predicted: a whole prompt's layer, or what one new token reads of L tokens' index keys."""
    if phase == "read a prompt":
        return sum(prefill_seconds(V32, L, L).values())
    return cost.decode_bytes(V32, L).index / H200.memory


def plans_at(phase, size, link) -> dict:
    """What `live_plans` shows, its `.data`."""
    alone = [one_gpu_seconds(phase, L) for L in LENGTHS]
    ways = [received(V32, L, L if phase == "read a prompt" else 1, size) for L in LENGTHS]
    travel = {plan: [way[plan] / LINKS[link] for way in ways] for plan in ("gathered", "sharded")}
    pays = {
        plan: [L for L, one, moved in zip(LENGTHS, alone, travel[plan], strict=True) if one / size + moved < one]
        for plan in travel
    }
    computing = [one / size for one in alone]
    return {"phase": phase, "ranks": size, "link": link, "alone": alone, "computing": computing, **travel, "pays": pays}


def live_plans(phase="read a prompt", ranks=3, link="InfiniBand, 400 Gbit/s") -> LiveFigure:
    """One layer: computing, divided by the ranks, and the travel of both plans, against the length of the text.

    Controls: phase, ranks (a power of two), link. `.data`: phase, ranks, link; alone, computing, gathered, sharded
    (seconds at each of LENGTHS); and pays {plan: the lengths at which it takes less than one GPU alone}.
    """

    def draw(data):
        figure = Figure(figsize=(8.6, 3.7), layout="constrained", facecolor=COLOURS["visible"])
        axes = figure.add_subplot(xlabel="tokens of the text", ylabel="seconds, one layer")
        lines = {
            "alone": ("one GPU alone", "#999999", ":", ""),
            "computing": (f"computing on each of {data['ranks']}", "#222222", "-", ""),
            "gathered": ("travel, gathered keys", COLOURS["selected"], "--", "o"),
            "sharded": ("travel, sharded keys", "#444444", "-.", "s"),
        }
        for name, (label, colour, style, marker) in lines.items():
            axes.plot(LENGTHS, data[name], color=colour, linestyle=style, marker=marker, markersize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(LENGTHS[::2], labels=[f"{L >> 10}K" if L < 1 << 20 else f"{L >> 20}M" for L in LENGTHS[::2]])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda s, _: f"{s:g} s" if s >= 1 else f"{1e3 * s:g} ms" if s >= 1e-3 else f"{1e6 * s:g} µs")
        )
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
        axes.set_title(f"{data['phase']}, {data['ranks']} GPUs, {data['link']}", fontsize=9)
        return figure

    def describe(data):
        won = "; ".join(
            f"{plan} keys beat one GPU at {len(where)} of {len(LENGTHS)} lengths"
            for plan, where in data["pays"].items()
        )
        on = f"{data['ranks']} GPUs over {data['link']}"
        return f"Seconds of one layer against 4K to 8M tokens, to {data['phase']} on {on}: {won}."

    controls = {
        "phase": ipywidgets.ToggleButtons(options=["read a prompt", "write a token"], value=phase),
        "ranks": ipywidgets.IntSlider(ranks, min=1, max=6, description="GPUs = 2^"),
        "link": ipywidgets.Dropdown(options=list(LINKS), value=link, description="link"),
    }
    return LiveFigure("plans", lambda phase, ranks, link: plans_at(phase, 2**ranks, link), draw, describe, **controls)
