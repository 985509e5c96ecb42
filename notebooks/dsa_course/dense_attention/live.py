"""Notebook 01: where one head of the small model looks, and the bill of attention against the length of the text."""

import dataclasses

import ipywidgets
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from dsa_ref.config import V32
from dsa_ref.cost import decode_bytes, prefill_cost

from ..viz import COLOURS, LiveFigure

SHOWN = 48  # bytes on either axis of the map
DENSE = {"color": COLOURS["attention"], "linestyle": "--", "linewidth": 2.2}
DSA = {"color": COLOURS["selected"], "linestyle": "-", "linewidth": 2.2}
INDEXER = {"color": COLOURS["selected"], "linestyle": ":", "linewidth": 1.6}


def live_attention(text_bytes, steps, scale, first, layer, head) -> LiveFigure:
    """One head's attention weights among 48 neighbouring bytes, one row for each query, one column for each key.

    text_bytes: bytes, more than 48. steps: what a dense forward pass over at least these bytes recorded, one dict a
    layer. scale: the softmax scale. first, layer, head: where the sliders start. `.data`: first, layer, head,
    weights [48, 48], and earlier [48], the share of each query that falls on bytes before the ones shown.
    """

    def look(first, layer, head):
        step, rows = steps[layer], slice(first, first + SHOWN)
        logits = step["q"][rows, head] @ step["kv"][: first + SHOWN].T * scale
        weights = (logits - step["lse"][rows, head, None]).exp().tril(first).cpu().numpy()
        earlier = weights[:, :first].sum(axis=1)
        return {"first": first, "layer": layer, "head": head, "weights": weights[:, first:], "earlier": earlier}

    def draw(data):
        glyphs = [chr(byte) if 32 < byte < 127 else "·" for byte in text_bytes[data["first"] :][:SHOWN]]
        figure = Figure(figsize=(7.2, 6.1), layout="constrained", facecolor=COLOURS["visible"])
        axes = figure.add_subplot(xlabel="key s, the byte looked at", ylabel="query t, the byte that looks")
        shades = LinearSegmentedColormap.from_list("attention", [COLOURS["visible"], COLOURS["attention"], "#0c2617"])
        future = np.triu(np.ones((SHOWN, SHOWN), dtype=bool), 1)
        shown = np.ma.masked_array(data["weights"], future)
        mesh = axes.pcolormesh(shown, cmap=shades, vmin=0, vmax=1, edgecolors="#e8e8e8", linewidth=0.2)
        axes.set_facecolor(COLOURS["future"])
        axes.set(xlim=(0, SHOWN), ylim=(SHOWN, 0), aspect="equal", title=f"layer {data['layer']}, head {data['head']}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(np.arange(SHOWN) + 0.5, labels=glyphs, fontsize=7, family="DejaVu Sans Mono")
            axis.set_tick_params(length=0, pad=2)
        bar = figure.colorbar(mesh, ax=axes, shrink=0.6, label="weight (share of the query's row)")
        bar.outline.set_linewidth(0.4)
        axes.legend(handles=[Patch(facecolor=COLOURS["future"], label="future: weight 0")], loc="upper right")
        return figure

    def describe(data):
        t, s = np.unravel_index(data["weights"].argmax(), data["weights"].shape)
        return (
            f"A square of {SHOWN} by {SHOWN} bytes from byte {data['first']} on, one row for each query, one column "
            f"for each key. Only the lower left triangle holds weights. In layer {data['layer']}, head {data['head']}, "
            f"the largest weight is {data['weights'].max():.2f}, from byte {data['first'] + t} to byte "
            f"{data['first'] + s}; on average {data['earlier'].mean():.0%} of a query's weight lies on bytes before "
            "those shown."
        )

    wide = ipywidgets.Layout(width="640px")
    last = {"first": len(text_bytes) - SHOWN, "layer": len(steps) - 1, "head": steps[0]["q"].shape[1] - 1}
    sliders = {
        "first": ipywidgets.IntSlider(first, min=0, max=last["first"], description="first byte", layout=wide),
        "layer": ipywidgets.IntSlider(layer, min=0, max=last["layer"], description="layer"),
        "head": ipywidgets.IntSlider(head, min=0, max=last["head"], description="head"),
    }
    return LiveFigure("attention", look, draw, describe, **sliders)


def live_bill(tokens=17, kept=11) -> LiveFigure:
    """One V3.2 layer's bill, dense and sparse: FLOPs to read a text, bytes read to write its next token.

    tokens, kept: where the sliders start, powers of two. `.data`: tokens, k, contexts, and for flops and bytes the
    curves dense, dsa and indexer over the contexts and their values `here`, at the chosen length.
    """
    contexts = [2**i for i in range(10, 23)]

    def bill(T, config):
        flops, moved = prefill_cost(config, T, T), decode_bytes(config, T)
        return {
            "flops": {"dense": flops.dense, "dsa": flops.dsa, "indexer": flops.indexer},
            "bytes": {"dense": moved.dense, "dsa": moved.dsa, "indexer": moved.index},
        }

    def compute(tokens, kept):
        config = dataclasses.replace(V32, index_topk=2**kept)
        rows = [bill(T, config) for T in contexts]
        data = {"tokens": 2**tokens, "k": 2**kept, "contexts": contexts, "here": bill(2**tokens, config)}
        for unit in ("flops", "bytes"):
            data[unit] = {name: [row[unit][name] for row in rows] for name in ("dense", "dsa", "indexer")}
        return data

    def draw(data):
        figure = Figure(figsize=(6.8, 3.4), layout="constrained", facecolor=COLOURS["visible"])
        titles = {"flops": "read the whole text", "bytes": "write the next token"}
        units = {"flops": "FLOPs, one layer", "bytes": "cache bytes read, one layer"}
        for axes, unit in zip(figure.subplots(1, 2), titles, strict=True):
            here = data["here"][unit]
            axes.plot(data["contexts"], data[unit]["dense"], **DENSE, label="dense attention")
            axes.plot(data["contexts"], data[unit]["dsa"], **DSA, label=f"DSA, k = {data['k']}")
            axes.plot(data["contexts"], data[unit]["indexer"], **INDEXER, label="DSA's indexer alone")
            axes.axvline(data["tokens"], color="#777777", linewidth=1)
            axes.plot([data["tokens"]] * 2, [here["dense"], here["dsa"]], "o", color="#222222", markersize=5)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set(xlabel="tokens in the text", ylabel=units[unit])
            ratio = here["dense"] / here["dsa"]
            axes.set_title(f"{titles[unit]}\n{data['tokens']:,} tokens: dense / DSA = {ratio:.2f}", fontsize=9)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(loc="upper left", frameon=False, fontsize=8)
        return figure

    def describe(data):
        flops, moved = data["here"]["flops"], data["here"]["bytes"]
        return (
            f"Two log-log plots of a V3.2 layer's bill against the length of the text, dense attention and DSA with "
            f"k = {data['k']}. At {data['tokens']} tokens dense attention takes {flops['dense'] / flops['dsa']:.2f} "
            f"times the FLOPs of DSA to read the text, and reads {moved['dense'] / moved['dsa']:.2f} times the bytes "
            "for the next token."
        )

    sliders = {
        "tokens": ipywidgets.IntSlider(tokens, min=10, max=22, description="tokens 2^"),
        "kept": ipywidgets.IntSlider(kept, min=6, max=13, description="k = 2^"),
    }
    return LiveFigure("bill", compute, draw, describe, **sliders)
