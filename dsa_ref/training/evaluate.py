"""How good a trained indexer is: held-out loss with and without it, and the attention mass that it keeps.

    python -m dsa_ref.training.evaluate --log figures/small_model_recall.json

`compare` judges its regimes by `losses_by_position`, `recall_by_layer`, `needle_hits` and `precision_overlaps`. Their
windows are of one length L and are read `WINDOWS_AT_ONCE` at a time, packed; a row's place is its place in its window.
"""

import argparse
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..hadamard import hadamard
from ..index_scores import index_scores
from ..lightning_select import lightning_select
from ..nn.model import SMALL_MODEL, SmallModel, load_small_model
from ..precision import exact
from ..quantize import dequantize, quantize
from ..records import output_file, positive, provenance, write_log
from ..select_topk import select_topk
from ..testing import attention_recall, overlap, random_selection, window_selection
from .corpus import load_corpus

WINDOWS_AT_ONCE = 8


def held_out_windows(corpus: Tensor, count: int, length: int) -> Tensor:
    """`count` windows of length + 1 bytes, evenly spread over `corpus`, uint8 [bytes]: uint8 [count, length + 1].

    Raises: ValueError where the corpus is shorter than a window.
    """
    check_length(corpus, length)
    starts = torch.linspace(0, len(corpus) - length - 1, count, dtype=torch.float32, device="cpu").long()
    return corpus[(starts[:, None] + torch.arange(length + 1, device="cpu")).to(corpus.device)]


def check_length(corpus: Tensor, length: int) -> None:
    """Raise ValueError unless a window of length + 1 bytes fits into `corpus`, uint8 [bytes]."""
    if length < 1 or length >= len(corpus):
        raise ValueError(f"length must be from 1 to {len(corpus) - 1}, the corpus less the byte after it, got {length}")


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


def position_edges(length: int, k: int) -> list[int]:
    """Where the parts of a window of `length` places begin and end: 0, k, 2k, 4k, ... and length.

    In the first part every key may be selected, in the others k of them.
    """
    edges = [0, k]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [*edges[:-1], length]


