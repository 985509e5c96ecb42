"""Notebook 03: recall of attention mass, and the window, the control that it is compared with."""

import torch

from dsa_ref.testing import attention_recall, compare_selection

from ..checking import Check, expect, expect_number, expect_shape, normal, strided, tensor, unequal
from ..select_topk.check import judging

recall = Check("recall")  # (weights [T, S], indices int32 [T, k]) -> float
window_selection = Check("window_selection")  # (T, k) -> indices int32 [T, k]


# ------------------------------------------------------------------------------------------------------------ recall


def _weights(T, S, seed):
    """Rows like attention's: positive, summing to 1, the last column and the first never negligible."""
    weights = normal(T, S, seed=seed).double().exp()
    weights[:, [0, -1]] += 1.0
    return weights / weights.sum(dim=1, keepdim=True)


def _rows(rows):
    return torch.tensor(rows, dtype=torch.int32)


def _recall(solution, weights, indices, cause, suspects=None):
    """suspects: {cause: the number that this mistake gives}."""
    expected = attention_recall(weights, indices)
    for dtype in (torch.float64, torch.float32):
        got = expect_number(solution(weights.to(dtype), indices))
        if abs(got - expected) <= 1e-5:
            continue
        for suspicion, answer in (suspects or {}).items():
            if abs(got - answer) <= 1e-5:
                cause = suspicion
        shape = f"T={weights.shape[0]}, S={weights.shape[1]}, k={indices.shape[1]}"
        row = ", ".join(map(str, indices[0, :8].tolist())) + ", ..." * (indices.shape[1] > 8)
        expect(False, f"{shape}, first row [{row}]: {unequal(got, expected)}", cause)


@recall.property("one row")
def recall_one_row(solution):
    for seed, row in ((1, [3, 1, 0]), (2, [5])):
        weights, indices = _weights(1, 6, seed), _rows([row])
        mass = float(weights[0, row].sum())
        suspects = {"divided by k: recall is the sum of the weights, not their mean": mass / len(row)}
        _recall(solution, weights, indices, "add up the row's weights at the selected keys", suspects)
    alike = torch.full((1, 8), 0.125)
    _recall(solution, alike, _rows([[3, 1, 0]]), "keys of equal weight are still different keys: each one counts")


@recall.property("mean over rows")
def recall_mean_over_rows(solution):
    for seed, T in ((1, 4), (2, 37)):
        weights = _weights(T, 9, seed)
        indices = torch.arange(3, dtype=torch.int32).expand(T, 3) + (torch.arange(T, dtype=torch.int32) % 6)[:, None]
        suspects = {"summed over rows: take the mean": attention_recall(weights, indices) * T}
        _recall(
            solution, weights, indices, "each row has its own weights and indices; the mean goes over rows", suspects
        )


@recall.property("padding")
def recall_padding(solution):
    at_end = [[2, -1, -1, -1], [1, 2, -1, -1], [1, 2, 3, 4]]
    anywhere = [[-1, 2, -1, 5], [1, -1, -1, 3], [1, 2, 3, 4]]
    for seed, rows in ((1, at_end), (2, at_end), (3, anywhere)):
        weights, indices = _weights(3, 6, seed), _rows(rows)
        last, first = indices.long() % 6, indices.clamp(min=0)
        suspects = {
            "-1 was taken for the last column: Python counts from the end": attention_recall(weights, last.int()),
            "-1 was taken for key 0 (clamp)": attention_recall(weights, first),
        }
        suspects |= {
            "-1 was taken for the last column, once for each -1": _gathered(weights, last),
            "-1 was taken for key 0 (clamp), once for each -1": _gathered(weights, first),
        }
        _recall(solution, weights, indices, "-1 is no key: it catches nothing", suspects)


def _gathered(weights, indices):
    return float(weights.gather(1, indices.long()).sum(dim=1).mean())


@recall.property("duplicates")
def recall_duplicates(solution):
    for seed in (1, 2):
        weights = _weights(3, 6, seed)
        for rows in (  # next to each other, apart, around a -1
            [[2, 2, -1, -1], [1, 1, 1, 1], [0, 4, 5, -1]],
            [[2, 5, 2, 0], [1, 3, 1, 3], [0, 4, 5, 0]],
            [[2, -1, 2, -1], [5, 0, -1, 5], [0, 3, 4, 5]],
        ):
            indices = _rows(rows)
            suspects = {"a key named twice was counted twice": _gathered(weights, indices.clamp(min=0))}
            if (indices >= 0).all():
                _recall(solution, weights, indices, "a key named twice catches its weight once", suspects)
            else:
                _recall(solution, weights, indices, "a key named twice catches its weight once, wherever it stands")


