"""Exact top-k of rows of any length: the contract, and the choice among four algorithms.

| variant | file | for | reads of a row |
|---|---|---|---|
| "hopper" | `hopper/select_topk.py` | compute capability 9.0, k <= 2048; the choice where there are many rows | 1 |
| "listed" | `topk/listed.py` | k <= 2048 | 1 |
| "sampled" | `topk/sampled.py` | k <= 8192 | 1 |
| "radix" | `topk/radix.py` | everything; the interpreter's choice | 5 |

The first three guess a bound from a sample and count what reaches it. The guess may be wrong, the count is not: a row
whose count does not fit is flagged, and "radix", which guesses nothing, redoes it. So all four give the same set.

A k beyond S selects no more than S does: kernels see min(k, S), and so do the limits above. The places that are left
become -1.

All compare scores as integers of the same order (`topk.ordering`). NaN in a visible place raises, except while a CUDA
graph is captured, when it counts as larger than +inf (or smaller than -inf if its sign bit is set).
"""

import torch
from torch.nn import functional as F

from dsa_ref.contracts import check_select_topk, row_ranges, values_readable

from . import runtime
from .runtime import FLOATS, INTERPRETED, check_runnable, hopper_variant
from .topk import listed, radix, sampled

PORTABLE = {"listed": listed, "sampled": sampled, "radix": radix}
LARGEST_K = {"listed": listed.LARGEST_LISTED_K, "sampled": sampled.LARGEST_SAMPLED_K}  # "radix" takes any
VARIANTS = ("hopper", "portable", *PORTABLE)


def select_topk(
    scores: torch.Tensor,
    k: int,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    variant: str | None = None,
) -> torch.Tensor:
    """`dsa_ref.select_topk`, exact for rows of any length: int32 [T, k], in no specified order, -1 after the kept.

    scores: fp32, bf16 or fp16 [T, S], S > 0; k: int >= 1, may exceed S; start, end: int32 [T], default causal with the
    queries last. No gradient: a choice has none.
    variant: "hopper", "listed", "sampled" or "radix" for one algorithm, "portable" for the fastest of the last three,
    None for the fastest of all. It is what runs; rows that it flags are redone by "radix" whatever it is.

    Raises: as the reference does (fp64 is a TypeError here); ValueError as `runtime.check_runnable` does, and for a
    variant that is unknown or cannot serve these inputs. Source: SPEC section 4 (ours).
    """
    check_select_topk(scores, k, start, end, FLOATS)
    T = len(scores)
    start, end = row_ranges(*scores.shape, scores.device, start, end)
    check_runnable(scores=scores.detach())
    width = min(k, scores.shape[1])
    out = torch.empty(T, width, dtype=torch.int32, device=scores.device)
    nan = torch.zeros(T, dtype=torch.int32, device=scores.device)
    launch(scores.detach(), width, start, end, out, nan, variant)
    refuse_nan(nan)
    return padded(out, k)


def padded(out, k):
    """A selection [T, min(k, S)] as [T, k], -1 in the places that no key can fill."""
    return F.pad(out, (0, k - out.shape[1]), value=-1) if k > out.shape[1] else out


def launch(scores, k, start, end, out, nan, variant=None):
    """Run the kernels on checked arguments: indices to out, int32 [T, k], contiguous; 1 to nan, int32 [T], for a NaN.

    k is at most S.
    nan comes in as zeros. Raises ValueError for a variant that is unknown or cannot serve.
    """
    algorithm = chosen(scores, k, variant)
    if len(scores) == 0:
        return
    arguments = scores.contiguous(), k, start.contiguous(), end.contiguous(), out, nan
    if algorithm is radix.launch:
        radix.launch(*arguments)
    else:
        redo = torch.empty_like(nan)
        algorithm(*arguments, redo)
        radix.launch(*arguments, redo)


def chosen(scores, k, variant):
    """The function that selects as `variant` says. Raises ValueError for one that is unknown or cannot serve."""
    if variant not in (None, *VARIANTS):
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)} or None, got {variant!r}")
    if variant in LARGEST_K and k > LARGEST_K[variant]:
        raise ValueError(f'variant "{variant}" needs min(k, S) <= {LARGEST_K[variant]}, got {k}')
    if variant in PORTABLE:
        return PORTABLE[variant].launch
    default = "hopper" if len(scores) >= 2 * runtime.multiprocessors(scores) else "portable"
    hopper = hopper_variant("select_topk", variant, default, scores, k)
    if hopper:
        return hopper.select_topk
    if INTERPRETED:
        return radix.launch
    return next((PORTABLE[name].launch for name, largest in LARGEST_K.items() if k <= largest), radix.launch)


def refuse_nan(nan):
    """Raise ValueError if a flag in nan, int32 [T], is set. Not while a CUDA graph is captured."""
    if values_readable(nan) and nan.any():
        raise ValueError(f"scores must not be NaN, got NaN in row {int(nan.nonzero()[0])}")