def read_packed(model: SmallModel, windows: Tensor, attention: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens int64 [n, L + 1], logits fp32 [n, L, vocab_size]) of windows uint8 [N, L + 1], n at a time."""
    for part in windows.split(WINDOWS_AT_ONCE):
        tokens = part.long()
        n, length = tokens.shape[0], tokens.shape[1] - 1
        positions = torch.arange(length, device=tokens.device).repeat(n)
        logits = model(tokens[:, :-1].flatten(), positions, attention=attention)
        yield tokens, logits.unflatten(0, (n, length))


@torch.no_grad()
def losses_by_position(model: SmallModel, windows: Tensor, attention: str, edges: Sequence[int]) -> list[list[float]]:
    """Mean next-byte loss in nats of each part of each window, uint8 [n, L + 1]: [n][parts], 5 digits.

    edges: as `position_edges` gives them for L; attention as for `DSALayer`.
    """
    rows = []
    for tokens, logits in read_packed(model, windows, attention):
        losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        parts = [losses[:, first:last].mean(dim=1) for first, last in itertools.pairwise(edges)]
        rows += torch.stack(parts, dim=1).tolist()
    return [[round(value, 5) for value in row] for row in rows]


def sampled_rows(length: int, k: int, count: int) -> Tensor:
    """Up to `count` places of a window, evenly spread over those that see more than k keys: int64, on the CPU.

    Raises: ValueError where no place of the window does.
    """
    if length <= k:
        raise ValueError(f"length must be above k = {k}, else no row has a choice, got {length}")
    return torch.linspace(k, length - 1, min(count, length - k), dtype=torch.float64, device="cpu").long()


@exact
def row_weights(step: dict, rows: Tensor, scale: float) -> Tensor:
    """What dense attention would look at in some rows of a recorded step of one sequence: fp32 [rows, S], sums of 1.

    rows: int64 places. The mean over heads of the probabilities over all keys that the row sees, whatever the step
    itself selected.
    """
    logits = torch.einsum("thd,sd->ths", step["q"][rows].float(), step["kv"].float()) * scale
    later = torch.arange(logits.shape[2], device=logits.device) > rows[:, None]
    return logits.masked_fill(later[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)


def row_selection(step: dict, rows: Tensor, k: int) -> Tensor:
    """What some rows of a recorded step select, int32 [rows, k]: what they did select, or would in a dense step."""
    if "indices" in step:
        return step["indices"][rows]
    ranges = torch.zeros_like(rows, dtype=torch.int32), (rows + 1).int()
    return lightning_select(step["q_idx"][rows], step["k_idx"], step["w"][rows], k, step["k_scale"], *ranges)


@torch.no_grad()
def recall_by_layer(model: SmallModel, windows: Tensor, k: int, rows: int, attention: str) -> dict[str, list[float]]:
    """The share of attention's mass that the selection keeps, and the most that k keys could: {"kept", "most"} by layer.

    Means over windows uint8 [n, L + 1] and over `rows` places of each, among those that see more than k keys, 5 digits.
    attention: "sparse" for the selections that the model attended to, "dense" for those that its indexers would make.
    """
    places = sampled_rows(windows.shape[1] - 1, k, rows).to(windows.device)
    found = []
    for window in windows.long():
        record = []
        model(window[:-1], attention=attention, record=record)
        for step in record:
            weights = row_weights(step, places, model.config.attention.softmax_scale)
            ranges = torch.zeros_like(places, dtype=torch.int32), (places + 1).int()
            kept = attention_recall(weights, row_selection(step, places, k))
            found.append((kept, attention_recall(weights, select_topk(weights, k, *ranges))))
    means = torch.tensor(found, device="cpu").unflatten(0, (len(windows), -1)).mean(dim=0)
    return {name: [round(value, 5) for value in column.tolist()] for name, column in zip(("kept", "most"), means.T)}


@torch.no_grad()
def precision_overlaps(model: SmallModel, windows: Tensor, k: int, rows: int) -> dict[str, list[float]]:
    """The share of an unquantised model's selections that FP8 keeps, by layer, with and without Hadamard's rotation.

    Each layer quantises what it is given without FP8, so that a difference of one layer is not one of the next.
    Rows and windows as for `recall_by_layer`, 5 digits. Raises: ValueError where the model has an FP8 indexer.
    """
    if model.config.attention.index_fp8:
        raise ValueError("model must have index_fp8 = False, got an indexer that is quantised already")
    places = sampled_rows(windows.shape[1] - 1, k, rows).to(windows.device)
    turned = {"FP8": hadamard, "FP8 without Hadamard": lambda x: x}
    found = []
    for window in windows.long():
        record = []
        model(window[:-1], record=record)
        for step in record:
            whole = row_selection({name: step[name] for name in step if name != "indices"}, places, k)
            shares = []
            for rotate in turned.values():
                narrow = {name: dequantize(*quantize(rotate(step[name]))) for name in ("q_idx", "k_idx")}
                shares.append(overlap(whole, row_selection({**narrow, "w": step["w"], "k_scale": None}, places, k)))
            found.append(shares)
    means = torch.tensor(found, device="cpu").unflatten(0, (len(windows), -1)).mean(dim=0)
    return {name: [round(value, 5) for value in column.tolist()] for name, column in zip(turned, means.T)}


def paired_ratio(losses: Sequence[Sequence[float]], control: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """For each part of the windows (mean loss over the control's, its standard error), both as `losses_by_position`.

    Paired: both were measured on the same windows, so the error is that of the differences alone.
    Raises: ValueError for other shapes, or fewer than two windows.
    """
    ours, theirs = np.array(losses, dtype=np.float64), np.array(control, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 2 or len(ours) < 2:
        raise ValueError(f"losses must have the shape [n, parts] of control, n >= 2, got {ours.shape}, {theirs.shape}")
    ratio = ours.mean(axis=0) / theirs.mean(axis=0)
    spread = (ours - ratio * theirs).std(axis=0, ddof=1) / theirs.mean(axis=0) / math.sqrt(len(ours))
    return list(zip(ratio.tolist(), spread.tolist(), strict=True))


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
