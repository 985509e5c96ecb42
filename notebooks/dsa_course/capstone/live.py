"""Notebook 16: what each way of selecting costs, and what the model then sees and guesses at one byte."""

import functools

import ipywidgets
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dsa_ref.training.evaluate import selected_weights

from .. import viz
from ..start.guesses import top_bytes
from ..start.live import beside, describe
from .ablate import METHODS, paired, read, trained

STYLES = dict(zip(METHODS, viz.LINES, strict=False))
WIDE = ipywidgets.Layout(width="640px")


def live_losses(measured, first) -> viz.LiveFigure:
    """Loss against k, a curve a method, and beside it how much more that is than dense attention's.

    measured: {(method, k): losses of each byte, fp32 [windows, L]}, "dense" and METHODS. first: where the slider
    starts; a prediction counts if it is made from more bytes. `.data`: first, ks, dense, and {method: [k]} as losses,
    more (than dense) and errors (two standard errors of `more`).
    """
    ks = sorted({k for _, k in measured})
    length = measured["dense", ks[0]].shape[1]

    def compute(first):
        means = {key: losses[:, first:].double().mean(dim=1) for key, losses in measured.items()}
        more = {method: [paired(means[method, k], means["dense", k]) for k in ks] for method in METHODS}
        return {
            "first": first,
            "ks": ks,
            "dense": float(means["dense", ks[0]].mean()),
            "losses": {method: [float(means[method, k].mean()) for k in ks] for method in METHODS},
            "more": {method: [difference for difference, _, _ in found] for method, found in more.items()},
            "errors": {method: [high - difference for difference, _, high in found] for method, found in more.items()},
        }

    def draw(data):
        figure = Figure(figsize=(8.6, 3.5), layout="constrained", facecolor=viz.COLOURS["visible"])
        left, right = figure.subplots(1, 2)
        for i, (method, (colour, line, marker)) in enumerate(STYLES.items()):
            style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 6, "linewidth": 1.8}
            left.plot(ks, data["losses"][method], label=method, **style)
            if method != "random":
                aside = [k * 1.04 ** (i - 1) for k in ks]  # so that error bars do not hide each other
                right.errorbar(aside, data["more"][method], data["errors"][method], capsize=3, **style)
        for axes, level in ((left, data["dense"]), (right, 0)):
            axes.axhline(level, color=viz.COLOURS["attention"], linewidth=1.2, label="dense: all keys")
            axes.set_xscale("log", base=2)
            axes.set_xticks(ks, labels=[str(k) for k in ks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("k, keys for each byte")
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        left.set_title(f"loss, nats a byte, from more than {data['first']} bytes", fontsize=10, loc="left")
        right.set_title("how much more than dense (random is far above)", fontsize=10, loc="left")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
        return figure

    def say(data):
        said = [f"{method} {', '.join(f'{loss:.2f}' for loss in data['losses'][method])}" for method in METHODS]
        return (
            f"Loss in nats a byte, predicted from more than {data['first']} bytes, for k = {', '.join(map(str, ks))}: "
            f"{'; '.join(said)}; "
            f"dense {data['dense']:.2f}."
        )

    places = [first, *(place for place in (48, 64, 96, 128) if first < place < length)]
    slider = ipywidgets.SelectionSlider(options=places, value=first, description="more than")
    return viz.LiveFigure("losses", compute, draw, say, first=slider)


def live_methods(tokens, byte, k, method, shown) -> viz.LiveFigure:
    """Text with the k bytes that a method selects for one of them, and what the model then holds to come next.

    tokens: int64 [T], of which the first `shown` are on the picture. `.data`: the method, and what a
    `start.guesses.reader` gives.
    """
    text, scale = bytes(tokens[:shown].tolist()), trained()[0].config.attention.softmax_scale
    cached = functools.cache(lambda method, k: read(tokens, method, k))

    def compute(method, k, byte):
        (logits, steps), (dense, _) = cached(method, k), cached("dense", None)
        return {
            "method": method,
            "byte": byte,
            "k": k,
            "next": int(tokens[byte + 1]) if byte + 1 < len(tokens) else None,
            "chosen": steps[-1]["indices"][byte],
            "weights": selected_weights(steps[-1], byte, scale),
            "dense": top_bytes(dense[byte]),
            "sparse": top_bytes(logits[byte]),
        }

    controls = {
        "method": ipywidgets.Dropdown(options=METHODS, value=method, description="keeps"),
        "k": ipywidgets.SelectionSlider(options=(8, 16, 32), value=k, description="k"),
        "byte": ipywidgets.IntSlider(byte, min=0, max=shown - 1, description="byte t", layout=WIDE),
    }
    return viz.LiveFigure(
        "methods",
        compute,
        lambda seen: beside(text, seen),
        lambda seen: f"{seen['method']}: {describe(seen)}",
        **controls,
    )


def per_byte(losses, windows, methods, ks) -> dict:
    """{(method, k): fp32 [windows, L]}: the losses of each byte of each window, for `live_losses`."""
    return {
        (method, k): torch.stack([losses(window, method, k) for window in windows]) for method in methods for k in ks
    }
