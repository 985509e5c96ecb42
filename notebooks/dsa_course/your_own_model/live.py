"""Notebook 12b: what the layers of a transformers model selected, over the text that its tokenizer cut into tokens."""

import ipywidgets
import numpy as np

from dsa_ref.training.evaluate import selected_weights

from .. import viz

WIDE = ipywidgets.Layout(width="700px")
SHOWN = 690  # bytes, the last of the text: as many as a screen takes


def live_layers(text, spans, steps, scale, token, layer) -> viz.LiveFigure:
    """Text with two sliders: the token that asks, and the layer whose selection and weights are shown.

    text: str. spans: (first, past) for each token, the characters it stands for, as a tokenizer's offset_mapping has
    them; equal ones for a token without any. steps: what `recording.steps` noted, one dict a layer. scale: the softmax
    scale. token, layer: where the sliders start. Of a long text the last SHOWN bytes are on the picture.
    `.data`: token, layer, chosen, weights, and "before", how many of the chosen are not on the picture.

    Raises: ValueError for steps that are not one a layer for these tokens, the usual reasons named.
    """
    tokens = len(spans)
    if not steps:
        raise ValueError("steps must hold one selection a layer, got none: has the text more than index_topk tokens?")
    if other := [len(step["indices"]) for step in steps if len(step["indices"]) != tokens]:
        raise ValueError(
            f"steps must be of one pass over all {tokens} tokens, got one of {other[0]}: take a shorter text, or "
            "record one pass alone"
        )
    places, shown = byte_places(text, spans), text.encode()[-SHOWN:]
    left_out = len(text.encode()) - len(shown)
    first = next(t for t in range(tokens) if places[t][1] > left_out)

    def look(token, layer):
        chosen, weights = steps[layer]["indices"][token], selected_weights(steps[layer], token, scale)
        seen = [places[int(s)][1] > left_out for s in chosen if s >= 0]
        return {"token": token, "layer": layer, "chosen": chosen, "weights": weights, "before": seen.count(False)}

    def draw(data):
        marks = {}
        for s, weight in zip(data["chosen"].tolist(), data["weights"].tolist(), strict=True):
            if s >= 0:
                marks |= {byte - left_out: weight for byte in range(*places[s]) if byte >= left_out}
        asks = max(places[data["token"]][1] - 1 - left_out, 0)
        figure = viz.selection_over_text(shown, asks, list(marks), list(marks.values()), cell=0.085, room=(0, 0.25))
        figure.legends[0].get_texts()[1].set_text("selected (darker: more weight)")  # the count is of tokens, above
        height = figure.get_size_inches()[1]
        figure.text(0.02, 1 - 0.2 / height, told(data), fontsize=9)
        return figure

    def told(data):
        count, visible = int((data["chosen"] >= 0).sum()), data["token"] + 1
        text = f"layer {data['layer']}, token {data['token']}: {count} of {visible} tokens selected"
        return text + (f", {data['before']} of them before what is shown" if data["before"] else "")

    sliders = {
        "token": ipywidgets.IntSlider(token, min=first, max=tokens - 1, description="token t", layout=WIDE),
        "layer": ipywidgets.IntSlider(layer, min=0, max=len(steps) - 1, description="layer"),
    }
    return viz.LiveFigure("layers", look, draw, lambda data: f"The text, and on it: {told(data)}.", **sliders)


def byte_places(text, spans) -> list[tuple[int, int]]:
    """(first, past) in the bytes of the text, for each token's characters."""
    until = np.cumsum([0, *(len(character.encode()) for character in text)]).tolist()
    return [(until[int(first)], until[int(past)]) for first, past in spans]
