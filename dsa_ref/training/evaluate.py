"""How good a trained indexer is: held-out loss with and without it, and the attention mass that it keeps.

python -m dsa_ref.training.evaluate --log figures/small_model_recall.json
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..index_scores import index_scores
from ..nn.model import SMALL_MODEL, SmallModel, load_small_model
from ..precision import exact
from ..records import output_file, positive, provenance, write_log
from ..select_topk import select_topk
from ..testing import attention_recall, random_selection, window_selection
from .corpus import held_out_windows, load_corpus


@torch.no_grad()
def held_out_loss(model: SmallModel, windows: Tensor, attention: str) -> float:
    """Mean next-byte loss, in nats a byte, over windows uint8 [n, L + 1]; attention as for `DSALayer`."""
    losses = []
    for window in windows.long():
        logits = model(window[:-1], attention=attention)
        losses.append(F.cross_entropy(logits, window[1:]))
    return torch.stack(losses).mean().item()


@exact
def attention_weights(step: dict, scale: float) -> Tensor:
    """The dense attention probabilities of a recorded dense step, mean over heads: fp32 [T, S], rows sum to 1."""
    logits = torch.einsum("thd,sd->ths", step["q"].float(), step["kv"].float()) * scale
    later = torch.ones(logits.shape[0], logits.shape[2], dtype=torch.bool, device=logits.device).triu(1)
    return (logits - step["lse"][:, :, None]).exp().masked_fill(later[:, None], 0.0).mean(dim=1)


@exact
def selected_weights(step: dict, t: int, scale: float) -> Tensor:
    """The weight (mean over heads) that row t of a recorded sparse step gives to each index: fp32 [k], 0 for -1."""
    chosen = step["indices"][t]
    logits = step["q"][t].float() @ step["kv"][chosen.clamp(min=0)].float().T * scale
    return (logits - step["lse"][t][:, None]).exp().mean(dim=0).masked_fill(chosen < 0, 0.0)


@torch.no_grad()
def recall_by_method(model: SmallModel, windows: Tensor, ks: Sequence[int]) -> dict[str, list[float]]:
    """Mean share of the dense attention mass on the k selected keys, over layers and those rows that see more than k.

    Methods: "indexer" (trained), "attention itself" (the k largest weights: the ceiling), "window" (the last k), and
    "random". windows: uint8 [n, L + 1] with L above every k. Returns {method: [recall at k for k in ks]}, 4 digits.
    """
    scale = model.config.attention.softmax_scale
    recall = {
        name: torch.zeros(len(ks), dtype=torch.float32, device="cpu")
        for name in ("attention itself", "indexer", "window", "random")
    }
    for window in windows.long():
        record = []
        model(window[:-1], attention="dense", record=record)
        for layer, step in enumerate(record):
            weights = attention_weights(step, scale)
            scores = index_scores(step["q_idx"], step["k_idx"], step["w"], step["k_scale"])
            T = weights.shape[0]
            start = torch.zeros(T, dtype=torch.int32, device=weights.device)
            end = torch.arange(1, T + 1, dtype=torch.int32, device=weights.device)
            for i, k in enumerate(ks):
                chosen = {
                    "attention itself": select_topk(weights, k),
                    "indexer": select_topk(scores, k),
                    "window": window_selection(k, start, end),
                    "random": random_selection(k, start, end, seed=layer),
                }
                for name, indices in chosen.items():
                    recall[name][i] += attention_recall(weights[k:], indices[k:]) / (len(record) * len(windows))
    return {name: [round(value, 4) for value in values.tolist()] for name, values in recall.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measure recall on held-out windows and write it with its provenance; arguments as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=pathlib.Path, default=SMALL_MODEL, help="the trained model")
    parser.add_argument("--log", type=output_file, required=True, help="where the figures go, as JSON")
    parser.add_argument("--windows", type=positive, default=8, help="how many held-out windows")
    parser.add_argument("--length", type=positive, default=2048, help="bytes a window")
    parser.add_argument("--k", type=positive, nargs="+", default=(8, 16, 32, 64, 128, 256))
    options = parser.parse_args(arguments)
    if max(options.k) >= options.length:
        parser.error(f"--k must be below --length {options.length}, else no row has a choice, got {max(options.k)}")
    origin = provenance("dsa_ref.training.evaluate", arguments)
    model = load_small_model(options.weights)
    windows = held_out_windows(load_corpus()[1], options.windows, options.length)
    result = {
        "k": options.k,
        "recall": recall_by_method(model, windows, options.k),
        "length": options.length,
        "provenance": origin,
    }
    write_log("dsa_ref.training.evaluate", options.log, result)
    print(json.dumps(result["recall"], indent=1))


if __name__ == "__main__":
    main()
