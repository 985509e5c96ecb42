"""A number that some more than k scores of a row should reach, from a sample of the row.

Of a sample of M of n scores, k * M / n should belong to the k largest of the row. The bound is the sample's score at
that rank plus 4.5 standard deviations. It is above the k-th largest of the row, and so too high, only if the sample has
as many of the k largest as this rank. A row in random order meets that once in 144,000 rows where 64 are expected (128K
scores, M = 4096), once in 41,000 where 16 are (1M scores, M = 8192): the tail of the hypergeometric distribution. A row
whose data share a pattern with the places of the sample may meet it always. So whoever uses a bound counts the scores
that reach it, and flags the row if they are fewer than k or more than there is room for.
"""

import torch
import triton
import triton.language as tl

from .ordering import from_ordered, ordered, threshold_of

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # a bound for short rows; only -inf is below
LONG = 1 << 18  # keys; above, a larger sample and more room: fewer of a sample lie above the k-th score


@triton.jit
def safe_rank(expected):
    """The rank in a sample whose score at least k scores of the row should reach, where `expected` of them are in it.

    4.5 standard deviations of that number more, and one.
    """
    return (expected + 4.5 * tl.sqrt(expected)).to(tl.int32) + 1


@triton.jit
def sampled_place(j, n, M: tl.constexpr, RUN: tl.constexpr):
    """Where the j-th of M samples of n scores lies, int64: runs of neighbours, one in each of M / RUN equal stretches.

    Where in its stretch a run begins is a hash of the stretch's number: times 2654435761, which is 2^32 over the golden
    ratio, of which 16 bits count as a fraction of the stretch. So the places have no period that data could share. The
    last run may reach past n.
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
