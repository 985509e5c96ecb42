"""Draw the README's pictures from the trained small model and the recorded measurements.

python -m dsa_ref.lab.figures        writes figures/selection.png and figures/recall.png
"""

import contextlib
import json
import pathlib

import torch

from ..nn.evaluate import selected_weights
from ..nn.model import load_small_model
from .viz import png, recall_curves, selection_over_text

FIGURES = pathlib.Path(__file__).parents[2] / "figures"
SHOWN, QUERY, LAYER = 800, 640, 3


def selection() -> bytes:
    """What layer LAYER selects for byte QUERY of contextlib.py, over the text."""
    source = pathlib.Path(contextlib.__file__).read_bytes()[:SHOWN]
    model, steps = load_small_model(), []
    with torch.no_grad():
        model(torch.tensor(list(source)), record=steps)
    chosen = steps[LAYER]["indices"][QUERY]
    figure = selection_over_text(
        source, QUERY, chosen, selected_weights(steps[LAYER], QUERY, model.config.attention.softmax_scale)
    )
    return png(figure, f"contextlib.py; for byte {QUERY}, the {len(chosen)} earlier bytes that the indexer selected")


def recall() -> bytes:
    """The recorded recall of the trained indexer and its controls."""
    recorded = json.loads((FIGURES / "small_model_recall.json").read_text())
    order = ("indexer", "attention itself", "window", "random")
    figure = recall_curves(recorded["k"], {name: recorded["recall"][name] for name in order})
    return png(figure, "Attention mass on the selected keys against k, for the indexer and its controls")


if __name__ == "__main__":
    for draw in (selection, recall):
        (FIGURES / f"{draw.__name__}.png").write_bytes(draw())
