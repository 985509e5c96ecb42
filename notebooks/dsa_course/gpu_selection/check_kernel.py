"""Notebook 10: the selection of one row as a Triton kernel."""

import math

import torch

from dsa_ref.testing import Failed

from .. import interpreting, launching
from ..checking import Check, expect, normal, whole
from ..launching import LONG, NARROW
from .check import last_bit, whole_row

INF = math.inf

selection_kernel = Check("selection_kernel")
# selection_kernel[(1,)](scores_ptr, threshold_ptr, ties_ptr, out_ptr, S, k, BLOCK)


def _given(scores, k, beyond=torch.nan):
    """The kernel's arguments for one row; `beyond` stands in memory after the row's end."""
    kept = whole_row(scores, k)
    kept = scores[kept[kept >= 0].long()]
    ties = (kept == kept.min()).sum().to(torch.int32)
    memory = launching.guarded(torch.cat([scores, torch.full((len(scores) + 64,), beyond)]))
    return (
        memory[: len(scores)], launching.guarded(kept.min().reshape(1)), launching.guarded(ties.reshape(1)),
        launching.output(k, dtype=torch.int32), len(scores), k,
    )  # fmt: skip


PAST_K = "-1 fills the places behind the last index up to k - 1: mask that store with place < k"
TOO_MANY = (
    "more than k indices were written: too many keys equal to the threshold were kept (`ties` of them, over the whole "
    "row), or lanes past the row's end were, or the place is the prefix sum without the minus 1"
)


def _launch(kernel, scores, k, block, cause, beyond=torch.nan):
    """Run the kernel on one row and compare all k places. Behind them is room for what is written too much."""
    expected, given = whole_row(scores, k), list(_given(scores, k, beyond))
    given[3] = room = launching.output(k + len(scores) + block, dtype=torch.int32)
    launching.launch(kernel, (1,), *given, BLOCK=block)
    where = f"S={len(scores)}, k={k}, BLOCK={block}"
    more = (~launching.unwritten(room[k:])).nonzero().flatten().tolist()
    if more:
        value = int(room[k + more[0]])
        what = f"{where}: place {k + more[0]} got {value}, and out has only places 0 to {k - 1}"
        raise Failed(what, PAST_K if value == -1 else TOO_MANY)
    got = room[:k].cpu()
    wrong = (got != expected).nonzero().flatten()
    if len(wrong):
        i = int(wrong[0])
        unwritten = int(got[i]) == torch.iinfo(torch.int32).max
        raise Failed(
            f"{where}, place {i}: got "
            f"{'nothing written' if unwritten else int(got[i])}, expected {int(expected[i])} "
            f"({len(wrong)} of {k} places are wrong)",
            cause,
        )


@selection_kernel.property("one block")
def selection_kernel_one_block(kernel):
    cause = "place = prefix sum of the kept keys, minus 1; kept = above the threshold, or equal to it while ties last"
    for seed, S, k in ((1, 32, 5), (2, 64, 13)):
        _launch(kernel, normal(S, seed=seed), k, S, cause)
    _launch(kernel, last_bit(128, seed=3), 11, 128, "scores were rounded before they were compared")


@selection_kernel.property("padding")
def selection_kernel_padding(kernel):
    cause = "after the last index -1 fills out[written] to out[k - 1], however many blocks that takes"
    for S, k, block in ((32, 37, 32), (8, 45, 8), (16, 17, 16)):
        _launch(kernel, normal(S, seed=S), k, block, cause)


@selection_kernel.property("tail")
def selection_kernel_tail(kernel):
    cause = "lanes past the row's end were kept (mask the comparison, too), or a last block not full was left out"
    for seed, S, k, beyond in ((1, 13, 16, INF), (2, 29, 31, -0.5), (3, 13, 5, INF), (4, 29, 7, 0.0)):
        scores = normal(S, seed=seed).abs().neg() - 1.0  # all negative: a 0 loaded for a masked lane would win
        _launch(kernel, scores, k, 1 << S.bit_length(), cause, beyond)
    launching.expect_reads_inside(kernel, (1,), *_given(normal(13, seed=4), 5), BLOCK=16)


@selection_kernel.property("carry")
def selection_kernel_carry(kernel):
    cause = "carry two counts, how many were written and how many ties were met; and write s, not the lane"
    for seed, S, k, block in ((1, 96, 11, 16), (2, 151, 40, 32), (3, 64, 50, 8)):
        _launch(kernel, normal(S, seed=seed), k, block, cause)
    _launch(kernel, normal(600, seed=4), 40, 128, cause)


@selection_kernel.property("smallest index")
def selection_kernel_smallest_index(kernel):
    cause = "of the keys equal to the threshold the first `ties` are kept, counted over all blocks together"
    for seed, S, k, block in ((1, 32, 13, 32), (2, 151, 29, 16), (3, 100, 61, 32)):
        _launch(kernel, whole(S, seed=seed), k, block, cause)
    _launch(kernel, torch.full((70,), 1.5), 21, 16, cause)


@selection_kernel.property("long row")
def selection_kernel_long_row(kernel):
    scores = whole(LONG, seed=5, largest=9)
    _launch(kernel, scores, 40_000, 8192, f"right for short rows and short lists alone: {NARROW}")


@selection_kernel.property("zeros")
def selection_kernel_zeros(kernel):
    cause = "-0.0 equals 0.0 as a float, not bit by bit"
    for seed, S, k, block in ((1, 60, 7, 16), (2, 37, 30, 64)):
        row = whole(S, seed=seed, largest=1).clamp(max=0.0)
        row[row == 0] = torch.tensor([0.0, -0.0, -0.0]).repeat(S)[: int((row == 0).sum())]
        _launch(kernel, row, k, block, cause)


@selection_kernel.property("infinities")
def selection_kernel_infinities(kernel):
    cause = "-inf and inf are scores as others are: -inf is kept where nothing better is left"
    row = torch.full((45,), -INF)
    row[[3, 40]], row[[7, 20]] = torch.tensor([1.0, -5.0]), INF
    for k in (1, 3, 9, 50):
        _launch(kernel, row, k, 16, cause)


@selection_kernel.property("each place once")
def selection_kernel_each_place_once(kernel):
    with interpreting.accesses() as seen:
        launching.launch(kernel, (1,), *_given(normal(16, seed=1), 21), BLOCK=8)
    stored = [int(address) for access in seen if access.store for address in access.addresses]
    expect(
        len(stored) == len(set(stored)),
        f"of {len(set(stored))} places some were written twice, {len(stored)} stores in all",
        "-1 everywhere first, and indices over it: on a GPU two threads then write one place, and nothing says which "
        "comes last. Write -1 behind the last index only",
    )
