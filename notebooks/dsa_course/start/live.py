"""Notebook 00: what the model predicts with every byte in view and with k of them, beside what it looked at."""

import functools

import ipywidgets
import torch

from dsa_ref.nn.model import load_small_model
from dsa_ref.training.evaluate import selected_weights

from .. import viz

SHOWN = 4  # guesses a panel
NAMES = {10: "↵", 32: "␣", 9: "⇥"}  # bytes that leave no ink
WAYS = (("dense", "all", "attention"), ("sparse", "chosen", "selected"))  # way, its word, the colour of its bars


def write_on(model, prompt, count, attention="sparse") -> bytes:
    """`prompt`, bytes, and `count` more, each the model's first guess. attention: "sparse", or "dense" for all bytes."""
    caches = model.new_caches(len(prompt) + count)
    text, unread = prompt, prompt
    device = next(model.parameters()).device
    for _ in range(count):
        tokens = torch.tensor(list(unread), device=device)
        unread = bytes([int(model(tokens, caches=caches, attention=attention)[-1].argmax())])
        text += unread
    return text


def top_bytes(logits) -> list:
    """The likeliest next bytes of a row of logits [256]: [(byte, probability)], SHOWN of them, likeliest first."""
    best = logits.softmax(dim=-1).topk(SHOWN)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def reader(tokens):
    """A function of (byte, k): what the model sees and guesses there, a dict.

    tokens: int64 [T]. The dict: byte, k, next (the byte that follows in the text, or None), chosen and weights (of the
    last layer, [k]), dense and sparse (`top_bytes`).
    """

    @functools.cache
    def read(k):
        """(logits [T, 256], the last layer's step) with k keys, or with all for None."""
        model, steps = load_small_model(**({} if k is None else {"index_topk": k})).to(tokens.device), []
        logits = model(tokens, attention="dense" if k is None else "sparse", record=steps)
        return logits, steps[-1], model.config.attention.softmax_scale

    def look(byte, k):
        logits, step, scale = read(k)
        return {
            "byte": byte,
            "k": k,
            "next": int(tokens[byte + 1]) if byte + 1 < len(tokens) else None,
            "chosen": step["indices"][byte].cpu(),
            "weights": selected_weights(step, byte, scale).cpu(),
            "dense": top_bytes(read(None)[0][byte]),
            "sparse": top_bytes(logits[byte]),
        }

    return look


def beside(text_bytes, seen):
    """The text with what was chosen, and to its right both guesses: fits a laptop's screen."""
    figure = viz.selection_over_text(text_bytes, seen["byte"], seen["chosen"], seen["weights"], 64, room=(2.6, 0))
    width, height = figure.get_size_inches()
    for place, way in enumerate(WAYS):
        _guesses(figure, (width - 2.3, height - 1.55 - 1.9 * place), seen, way)
    return figure


def above(text_bytes, seen, written):
    """The text with what was chosen, and above it both guesses and what the model writes: fits a phone.

    written: {way: str}, what `write_on` gave.
    """
    figure = viz.selection_over_text(text_bytes, seen["byte"], seen["chosen"], seen["weights"], 50, room=(0, 2.1))
    width, height = figure.get_size_inches()
    for place, way in enumerate(WAYS):
        left = 0.4 + place * width / 2
        _guesses(figure, (left, height - 1.5), seen, way)
        writes = {"family": "DejaVu Sans Mono", "size": 12, "weight": "bold", "color": viz.COLOURS[way[2]]}
        figure.text(left / width, 1 - 1.83 / height, f"→ {written[way[0]]}", parse_math=False, **writes)
    return figure


def describe(seen):
    """The picture in words: what was looked at, and both guesses."""
    count = int((seen["chosen"] >= 0).sum())
    best = {way: ", ".join(f"{_glyph(byte)} {p:.0%}" for byte, p in seen[way][:2]) for way in ("dense", "sparse")}
    return (
        f"Source text; byte {seen['byte']} is the query, and {count} of the {seen['byte'] + 1} bytes so far are chosen. "
        f"Next byte from all of them: {best['dense']}. From the chosen ones: {best['sparse']}."
    )


def live_next_byte(tokens, byte, k, shown) -> viz.LiveFigure:
    """Two sliders, the query's byte and k: what is looked at, and the next bytes that the model holds likeliest.

    tokens: int64 [T], of which the first `shown` are on the picture. byte, k: where the sliders start.
    """
    look, text = reader(tokens), bytes(tokens[:shown].tolist())
    wide = ipywidgets.Layout(width="700px")  # a pixel of the slider is about a byte of the text
    sliders = {
        "byte": ipywidgets.IntSlider(byte, min=0, max=shown - 1, description="byte t", layout=wide),
        "k": ipywidgets.SelectionSlider(options=(4, 16, 64, 256), value=k, description="k"),
    }
    return viz.LiveFigure("next byte", look, lambda seen: beside(text, seen), describe, sharpness=2, **sliders)


def _guesses(figure, corner, seen, way):
    """One panel, 1.1 inches high, with its lower left corner there: the likeliest next bytes as bars."""
    (width, height), (name, word, colour) = figure.get_size_inches(), way
    axes = figure.add_axes((corner[0] / width, corner[1] / height, 1.35 / width, 1.1 / height))
    visible, count = seen["byte"] + 1, int((seen["chosen"] >= 0).sum())
    bytes_used = f"all {visible} bytes" if word == "all" else f"{count} of {visible} bytes"
    axes.set_title(f"next byte, from {bytes_used}", fontsize=9, loc="left")
    for row, (byte, probability) in enumerate(seen[name]):
        axes.barh(row, probability, height=0.6, color=viz.COLOURS[colour])
        mark = "  ← in the text" if byte == seen["next"] else ""
        axes.text(probability + 0.03, row, f"{probability:.0%}{mark}", va="center", fontsize=8, clip_on=False)
    labels = [_glyph(byte) for byte, _ in seen[name]]
    axes.set_yticks(range(SHOWN), labels=labels, family="DejaVu Sans Mono", fontsize=12, parse_math=False)
    axes.set(xlim=(0, 1.25), ylim=(SHOWN - 0.4, -0.6), xticks=[])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _glyph(byte):
    return NAMES.get(byte) or viz.glyph_of(byte)
