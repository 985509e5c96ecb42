"""Notebook 10: selection without sorting, in torch. A bound by group maxima, the k-th largest by bytes, ties by index.

It explains the kernels in `kernels/dsa_kernels/topk/`; the reference of selection is `dsa_ref.select_topk`.
"""

import torch

GROUP = 16  # scores a group where nothing else is said
SPREAD, NEIGHBOURS = "spread out", "neighbours"


def ordered_bits(x):
    """fp32 tensor -> int64 tensor in [0, 2**32), same shape: a < b as numbers exactly where so as integers."""
    bits = torch.where(x == 0, 0.0, x).view(torch.int32).long()  # -0.0 has become 0.0
    return torch.where(bits < 0, ~bits, bits + 2**31)


def group_maxima(scores, group, arrangement=NEIGHBOURS):
    """The largest score of each of ceil(S / group) disjoint groups of the row scores [S]; smaller groups are filled
    with -inf. Groups are runs of neighbours, or spread out, so that neighbours fall into different groups."""
    filled = torch.nn.functional.pad(scores, (0, -len(scores) % group), value=-torch.inf)
    if arrangement == SPREAD:
        return filled.view(group, -1).amax(dim=0)
    return filled.view(-1, group).amax(dim=1)


def lower_bound(scores, k, group=GROUP, arrangement=NEIGHBOURS):
    """The k-th largest group maximum, never above the k-th largest score; -inf where there are fewer than k groups."""
    maxima = group_maxima(scores, group, arrangement)
    return float(maxima.topk(k).values[-1]) if k <= len(maxima) else -torch.inf


def radix_passes(keys, k):
    """Find the k-th largest of keys (int64 in [0, 2**32), 1 <= k <= their number), one byte a pass from the top.

    Returns a dict for each of the four passes: keys (those that share the bytes known before), wanted (its rank among
    them), counts [256] of their next byte, and the byte found.
    """
    passes, wanted = [], k
    for shift in (24, 16, 8, 0):
        bytes_ = (keys >> shift) & 255
        counts = torch.bincount(bytes_, minlength=256)
        at_least = counts.flip(0).cumsum(0).flip(0)  # in this bin or a higher one
        byte = int((at_least >= wanted).sum()) - 1
        passes.append({"keys": keys, "wanted": wanted, "counts": counts, "byte": byte})
        wanted -= int(at_least[byte] - counts[byte])
        keys = keys[bytes_ == byte]
    return passes


def kth_by_digits(keys, k):
    """(the k-th largest of keys, how many keys of that value belong to the k largest), by `radix_passes`."""
    passes = radix_passes(keys, k)
    last = passes[-1]
    threshold = sum(p["byte"] << shift for p, shift in zip(passes, (24, 16, 8, 0), strict=True))
    return threshold, last["wanted"] - int(last["counts"][last["byte"] + 1 :].sum())


def threshold_select(scores, k):
    """The contract of selection for one row, scores fp32 [S] -> int32 [k]: ascending, smallest index first of ties,
    -1 after the last. Bound, candidates, threshold among them, ties by a running count."""
    candidates = (scores >= lower_bound(scores, k)).nonzero().flatten()
    keys = ordered_bits(scores[candidates])
    threshold, ties = kth_by_digits(keys, min(k, len(scores)))
    tied = keys == threshold
    chosen = candidates[(keys > threshold) | (tied & (tied.cumsum(0) <= ties))]
    return torch.nn.functional.pad(chosen, (0, k - len(chosen)), value=-1).to(torch.int32)