@recall.property("empty row")
def recall_empty_row(solution):
    for seed in (1, 2):
        weights, indices = _weights(3, 6, seed), _rows([[-1, -1], [-1, -1], [0, 4]])
        cause = "a row that selects nothing catches 0, and counts in the mean"
        _recall(solution, weights, indices, cause)


@recall.property("any shape")
def recall_any_shape(solution):
    for T, S, k, seed in ((1, 1, 1, 1), (5, 5, 5, 2), (37, 9, 1, 3), (2, 50, 50, 4)):
        weights = _weights(T, S, seed)
        indices = torch.arange(k, dtype=torch.int32).expand(T, k).clone()  # with k = S all of the mass
        _recall(
            solution, weights, indices, "wrong for this shape: is a size, or a largest value, written into the code?"
        )
    weights, thousand = torch.full((1, 3000), 5e-6).double(), torch.arange(1000, 2000, dtype=torch.int32)[None]
    weights[0, 0] = 1 - weights[0, 1:].sum()
    _recall(solution, weights, thousand, "1,000 keys of 0.000005 each are 0.005 together: small weights count too")
    far = _rows([[299, 3, 256], [0, 298, -1]])
    _recall(solution, _weights(2, 300, 6), far, "wrong for 300 keys: did indices go through 8 bits, which end at 255?")
    weights, indices = _weights(5, 9, 5), _rows([[8, 0, -1], [7, 7, 1], [2, -1, -1], [3, 4, 5], [-1, -1, -1]])
    cause = "wrong for tensors that are not contiguous, as after a transpose: reshape, do not view"
    _recall(solution, strided(weights), strided(indices), cause)


# -------------------------------------------------------------------------------------------------- window_selection


def _by_recency(got, T, k):
    """A window is a selection too: by the score s, the position itself."""
    compare_selection(got, torch.arange(T, dtype=torch.float32).expand(T, T), k)


@window_selection.property("shape")
def window_selection_shape(solution):
    for T, k in ((1, 1), (4, 3), (3, 5)):
        got = solution(T, k)
        cause = "a row is k wide even where k > T: pad it with -1"
        expect(
            list(getattr(got, "shape", [])) != [T, min(T, k)] or k <= T, f"T={T}, k={k}: got {T} places a row", cause
        )
        expect_shape(got, (T, k), torch.int32)


@window_selection.property("future")
def window_selection_future(solution):
    for T, k in ((6, 2), (37, 5)):
        with judging("future", "row t ends with its own key, t: nothing later", ["future"]):
            _by_recency(solution(T, k), T, k)


@window_selection.property("padding")
def window_selection_padding(solution):
    for T, k in ((4, 3), (3, 5)):
        cause = "row t has only t + 1 keys: fill with -1, and only at the end of the row"
        with judging("padding", cause, ["range", "padding", "duplicates"]):
            _by_recency(solution(T, k), T, k)


@window_selection.property("last keys")
def window_selection_last_keys(solution):
    for T, k in ((37, 5), (9, 1), (3, 5)):
        with judging("last keys", "row t keeps keys t - k + 1 to t, its own among them"):
            _by_recency(solution(T, k), T, k)
    for T, k in ((2100, 3), (3, 70_000)):  # beyond 8 bits and the whole numbers of bf16 and fp16; beyond 16 bits
        got = tensor(solution(T, k))
        expect_shape(got, (T, k))
        keys = (torch.arange(T)[:, None] - torch.arange(k)).clamp(min=-1)
        wrong = (got.sort(dim=1).values != keys.sort(dim=1).values).any(dim=1).nonzero().flatten().tolist()
        row = got[wrong[0]] if wrong else got[0]
        what = f"T={T}, k={k}: row t={wrong[0]}: got keys {row[row != -1][:4].tolist()}" if wrong else ""
        expect(not wrong, what, "right for a short text and a small k: did positions go through 8 or 16 bits?")
