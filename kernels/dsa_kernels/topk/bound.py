"""A number that some more than k scores of a row should reach, from a sample of the row.

Of a sample of M of n scores, k * M / n should belong to the k largest of the row. The sample's score at that rank plus
4.5 standard deviations is below the k-th largest of the row in all but one row of some 300,000, if the sample is
independent. A row whose data share a pattern with the places of the sample can still be misjudged: so whoever uses a
bound counts the scores that reach it, and flags the row if they are fewer than k or more than there is room for.
"""

import torch
import triton
import triton.language as tl

from .ordering import from_ordered, ordered, threshold_of

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a bound for short rows; only -inf is below
LONG = 1 << 18  # keys; above, a larger sample and more room: fewer of a sample lie above the k-th score


@triton.jit
def safe_rank(expected):
    """The rank in a sample that leaves at least k scores above it, where `expected` of them are in the sample.

    4.5 standard deviations of that number more: one row in some 300,000 fails if the sample is independent.
    """
    return (expected + 4.5 * tl.sqrt(expected)).to(tl.int32) + 1


@triton.jit
def sampled_place(j, n, M: tl.constexpr, RUN: tl.constexpr):
    """Where the j-th of M samples of n scores lies, int64: runs of neighbours, one in each of M / RUN equal stretches.

    The places in the stretches have no period that data could share. The last run may reach past n.
    """
    stretch = (j // RUN).to(tl.int64)
    shift = (stretch * 2654435761 % 65536) * (n // (M // RUN)) // 65536
    return stretch * n // (M // RUN) + shift + j % RUN


@triton.jit
def bound_of_sample(sample, real, rank):
    """The rank-th largest of the real scores of a sample, -inf if it has fewer."""
    key = tl.where(real, ordered(sample), 0)
    threshold = threshold_of(key, rank)
    return tl.where(threshold == 0, float("-inf"), from_ordered(threshold))
