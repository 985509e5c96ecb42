"""Notebook 03."""

import numpy as np
import torch

from dsa_ref import testing

from . import right


@right("select_topk")
def in_numpy(scores, k):
    scores = scores.numpy()
    T, S = scores.shape
    indices = np.full((T, k), -1, dtype=np.int32)
    for t in range(T):
        visible = scores[t, : S - T + t + 1]
        if np.isnan(visible).any():
            raise ValueError("scores must not be NaN in a visible place")
        best = np.argsort(-visible, kind="stable")[:k]
        indices[t, : len(best)] = best
    return indices


@right("select_topk")
def sorted_pairs_in_another_order(scores, k):
    T, S = scores.shape
    rows = []
    for t, row in enumerate(scores.tolist()):
        visible = row[: S - T + t + 1]
        if any(x != x for x in visible):
            raise ValueError("NaN")
        best = sorted(range(len(visible)), key=lambda s: (-visible[s], s))[:k]
        rows.append(sorted(best, reverse=True) + [-1] * (k - len(best)))
    return torch.tensor(rows, dtype=torch.int32)


@right("select_topk")
def by_the_threshold(scores, k):
    T, S = scores.shape
    indices = torch.full((T, k), -1, dtype=torch.int32)
    for t in range(T):
        visible = scores[t, : S - T + t + 1]
        if visible.isnan().any():
            raise ValueError("NaN")
        threshold = visible.topk(min(k, len(visible))).values[-1]
        above, tied = visible > threshold, visible == threshold
        kept = (above | (tied & (tied.cumsum(0) <= k - above.sum()))).nonzero().flatten()
        indices[t, : len(kept)] = kept.int()
    return indices


@right("check_selection")
def each_kept_key_has_fewer_than_n_before_it(indices, scores, k):
    T, S = scores.shape
    if indices.dtype != torch.int32 or indices.shape != (T, k):
        return False
    for t, row in enumerate(indices.tolist()):
        numbers = scores[t, : S - T + t + 1].tolist()
        n = min(k, len(numbers))
        if len(set(row[:n])) < n or min(row[:n]) < 0 or max(row) >= len(numbers) or row[n:] != [-1] * (k - n):
            raise AssertionError(f"row {t} is no selection")
        for s in row[:n]:
            if sum(x > numbers[s] or (x == numbers[s] and i < s) for i, x in enumerate(numbers)) >= n:
                raise AssertionError(f"row {t} should not hold {s}")
    return torch.tensor(True)


@right("check_selection")
def whole_rows_compared(indices, scores, k):
    T, S = scores.shape
    if indices.dtype != torch.int32 or indices.shape != (T, k):
        return False
    visible = torch.arange(S - T + 1, S + 1)[:, None]
    ranked = (
        scores.masked_fill(torch.arange(S) >= visible, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    )
    ranked = torch.nn.functional.pad(ranked, (0, max(0, k - S)))[:, :k]
    beyond = torch.arange(k) >= visible
    if not (indices[beyond] == -1).all():
        return False
    return torch.equal(
        ranked.masked_fill(beyond, S).sort(1).values, indices.long().masked_fill(beyond, S).sort(1).values
    )


@right("check_selection")
def asserts_row_by_row(indices, scores, k):
    T, S = scores.shape
    assert indices.dtype == torch.int32 and list(indices.shape) == [T, k]
    for t in range(T):
        n = S - T + t + 1
        numbers = scores[t, :n].tolist()
        best = sorted(range(n), key=lambda s: (-numbers[s], s))[:k]
        row = indices[t].tolist()
        assert sorted(row[: len(best)]) == sorted(best) and set(row[len(best) :]) <= {-1}
    return np.bool_(True)


@right("recall")
def recall_in_numpy(weights, indices):
    weights, indices = weights.numpy(), indices.numpy()
    chosen = np.zeros((weights.shape[0], weights.shape[1] + 1), dtype=bool)
    np.put_along_axis(chosen, np.where(indices < 0, weights.shape[1], indices), True, axis=1)
    return (weights * chosen[:, :-1]).sum(axis=1).mean()


@right("recall")
def recall_by_comparing_all_pairs(weights, indices):
    chosen = (indices[:, :, None] == torch.arange(weights.shape[1])).any(dim=1)
    return (weights * chosen).sum() / len(weights)


@right("window_selection")
def window_in_numpy(T, k):
    keys = np.arange(T)[:, None] - np.arange(k)
    return np.where(keys >= 0, keys, -1).astype(np.int32)


@right("window_selection")
def window_of_the_library(T, k):
    return testing.window_selection(k, torch.zeros(T).int(), torch.arange(1, T + 1).int())
