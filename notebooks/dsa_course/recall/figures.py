"""Draw the README's picture of recall from the recorded measurements: python -m dsa_course.recall.figures

The other one, figures/selection.png, is notebook 00's own (`notebooks/maintain/pictures.py`).
"""

import json
import pathlib

from ..viz import png, recall_curves

FIGURES = pathlib.Path(__file__).parents[3] / "figures"


def recall() -> bytes:
    """The recorded recall of the trained indexer and its controls."""
    recorded = json.loads((FIGURES / "small_model_recall.json").read_text())
    order = ("indexer", "attention itself", "window", "random")
    figure = recall_curves(recorded["k"], {name: recorded["recall"][name] for name in order})
    return png(figure, "Attention mass on the selected keys against k, for the indexer and its controls")


if __name__ == "__main__":
    (FIGURES / "recall.png").write_bytes(recall())
