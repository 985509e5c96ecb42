"""Notebook 03: recall and the window."""

import numpy as np
import torch

from . import wrong

# ------------------------------------------------------------------------------------------------------------ recall


def _caught(weights, indices):
    """[T]: the mass on each row's selected keys."""
    T, S = weights.shape
    selected = weights.new_zeros(T, S + 1)
    selected.scatter_(1, torch.where(indices < 0, S, indices).long(), 1.0)
    return (weights * selected[:, :S]).sum(dim=1)


@wrong("recall", "one row")
def divided_by_k(weights, indices):
    return float(_caught(weights, indices).mean() / indices.shape[1])


@wrong("recall", "one row")
def share_of_keys(weights, indices):
    return float((indices >= 0).double().mean())


@wrong("recall", "one row")
def what_was_missed(weights, indices):
    return float(1 - _caught(weights, indices).mean())


@wrong("recall", "mean over rows")
def summed_over_rows(weights, indices):
    return float(_caught(weights, indices).sum())


@wrong("recall", "mean over rows")
def last_row_alone(weights, indices):
    return float(_caught(weights, indices)[-1])


@wrong("recall", "mean over rows")
def keys_of_all_rows_together(weights, indices):
    return float(weights[:, sorted(set(indices[indices >= 0].tolist()))].sum(dim=1).mean())


@wrong("recall", "padding")
def minus_one_is_the_last_column(weights, indices):
    return float(np.mean([row[chosen].sum() for row, chosen in zip(weights.numpy(), indices.numpy(), strict=True)]))


@wrong("recall", "padding")
def minus_one_is_key_zero(weights, indices):
    return float(weights.gather(1, indices.clamp(min=0).long()).sum(dim=1).mean())


@wrong("recall", "padding")
def minus_one_selects_the_last_column_once(weights, indices):
    return float(_caught(weights, indices % weights.shape[1]).mean())


@wrong("recall", "duplicates")
def duplicates_counted_twice(weights, indices):
    caught = weights.gather(1, indices.clamp(min=0).long()) * (indices >= 0)
    return float(caught.sum(dim=1).mean())


@wrong("recall", "empty row")
def empty_rows_left_out(weights, indices):
    return float(_caught(weights, indices)[(indices >= 0).any(dim=1)].mean())


# -------------------------------------------------------------------------------------------------- window_selection


@wrong("window_selection", "shape")
def window_as_int64(T, k):
    return _window_from(T, k, 0).long()


def _window_from(T, k, shift):
    """Row t keeps t - k + 1 + shift up to t + shift."""
    keys = torch.arange(T)[:, None] + shift - torch.arange(k)
    return torch.where(keys >= 0, keys, -1).int()


@wrong("window_selection", "future")
def one_too_far(T, k):
    return _window_from(T, k, 1)


@wrong("window_selection", "future")
def same_keys_for_every_row(T, k):
    return (T - 1 - torch.arange(k)).clamp(min=-1).expand(T, k).int()


@wrong("window_selection", "padding")
def negative_indices_left(T, k):
    return (torch.arange(T)[:, None] - torch.arange(k)).int()


@wrong("window_selection", "padding")
def window_padded_with_zero(T, k):
    return _window_from(T, k, 0).clamp(min=0)


@wrong("window_selection", "padding")
def window_padded_in_front(T, k):
    return _window_from(T, k, 0).flip(1)


@wrong("window_selection", "last keys")
def first_keys(T, k):
    keys = torch.arange(k).expand(T, k)
    return torch.where(keys <= torch.arange(T)[:, None], keys, -1).int()


@wrong("window_selection", "last keys")
def a_full_window_misses_the_own_key(T, k):
    rows = _window_from(T, k, 0)
    rows[k:] -= 1
    return rows


@wrong("window_selection", "last keys")
def own_key_never(T, k):
    return _window_from(T, k, -1)


@wrong("window_selection", "shape")
def no_wider_than_the_text(T, k):
    return _window_from(T, min(T, k), 0)
