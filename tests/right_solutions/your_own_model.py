"""Notebook 12b."""

import math

import numpy as np

from . import right


@right("same_logits")
def in_numpy(before, after, mask, index_topk, tolerance):
    before, after, real = before.numpy(), after.numpy(), mask.numpy() == 1
    if real.sum(axis=1).max() <= index_topk:
        return None
    return (np.abs(after - before)[real] <= tolerance * np.abs(before[real]).max()).all()


@right("same_logits")
def in_loops(before, after, mask, index_topk, tolerance):
    if all(sum(row) <= index_topk for row in mask.tolist()):
        return None
    places = [(b, t) for b, row in enumerate(mask.tolist()) for t, real in enumerate(row) if real]
    pairs = [pair for b, t in places for pair in zip(before[b, t].tolist(), after[b, t].tolist(), strict=True)]
    largest = max(abs(x) for x, _ in pairs)
    return not any(math.isnan(y) or abs(y - x) > tolerance * largest for x, y in pairs)


@right("same_logits")
def a_tensor_of_one_bool(before, after, mask, index_topk, tolerance):
    before, after = (x.double()[mask == 1] for x in (before, after))
    if int(mask.sum(dim=1).max()) <= index_topk:
        return None
    return ((after - before).abs().amax() / before.abs().amax()) <= tolerance
