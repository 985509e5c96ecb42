"""What `compare` judges a regime by: loss and needles by position, attention's mass on the selection, FP8's changes.

Windows are of one length L + 1 and are read `WINDOWS_AT_ONCE` at a time, packed; a row's place is its place in its
window. In the first k places every key can be selected, so what tells regimes apart lies beyond.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hadamard import hadamard
from ..lightning_select import lightning_select
from ..nn.model import SmallModel
from ..precision import exact
from ..quantize import dequantize, quantize
from ..select_topk import select_topk
from ..testing import attention_recall, overlap
from .needle import Pair, needles_found

WINDOWS_AT_ONCE = 8
DIGITS = 5  # of what goes into a record


def position_edges(length: int, k: int) -> list[int]:
    """Where the parts of a window of `length` places begin and end: 0, k, 2k, 4k, ... and length.

    In the first part every key may be selected, in the others k of them.
    """
    edges = [0, k]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [*edges[:-1], length]


@torch.no_grad()
def losses_by_position(model: SmallModel, windows: Tensor, attention: str, edges: Sequence[int]) -> list[list[float]]:
    """Mean next-byte loss in nats of each part of each window, uint8 [n, L + 1]: [n][parts].

    edges: as `position_edges` gives them for L; attention as for `DSALayer`.
    """
    rows = []
    for tokens in windows.split(WINDOWS_AT_ONCE):
        tokens = tokens.long()
        n, length = tokens.shape[0], tokens.shape[1] - 1
        positions = torch.arange(length, device=tokens.device).repeat(n)
        logits = model(tokens[:, :-1].flatten(), positions, attention=attention)
        losses = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").unflatten(0, (n, length))
        parts = [losses[:, first:last].mean(dim=1) for first, last in itertools.pairwise(edges)]
        rows += torch.stack(parts, dim=1).tolist()
    return [[round(value, DIGITS) for value in row] for row in rows]


def needles_by_distance(
    model: SmallModel, windows: Tensor, places: list[list[Pair]], attention: str, edges: Sequence[int]
) -> dict[str, list[int]]:
    """How many pairs lie in each range of distances, and how many of them are answered: {"asked", "found"}.

    windows, places: as `needle_windows` gives them; edges: the ranges' ends, in bytes; attention as for `DSALayer`.
    """
    distances = [pair.distance for pairs in places for pair in pairs]
    hits = list(itertools.chain(*needles_found(model, windows, places, attention)))
    count = {"asked": [], "found": []}
    for first, last in itertools.pairwise(edges):
        inside = [hit for distance, hit in zip(distances, hits, strict=True) if first <= distance < last]
        count["asked"].append(len(inside))
        count["found"].append(sum(inside))
    return count


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
    """The attention mass that the selection keeps, and the most that k keys could: {"kept", "most"} by layer.

    Means over windows uint8 [n, L + 1] and over `rows` places of each, among those that see more than k keys.
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
    return {name: rounded(column) for name, column in zip(("kept", "most"), means.T, strict=True)}


@torch.no_grad()
def precision_overlaps(model: SmallModel, windows: Tensor, k: int, rows: int) -> dict[str, list[float]]:
    """The share of an unquantised model's selections that FP8 keeps, by layer, with and without Hadamard's rotation.

    Each layer quantises what it is given without FP8, so that a difference of one layer is not one of the next.
    Rows and windows as for `recall_by_layer`. Raises: ValueError where the model has an FP8 indexer.
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
    return {name: rounded(column) for name, column in zip(turned, means.T, strict=True)}


def rounded(values: Tensor) -> list[float]:
    """A list for a record."""
    return [round(value, DIGITS) for value in values.tolist()]


def paired_ratio(losses: Sequence[Sequence[float]], control: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """For each part of the windows (mean loss over the control's, its standard error), both as `losses_by_position`.

    Paired: both were measured on the same windows, so the error is that of the differences alone.
    Raises: ValueError for other shapes, or fewer than two windows.
    """
    ours, theirs = (torch.tensor(table, dtype=torch.float64, device="cpu") for table in (losses, control))
    if ours.shape != theirs.shape or ours.dim() != 2 or len(ours) < 2:
        shapes = list(ours.shape), list(theirs.shape)
        raise ValueError(
            f"losses must have the shape [n, parts] of control, n at least 2, got {shapes[0]}, {shapes[1]}"
        )
    ratio = ours.mean(dim=0) / theirs.mean(dim=0)
    error = (ours - ratio * theirs).std(dim=0) / theirs.mean(dim=0) / len(ours) ** 0.5
    return list(zip(ratio.tolist(), error.tolist(), strict=True))
